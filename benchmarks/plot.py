"""Pictures of the frontier as SVG: time ratio against peak ratio, a panel a model, and predicted against measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "memplan"  # the same data give the same file
import matplotlib.pyplot as plt
from dominance import Point, points, predictions
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

# One colour and mark a family; memplan is drawn last, on top of the others.
_STYLES = {
    "eager": ("black", "o"),
    "eager+blocks": ("tab:brown", "s"),
    "eager+pairs": ("tab:brown", "D"),
    "eager+sac": ("tab:brown", "^"),
    "inductor": ("tab:blue", "o"),
    "inductor+blocks": ("tab:cyan", "s"),
    "inductor+pairs": ("tab:cyan", "D"),
    "inductor+sac": ("tab:cyan", "^"),
    "aot_eager": ("tab:green", "o"),
    "aot_eager_decomp_partition": ("tab:olive", "o"),
    "memplan-inductor": ("tab:pink", "o"),
    "memplan-fused": ("tab:orange", "o"),
    "memplan": ("tab:red", "o"),
}


def frontier(data: dict[str, Any], path: Path) -> None:
    """One panel a model: x peak by eager's, y step time by eager's, one line a family of contenders."""
    models = {model: measured for model, rows in data["rows"].items() if (measured := points(rows))}
    if not models:
        return
    columns = min(4, len(models))
    height = math.ceil(len(models) / columns)
    figure, axes = plt.subplots(height, columns, figsize=(4.2 * columns, 3.4 * height), squeeze=False)
    for panel, (model, measured) in zip(axes.flat, models.items(), strict=False):
        _panel(panel, model, measured)
    for panel in axes.flat[len(models) :]:
        panel.set_axis_off()
    labels = {
        label: line for panel in axes.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _panel(panel: Axes, model: str, measured: list[Point]) -> None:
    eager = next((point.peak for point in measured if point.name == "eager"), max(point.peak for point in measured))
    for family, (colour, mark) in _STYLES.items():
        line = [(point.peak / eager, point.time) for point in measured if point.family == family]
        ours = family.startswith("memplan")
        if ours:
            line.sort()  # measured in no order; the rivals' points follow their budget, so a curve may turn back
        if line:
            panel.plot(
                [x for x, _ in line],
                [y for _, y in line],
                color=colour,
                marker=mark,
                markersize=4 if ours else 3.5,
                linewidth=2 if ours else 0.8,
                zorder=3 if ours else 2,
                label=family,
            )
    panel.set_xscale("log")
    panel.set_yscale("log")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    panel.set_title(model, fontsize=9)
    panel.set_xlabel("peak / eager's peak", fontsize=7)
    panel.set_ylabel("step time / eager's", fontsize=7)
    panel.grid(alpha=0.3)
    panel.tick_params(labelsize=7)


def prediction(data: dict[str, Any], path: Path) -> None:
    """Left: predicted by measured peak, row by row. Right: predicted against measured time ratio."""
    rows = list(predictions(data["rows"]))
    if not rows:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    left.axhspan(0.98, 1.02, color="tab:green", alpha=0.15)
    left.plot(range(len(rows)), [peak for _, _, peak, _, _ in rows], "o", color="tab:red", markersize=3)
    left.set(title="predicted / measured peak", xlabel="row")
    timed = [(measured, told) for *_, told, measured in rows if measured is not None]
    right.plot([x for x, _ in timed], [y for _, y in timed], "o", color="tab:red", markersize=3)
    top = max([1.1, *(value for pair in timed for value in pair)])
    right.fill_between([0.9, top], [0.85, top - 0.05], [0.95, top + 0.05], color="tab:green", alpha=0.15, linewidth=0)
    right.set(title="time / unplanned time", xlabel="measured", ylabel="predicted")
    figure.set_layout_engine("constrained")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

"""The picture of the solvers' benchmark: cost against budget, and peak or height against time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "memplan"  # the same data give the same file
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def draw(results: dict[str, Any], path: Path) -> None:
    """Left, a panel for each graph with a ``curve``; then one panel a solver whose rows have a ``trace``."""
    rows = [row for solver in results.values() for row in solver["rows"]]
    curves = [row for row in rows if row.get("curve")]
    traced = {name: [row for row in solver["rows"] if row.get("trace")] for name, solver in results.items()}
    traced = {name: found for name, found in traced.items() if found}
    panels = len(curves) + len(traced)
    if not panels:
        return
    columns = min(4, panels)
    height = -(-panels // columns)
    figure, axes = plt.subplots(height, columns, figsize=(4 * columns, 3.2 * height), squeeze=False)
    flat = list(axes.flat)
    for panel, row in zip(flat, curves, strict=False):
        _curve(panel, row)
    for panel, (name, found) in zip(flat[len(curves) :], traced.items(), strict=False):
        _traces(panel, name, found)
    for panel in flat[panels:]:
        panel.set_axis_off()
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _curve(panel: Axes, row: dict[str, Any]) -> None:
    for label, points in row["curve"].items():
        style = {"linewidth": 2, "zorder": 3} if label == "ours" else {"linewidth": 0.9}
        panel.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label, **style)
    panel.invert_xaxis()
    panel.set(title=row["instance"], xlabel="budget, % of the stored order's peak", ylabel="cost increase, %")
    _finish(panel)


def _traces(panel: Axes, name: str, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        panel.step(*zip(*row["trace"], strict=True), where="post", marker="o", markersize=3, label=row["instance"])
    panel.set_xscale("log")
    value = {"placement": "height, % of the load bound", "order": "peak, % of the stored order's"}.get(name, "cost")
    panel.set(title=name, xlabel="seconds", ylabel=value)
    _finish(panel)


def _finish(panel: Axes) -> None:
    panel.grid(alpha=0.3)
    panel.tick_params(labelsize=7)
    panel.legend(fontsize=6, frameon=False)

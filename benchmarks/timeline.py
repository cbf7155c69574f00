"""The picture of one training step: bytes held over time, eager and under a budget, planned beside measured.

``python benchmarks/timeline.py`` runs a warm step of GPT-2 under torch's profiler, whose allocator events give the
measured curves; the planned one is the simulated Program's. Writes ``results/timeline.json`` and ``timeline.svg``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "memplan"  # the same data give the same file
import matplotlib.pyplot as plt
import torch
import zoo
from environment import environment
from measure import HERE
from rivals import Contender, prepare

import memplan

Curve = list[tuple[float, int]]  # ms since the step began, bytes held
_POINTS = 1500  # of a curve in the file and the picture


def measured(step: Callable[[], torch.Tensor], workload: zoo.Workload) -> Curve:
    """Bytes held over a warm step, parameters and inputs included."""
    for _ in range(2):
        workload.model.zero_grad(set_to_none=True)
        step().backward()
    workload.model.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step().backward()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = accumulate((e.nbytes() for e in events), initial=workload.resident_bytes())
    began = events[0].start_ns()
    return thinned([((e.start_ns() - began) / 1e6, live) for e, live in zip(events, list(held)[1:], strict=True)])


def planned() -> Curve:
    """The simulated timeline of the plan that this process made last."""
    timeline = memplan.recent_plans()[-1].timeline
    ends = accumulate(step.time / 1e3 for step in timeline.program.steps)
    return thinned(list(zip(ends, timeline.loads, strict=True)))


def thinned(curve: Curve) -> Curve:
    """At most so many points, each the highest of those that it stands for: a peak is never lost."""
    stride = -(-len(curve) // _POINTS)
    return [max(curve[k : k + stride], key=lambda point: point[1]) for k in range(0, len(curve), stride)]


def record(name: str, share: str) -> dict[str, Any]:
    """Curves of eager and of memplan at ``share`` of the unplanned peak."""
    torch.set_num_threads(1)
    curves: dict[str, Curve] = {}
    for label, contender in (("eager", "eager"), ("memplan", f"memplan@{share}")):
        workload = zoo.build(name, "bench", zoo.MODELS[name].has_dropout)
        run = prepare(Contender.parse(contender), workload, zoo.MODELS[name].has_dropout)
        curves[label] = measured(lambda run=run, inputs=workload.inputs: run(**inputs), workload)
    plan = memplan.recent_plans()[-1].plan
    return {"model": name, "share": share, "budget": plan.budget, "curves": curves | {"planned": planned()}}


def draw(found: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 3.2))
    styles = {"eager": ("0.6", 1.2), "memplan": ("tab:red", 1.6), "planned": ("black", 0.7)}
    names = {"eager": "eager, measured", "memplan": "memplan, measured", "planned": "memplan, planned"}
    for label, (colour, width) in styles.items():
        times, held = zip(*found["curves"][label], strict=True)
        axes.plot(times, [h / 2**20 for h in held], color=colour, linewidth=width, label=names[label])
    budget = found["budget"] / 2**20
    axes.axhline(budget, color="tab:red", linestyle=":", linewidth=1, label=f"budget, {budget:.0f} MiB")
    axes.set(xlabel="ms since the step began", ylabel="MiB held", xlim=(0, None), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    figure.set_layout_engine("constrained")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", choices=list(zoo.MODELS), metavar="MODEL")
    parser.add_argument("--share", default="40%", help="budget, as a share of the unplanned peak")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "timeline.json")
    given = parser.parse_args(arguments)
    found = record(given.model, given.share)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"environment": environment(), **found}) + "\n")
    draw(found, given.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()

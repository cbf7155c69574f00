"""The arena against the same Program without it: step time, page faults, height, and whether the budget holds.

``python benchmarks/runtime.py --models gpt resnet`` measures each model without a budget and at a share of its peak,
and writes ``results/runtime.json`` and a Markdown table beside it; ``--disk`` moves activations there as well. Both variants of a row run in one process, in turns;
time is the processor's, so that other work on the machine weighs little.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zoo
from environment import environment
from measure import HERE, measured_apart
from meter import Meter

Record = dict[str, Any]


def steps(
    model: str, size: str, budget: str | None, disk: bool, arena: bool
) -> tuple[Callable[[], None], Any, zoo.Workload]:
    """(one step that leaves no gradients, its plans, the workload), compiled and warm."""
    from memplan.backend import recent_plans

    workload = zoo.build(model, size)  # type: ignore[arg-type]
    options: dict[str, Any] = {"placement.enabled": arena} | ({"memory_budget": budget} if budget else {})
    if disk:
        options |= {"swap.tiers": "disk", "recompute.enabled": False}
    run = torch.compile(workload.model, backend="memplan", options=options)

    def step() -> None:
        run(**workload.inputs).backward()
        workload.model.zero_grad(set_to_none=True)

    before = len(recent_plans())
    for _ in range(3):
        step()
    return step, recent_plans()[before:], workload


def with_update(step: Callable[[], None], workload: zoo.Workload) -> int:
    """Peak bytes above what a process holds between steps, AdamW's update after the backward included; what an arena
    keeps while the update takes its temporaries counts."""
    from memplan.runtime.arena import release_idle

    optimizer = torch.optim.AdamW(workload.model.parameters(), lr=0.0)
    zero_grad, workload.model.zero_grad = workload.model.zero_grad, lambda set_to_none=True: None  # type: ignore[assignment]

    def whole() -> None:
        step()
        optimizer.step()
        zero_grad(set_to_none=True)

    whole()
    release_idle()
    above = Meter().measure(whole).above
    workload.model.zero_grad = zero_grad  # type: ignore[method-assign]
    return above


def once(step: Callable[[], None]) -> tuple[float, int]:
    """(processor seconds, minor page faults) of one step."""
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    step()
    return time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def row(model: str, size: str, budget: str | None, disk: bool, repetitions: int) -> Record:
    """Measure one model at one budget, with the disk as a tier in recomputation's stead or without; runs in a process of its own, under the malloc interposer."""
    from memplan.runtime.arena import Pool, release_idle

    torch.set_num_threads(1)
    plain, _, bare = steps(model, size, budget, disk, arena=False)
    led, plans, workload = steps(model, size, budget, disk, arena=True)
    plan = max(plans, key=lambda planned: planned.plan.peak)
    pool = next((p for p in Pool.all() if p.program is plan.lowered.program), None)
    pairs = [(once(plain), once(led)) for _ in range(repetitions)]
    release_idle()
    peak = workload.resident_bytes() + Meter().measure(led).above
    whole = [with_update(step, of) for step, of in ((plain, bare), (led, workload))]
    record: Record = {
        "graphs": len(plans),
        "budget": plan.plan.budget,
        "predicted": plan.held,
        "measured": peak,
        "time_ratio": statistics.median(b[0] / a[0] for a, b in pairs),
        "faults_without": statistics.median(a[1] for a, _ in pairs),
        "faults": statistics.median(b[1] for _, b in pairs),
        "peak_with_update": whole,
        "pairs": [[a[0], b[0]] for a, b in pairs],
    }
    if pool is not None:
        seen = pool.statistics()
        record |= {"arena": not pool.off, "height": pool.layout.height, "load": pool.layout.load}
        record |= {"results": seen.results, "unplaced": seen.unplaced, "refused": seen.refused}
    return record


def table(rows: dict[str, Record]) -> str:
    columns = ("model @ budget", "arena", "height / load", "time with / without", "faults a step", "measured / budget")
    lines = ["| " + " | ".join((*columns, "peak MB of step and AdamW")) + " |", "|---|---|---|---|---|---|---|"]
    for name, r in rows.items():
        if "failure" in r:
            lines.append(f"| {name} | {r['failure']} | | | | | |")
            continue
        height = f"{r['height'] / r['load']:.4f}" if r.get("load") else ""
        faults = f"{r['faults_without']:.0f} → {r['faults']:.0f}"
        share = f"{r['measured'] / r['budget']:.4f}" if r["budget"] else ""
        update = " → ".join(f"{peak / 1e6:.1f}" for peak in r.get("peak_with_update", ()))
        on = "on" if r.get("arena") else "off"
        lines.append(f"| {name} | {on} | {height} | {r['time_ratio']:.3f} | {faults} | {share} | {update} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(zoo.FIRST), choices=list(zoo.MODELS), metavar="MODEL")
    parser.add_argument("--size", default="bench", choices=["small", "bench"])
    parser.add_argument("--budgets", nargs="+", default=["none", "70%"])
    parser.add_argument("--disk", action="store_true", help="offload to disk instead of recomputing")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "runtime.json")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        model, size, budget, disk, repetitions = given.worker
        print(json.dumps(row(model, size, None if budget == "none" else budget, disk == "disk", int(repetitions))))
        return
    rows: dict[str, Record] = json.loads(given.out.read_text())["rows"] if given.out.exists() else {}
    for model in given.models:
        for budget in given.budgets:
            name = f"{model}{'-small' if given.size == 'small' else ''} @ {budget}{', disk' if given.disk else ''}"
            tiers = "disk" if given.disk else "none"
            rows[name] = measured_apart(__file__, [model, given.size, budget, tiers, str(given.repetitions)])
            given.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
            given.out.with_suffix(".md").write_text(table(rows))
            print(table({name: rows[name]}).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()

"""What fusion does to a step on the CPU: its time, what of it products leave to be saved, and the smallest budget.

``python benchmarks/fusion.py steps --models gpt resnet`` times unfused memplan, fused memplan and Inductor, without a
budget and under some, in one process a model and in turns; time is the processor's, that of C++ compilers apart.
``peak_above``: bytes that the allocator's events of one step rise to, gradients included. ``products`` is the share of
the unfused step that matrix products, convolutions and attention take: the ratio that free kernels for all else would
reach. ``same_bits``: whether the gradients with a budget are those without one, bit for bit.

``python benchmarks/fusion.py smallest`` predicts the smallest peak of a step as it is, with regions, and with the
rewrites of attention, loss and MLPs as well, over shapes alone: no kernel is compiled, the regions' own workspace is
not counted. Both write their rows into ``results/fusion.json`` and the tables beside it; ``report`` the tables alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import zoo
from environment import environment
from measure import HERE
from tables import markdown, megabytes, ratio
from torch.profiler import ProfilerActivity, profile

from memplan.backend import compile_with, recent_plans
from memplan.errors import BudgetInfeasibleError
from memplan.lower import lower
from memplan.meters import allocation_events
from memplan.options import Options
from memplan.passes.attention import FuseAttention
from memplan.passes.chunk import ChunkLoss
from memplan.passes.chunk_mlp import ChunkMLP
from memplan.passes.experts import GroupExperts
from memplan.passes.fuse import Fuse
from memplan.realise import Planned
from memplan.simulate import simulate

Record = dict[str, Any]
TRANSFORMERS = ("gpt", "gpt2", "bert", "llama", "t5", "vit")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "conv", "scaled_dot_product")


def contenders(budgets: Sequence[str]) -> dict[str, Record]:
    """Arguments of torch.compile by name."""
    fused = {"fusion.enabled": True}
    found: dict[str, Record] = {
        "unfused": {"backend": "memplan"},
        "fused": {"backend": "memplan", "options": fused},
        "inductor": {"backend": "inductor"},
    }
    for budget in budgets:
        found[f"unfused@{budget}"] = {"backend": "memplan", "options": {"memory_budget": budget}}
        found[f"fused@{budget}"] = {"backend": "memplan", "options": fused | {"memory_budget": budget}}
    return found


def steps(model: str, size: str, budgets: Sequence[str], repetitions: int) -> Record:
    """Times of one model's step; runs in a process of its own. A contender that refuses its budget has no times."""
    torch.set_num_threads(1)
    workload = zoo.build(model, size)  # type: ignore[arg-type]
    run: dict[str, Callable[[], None]] = {}
    rows: dict[str, Record] = {}
    gradients: dict[str, list[Any]] = {}
    for name, how in contenders(budgets).items():
        compiled = torch.compile(workload.model, **how)

        def step(compiled: Callable[..., torch.Tensor] = compiled) -> None:
            workload.model.zero_grad(set_to_none=True)
            compiled(**workload.inputs).backward()

        try:
            rows[name] = _first(step, planned=name != "inductor")
        except BudgetInfeasibleError as refused:
            rows[name] = {"smallest": refused.smallest}
            continue
        run[name], gradients[name] = step, [p.grad for p in workload.model.parameters()]
    for _ in range(repetitions):
        for name, step in run.items():
            rows[name]["cpu_s"].append(_seconds(step))
    pairs = [("fused", "unfused"), ("unfused", "inductor"), ("fused", "inductor")]
    pairs += [(f"fused@{budget}", f"unfused@{budget}") for budget in budgets]
    ratios = {f"{own}/{other}": _ratio(rows, own, other) for own, other in pairs if {own, other} <= run.keys()}
    bounded = [name for name in gradients if "@" in name]
    same = {name: _equal(gradients[name.partition("@")[0]], gradients[name]) for name in bounded}
    return {"size": size, "products": _products(run["unfused"]), "ratios": ratios, "same_bits": same, "rows": rows}


def _first(step: Callable[[], None], planned: bool) -> Record:
    """What compiling took, and what the second step rises to."""
    compilers = _compilers_seconds()
    row: Record = {"first_step_s": _seconds(step), "compilers_s": _compilers_seconds() - compilers}
    if planned:
        plan = recent_plans()[-1]
        row |= {"held": plan.held, "regions": len(plan.fused.calls) if plan.fused else 0}
    return row | {"peak_above": max(accumulate(allocation_events(step)[1], initial=0)), "cpu_s": []}


def _seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def _compilers_seconds() -> float:
    """Processor time of the C++ compilers so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _ratio(rows: dict[str, Record], name: str, base: str) -> float:
    pairs = zip(rows[name]["cpu_s"], rows[base]["cpu_s"], strict=True)
    return statistics.median(own / other for own, other in pairs)


def _equal(some: list[Any], others: list[Any]) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _products(step: Callable[[], None]) -> float:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    times = [(event.key, event.self_cpu_time_total) for event in found.key_averages()]
    return sum(t for key, t in times if any(p in key for p in _PRODUCTS)) / sum(t for _, t in times)


def smallest(model: str, size: str) -> Record:
    """Predicted bytes: ``unfused``, ``regions`` of the same graph, ``rewritten`` and with regions."""
    peaks: Record = {}

    def backend(graph_module: Any, inputs: Any) -> Any:
        run, planned = _least(graph_module, inputs)
        unfused = planned.plan.peak + planned.plan.spared
        peaks.update(resident=planned.problem.resident_bytes, unfused=unfused, regions=_contracted(planned))
        best = min(unfused, peaks["regions"])
        kept = []
        for rewrite in (FuseAttention(), GroupExperts(), ChunkLoss(), ChunkMLP()):
            rewritten = rewrite.apply(graph_module)
            if rewritten is not None and (peak := _contracted(_least(rewritten, inputs)[1])) < best:
                graph_module, best = rewritten, peak
                kept.append(rewrite.name)
        peaks.update(rewritten=best, kept=kept)
        return run

    torch._dynamo.reset()
    workload = zoo.build(model, size)  # type: ignore[arg-type]
    torch.compile(workload.model, backend=backend)(**workload.inputs)
    return peaks


def _least(graph_module: Any, inputs: Any) -> tuple[Callable[..., Any], Planned]:
    settings = Options.resolve({"runtime_estimator": "analytic", "objective": "peak"})
    run, planned = compile_with(graph_module, inputs, settings)
    assert planned is not None
    return run, planned


def _contracted(planned: Planned) -> int:
    fused = Fuse(measured=False).apply(planned.scheduled, planned.problem)
    lowered = lower(fused.scheduled.graph_module, fused.problem, fused.scheduled.forward_nodes)
    return simulate(lowered.program).peak


_RATIOS = ("fused/unfused", "fused@50%/unfused@50%", "fused/inductor")
_BARE = ("unfused", "fused", "inductor")


def steps_table(rows: dict[str, Record]) -> str:
    """Times and peaks a model; then geometric means, of all and without the least and the largest ratio."""
    header = ["", "products alone", "fused / unfused", "at 50 %", "fused / Inductor", "MB unfused", "fused", "Inductor"]
    lines = [
        [
            model,
            ratio(row["products"]),
            *(ratio(row["ratios"].get(name)) for name in _RATIOS),
            *(megabytes(row["rows"].get(name, {}).get("peak_above")) for name in _BARE),
        ]
        for model, row in rows.items()
    ]
    found = [sorted(row["ratios"][name] for row in rows.values() if row["ratios"].get(name)) for name in _RATIOS]
    for name, some in (("geometric mean", found), ("without the extremes", [values[1:-1] for values in found])):
        means = [ratio(statistics.geometric_mean(values)) if values else "" for values in some]
        lines.append([name, "", *means, "", "", ""])
    return markdown(header, lines)


def smallest_table(rows: dict[str, Record]) -> str:
    lines = [
        [model, *(f"{row[name] / 1e6:.2f}" for name in ("unfused", "regions", "rewritten")), ", ".join(row["kept"])]
        for model, row in rows.items()
    ]
    return markdown(["", "unfused", "regions", "and rewrites", "rewrites kept"], lines)


def write_tables(report: Record, beside: Path) -> None:
    beside.with_name("fusion_steps.md").write_text(steps_table(report["steps"]) + "\n")
    beside.with_name("fusion_smallest.md").write_text(smallest_table(report["smallest"]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "smallest", "report"])
    parser.add_argument("--models", nargs="+", choices=list(zoo.MODELS), metavar="MODEL")
    parser.add_argument("--size", choices=["small", "bench"])
    parser.add_argument("--budgets", nargs="+", default=["50%", "25%"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fusion.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what == "report":
        write_tables(json.loads(given.out.read_text()), given.out)
        return
    size = given.size or ("bench" if given.what == "steps" else "small")
    models = given.models or (("gpt", "resnet") if given.what == "steps" else TRANSFORMERS)
    if given.worker:
        row = (
            steps(models[0], size, given.budgets, given.repetitions)
            if given.what == "steps"
            else smallest(*models, size)
        )
        print(json.dumps(row))
        return
    for model in models:
        arguments = ["--worker", "--models", model, "--size", size, "--budgets", *given.budgets]
        command = [sys.executable, __file__, given.what, *arguments, "--repetitions", str(given.repetitions)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        report = json.loads(given.out.read_text()) if given.out.exists() else {"steps": {}, "smallest": {}}
        report[given.what][model] = row | {"environment": environment()}
        given.out.write_text(json.dumps(report, indent=1) + "\n")
        write_tables(report, given.out)
        shown = {k: v for k, v in row.items() if k != "rows"}
        print(model, json.dumps(shown))


if __name__ == "__main__":
    main()

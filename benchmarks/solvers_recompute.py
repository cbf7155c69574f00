"""The recomputation solver on public graphs and on families of any size, with the published figures beside ours.

``python benchmarks/solvers.py --only recompute --data DIR`` prints the table. Cost increases in per cent of running
every op once, budgets in per cent of the stored order's peak.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from graph_families import random_layered, residual_network, transformer

from memplan.graph_files import GraphFile, load_graph
from memplan.outcome import Limits, Status
from memplan.plans import Plan
from memplan.problem import Problem
from memplan.solvers.recompute import minimise_peak, solve_recompute
from memplan.validate import check_sequence, validate

# Published cost increases at budgets: Checkmate's MILP, Moccasin, FastSA (None: not given).
PUBLISHED: dict[str, dict[int, tuple[float | None, float | None, float | None]]] = {
    "random_layered_n100": {90: (0.8, 0.8, 0.0), 80: (2.3, 2.3, 0.3), 70: (None, None, 2.2), 60: (None,) * 3},
    "random_layered_n250": {90: (0.9, 0.9, 0.0), 80: (None, 4.9, 0.0), 70: (None, None, 2.6), 60: (None,) * 3},
    "fcn8_vgg_train": {90: (0, 0, 0.1), 80: (0.1, 0.1, 0.1), 70: (None, None, 3.0), 60: (None,) * 3},
    "resnet50_train": {90: (0.1, 0.2, 0.2), 80: (0.3, 0.3, 0.4), 70: (None, None, 0.8), 60: (None,) * 3},
}
# A plain annealer after 6 s, and the largest one-position knapsack as bound.
PLAIN: dict[str, dict[int, tuple[float | None, float]]] = {
    "gpt": {75: (1.7, 1.5), 50: (8.6, 3.3), 35: (17.2, 4.7), 25: (21.5, 5.8)},
    "res": {75: (5.1, 0.9), 50: (12.5, 2.1), 35: (35.9, 6.6), 25: (None, 10.4)},
}
FAMILIES: dict[str, Callable[[], Problem]] = {
    "random layered 500": lambda: random_layered(500, seed=500),
    "random layered 1000": lambda: random_layered(1000, seed=1000),
    "transformer, 12 layers": lambda: transformer(12),
    "transformer with dropout, 12 layers": lambda: transformer(12, dropout=True),
    "transformer, 96 layers": lambda: transformer(96),
    "residual network, 16 blocks": residual_network,
    "transformer, 312 layers": lambda: transformer(312),
}


def rows(data: Path) -> Iterator[dict[str, Any]]:
    """One row a graph and budget, as it is solved; then the smallest peak found of each graph."""
    _compile()
    for name, published in PUBLISHED.items():
        path = data / "recompute" / f"{name}.json"
        columns = ("Checkmate %", "Moccasin %", "FastSA %")
        known = {
            budget: dict(zip(columns, values, strict=True))
            for budget, values in (published | {50: (None,) * 3}).items()
        }
        yield from _graph(name, load_graph(path), known, {"tool": "score_recompute.py", "instance": str(path)})
    for name, plain in PLAIN.items():
        path = data / "joint" / f"{name}.json"
        known = {
            budget: {"plain annealer %": cost, "knapsack bound %": bound} for budget, (cost, bound) in plain.items()
        }
        yield from _graph(name, load_graph(path), known, {"tool": "score_joint.py", "instance": str(path)})
    for name, make in FAMILIES.items():
        problem = make()
        yield from _graph(name, GraphFile(problem, tuple(range(len(problem.ops)))), {70: {}, 50: {}}, None)


def _graph(
    name: str, graph: GraphFile, known: dict[int, dict[str, float | None]], score: dict[str, str] | None
) -> Iterator[dict[str, Any]]:
    """Rows of one graph; the first carries the curve of cost against budget."""
    problem = graph.problem
    peak, _ = check_sequence(problem, tuple(range(len(problem.ops))))
    found = []
    for budget, columns in known.items():
        started = time.perf_counter()
        plan = solve_recompute(problem, int(peak * budget / 100))
        seconds = time.perf_counter() - started
        validate(problem, plan)
        row = {"instance": name, "ops": len(problem.ops), "budget %": budget} | _plan_columns(plan, peak, seconds)
        if plan.budget is not None and score is not None:
            row["score"] = score | {"plan": json.dumps(graph.sequence_ids(plan.sequence))}
            row["expect"] = {"runs": len(plan.sequence)}
            if score["tool"] == "score_recompute.py":
                row["expect"]["peak"] = plan.peak  # the joint scorer drops a forward output's first copy when it reruns
        found.append(row | columns)
    curves: dict[str, list[list[float]]] = {}
    for row in found:
        for column, label in (("cost %", "ours"), *((c, c.removesuffix(" %")) for c in next(iter(known.values())))):
            if row.get(column) is not None:
                curves.setdefault(label, []).append([row["budget %"], row[column]])
    yield from [found[0] | {"curve": curves}, *found[1:]]
    if len(problem.ops) <= 1000:
        started = time.perf_counter()
        plan = minimise_peak(problem)
        validate(problem, plan)
        columns = _plan_columns(plan, peak, time.perf_counter() - started)
        yield {"instance": f"{name}, smallest peak", "ops": len(problem.ops)} | columns | {"bound %": None}


def _plan_columns(plan: Plan, peak: int, seconds: float) -> dict[str, Any]:
    base = plan.unplanned_time

    def over(time: float) -> float:
        return round(100 * (time / base - 1), 4) if base else 0.0

    solved = plan.status in (Status.OPTIMAL, Status.FEASIBLE)
    return {
        "status": str(plan.status),
        "cost %": over(plan.time) if solved else None,
        "bound %": over(plan.bound) if solved else None,
        "bound's scope": plan.bound_scope if solved else "",
        "peak %": round(100 * plan.peak / peak, 3),
        "least peak %": round(100 * plan.peak_bound / peak, 3),
        "recomputed": plan.recomputed,
        "seconds": round(seconds, 2),
    }


def _compile() -> None:
    """Load or build the compiled loops, which the times leave out: some 10 s the first time on a machine."""
    problem = transformer(1)
    peak, _ = check_sequence(problem, tuple(range(len(problem.ops))))
    solve_recompute(problem, peak - 1, limits=Limits(work=0.001))

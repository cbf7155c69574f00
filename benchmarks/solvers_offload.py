"""Offload and recomputation, each alone and weighed together, on joint graphs with a slower memory beside the device.

``python benchmarks/solvers.py --only offload --data DIR`` prints the table. Cost increases in per cent of running every
op once, budgets in per cent of the stored order's peak. No figures of others exist for these graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from graph_families import transformer

from memplan.graph_files import load_graph
from memplan.outcome import Limits, Status
from memplan.plans import Plan
from memplan.problem import Problem, Tier
from memplan.solvers.offload import solve_offload
from memplan.solvers.recompute import solve_recompute
from memplan.validate import check_sequence, validate

NO_LIMIT = 2**62  # bytes
# Rates in bytes a microsecond, latency in microseconds.
LINKS = (
    Tier("disk", NO_LIMIT, 1_000.0, 1_000.0, 100.0),
    Tier("disk", NO_LIMIT, 2_000.0, 2_000.0, 100.0),
    Tier("disk", NO_LIMIT, 4_000.0, 4_000.0, 100.0),
    Tier("host", NO_LIMIT, 12_000.0, 12_000.0, 10.0),
)
SLOW = Tier("disk", NO_LIMIT, 200.0, 200.0, 100.0)  # where neither alone is best
BUDGETS = (50, 35, 25)


def rows(data: Path) -> Iterator[dict[str, Any]]:
    """One row a graph, budget and link."""
    _compile()
    for name in ("gpt", "res"):
        problem = load_graph(data / "joint" / f"{name}.json").problem
        yield from _graph(name, problem, BUDGETS, LINKS)
        yield from _graph(name, problem, BUDGETS[-1:], (SLOW,))
    problem = transformer(96)
    peak, base = check_sequence(problem, tuple(range(len(problem.ops))))
    for budget, peaks in ((50, 2), (30, 1)):  # how many peaks cross each way in the time of the step
        link = Tier("disk", NO_LIMIT, peaks * peak / base, peaks * peak / base, 0.0)
        yield from _graph("transformer, 96 layers", problem, (budget,), (link,))


def _graph(name: str, problem: Problem, budgets: tuple[int, ...], links: tuple[Tier, ...]) -> Iterator[dict[str, Any]]:
    peak, base = check_sequence(problem, tuple(range(len(problem.ops))))
    for percent in budgets:
        budget = int(peak * percent / 100)
        again, seconds = _timed(solve_recompute, problem, budget)
        for link in links:
            tiered = replace(problem, tiers=(link,))
            away, seconds_away = _timed(partial(solve_offload, recompute=False), tiered, budget)
            both, seconds_both = _timed(solve_offload, tiered, budget)
            for plan, of in ((again, problem), (away, tiered), (both, tiered)):
                validate(of, plan)
            yield {
                "instance": name,
                "ops": len(problem.ops),
                "budget %": percent,
                "link": link.name,
                "peaks a step": round(link.write * base / peak, 2),
                "GB/s": round(link.write / 1000, 2),
                "recompute alone %": _cost(again, base),
                "offload alone %": _cost(away, base),
                "both %": _cost(both, base),
                "bound %": round(100 * (both.bound / base - 1), 3) if both.budget is not None else None,
                "status": str(both.status),
                "offloads": len(both.offloads),
                "recomputed": both.recomputed,
                "MB away": round(sum(problem.buffers[s.buffer].size for s in both.offloads) / 1e6, 1),
                "CPU s, recompute": round(seconds, 1),
                "CPU s, offload": round(seconds_away, 1),
                "CPU s, both": round(seconds_both, 1),
            }


def _timed(solve: Callable[[Problem, int], Plan], problem: Problem, budget: int) -> tuple[Plan, float]:
    began = time.process_time()
    plan = solve(problem, budget)
    return plan, time.process_time() - began


def _cost(plan: Plan, base: float) -> float | None:
    return round(100 * (plan.time / base - 1), 3) if plan.status in (Status.OPTIMAL, Status.FEASIBLE) else None


def _compile() -> None:
    """Load or build the compiled loops, which the times leave out."""
    problem = replace(transformer(1), tiers=LINKS[:1])
    peak, _ = check_sequence(problem, tuple(range(len(problem.ops))))
    solve_offload(problem, peak - 1, limits=Limits(work=0.01))

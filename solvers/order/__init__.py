"""Order: every op once, in the valid order with the least peak, and a bound on what any order can reach.

An order that meets the bound is returned at once. Otherwise: the best of several list schedules, minimum cuts as a
stronger bound, exact search over sets of done ops, and annealing between a brief and a long exact search.
"""

from __future__ import annotations

from collections.abc import Sequence

from memplan.outcome import Limits, Status
from memplan.plans import Plan
from memplan.problem import Problem
from memplan.solvers.order.bound import forced_live
from memplan.solvers.order.model import build_model
from memplan.solvers.order.search import OrderSearch

__all__ = ["forced_live_bound", "polish_order", "solve_order"]

DEFAULT = Limits()


def solve_order(problem: Problem, *, goal: int = 0, limits: Limits = DEFAULT) -> Plan:
    """The plan with the least peak found that runs every op exactly once; a peak of ``goal`` bytes is low enough.

    ``Plan.peak_bound`` is a bound on the peak of every such plan; ``status`` is OPTIMAL if and only if the peak meets
    it. Equal limits give equal plans unless ``limits.seconds`` strikes. Time out and Ctrl-C end the search, not the
    answer: the stored order is at hand from the start. Raises InputError for a problem that is not well formed.
    """
    problem.check()
    search = OrderSearch(build_model(problem), limits, goal)
    unplanned_peak = search.peak
    search.run()
    return Plan(
        sequence=search.model.sequence(search.order),
        budget=None,
        peak=search.peak,
        time=problem.total_time,
        bound=problem.total_time,
        peak_bound=search.bound,
        status=Status.OPTIMAL if search.closed else Status.FEASIBLE,
        bound_scope="every op once, any order",
        solver="order",
        unplanned_peak=unplanned_peak,
        unplanned_time=problem.total_time,
    )


def polish_order(
    problem: Problem, sequence: Sequence[int], *, goal: int = 0, limits: Limits = DEFAULT
) -> tuple[int, ...]:
    """The same runs in an order with the same or a lower peak; ``sequence`` is valid and may recompute.

    Every reader keeps the run that it reads from, so forward outputs and what is held to the end stay the same copies.
    """
    search = OrderSearch(build_model(problem, sequence), limits, goal)
    search.run()
    return search.model.sequence(search.order)


def forced_live_bound(problem: Problem) -> int:
    """Bytes that some op must hold in every order that runs each op once: its own, and all that passes it by."""
    model = build_model(problem)
    return max(forced_live(model), default=model.base)

"""The solver: offload and recomputation weighed together, never worse than the better of the two alone."""

from __future__ import annotations

from collections.abc import Sequence

from memplan.outcome import Limits, Status
from memplan.plans import Offload, Plan
from memplan.problem import Problem
from memplan.solvers.offload.bound import home_bound, offload_peak_bound, streamed
from memplan.solvers.offload.search import Search
from memplan.solvers.recompute import solve_recompute
from memplan.validate import check_plan, check_sequence

SOLVER = "offload and recompute: joint annealing"
DEFAULT = Limits()
FOUND = (Status.OPTIMAL, Status.FEASIBLE)
CLOSE = 1e-4  # a plan so close to its bound is not improved further
# The rounds: temperature at start and end in multiples of an op's mean time.
HOT, COLD = (0.5, 0.01), (0.1, 0.005)


def default_moves(ops: int) -> int:
    """Moves of a round at work 1: 3 s at 400 ops and at 3,000, as a move takes 40 ns an op."""
    return max(10_000, min(200_000, 75_000_000 // max(1, ops)))


def solve_offload(
    problem: Problem,
    budget: int,
    *,
    limits: Limits = DEFAULT,
    start: Sequence[int] | None = None,
    recompute: bool = True,
) -> Plan:
    """The fastest plan found under ``budget`` bytes, resident buffers without a home included.

    ``start``: a valid sequence to begin from (PlanError otherwise); without ``recompute`` its order is kept and nothing
    runs twice. With it the plan is no slower than ``solve_recompute``'s under the same limits, nor than the one without.
    INFEASIBLE (proven): the budget is below ``offload_peak_bound``; TIMED_OUT: nothing found; both carry the lowest plan
    met and no budget. An interrupt from the keyboard ends the search with the best plan so far.
    """
    stored = tuple(range(len(problem.ops)))
    sequence = tuple(start or stored)
    if start is not None:
        check_sequence(problem, sequence)
    bound = home_bound(problem)
    search = Search(problem, limits)
    search.load(sequence, (), budget, mix=False)
    if budget < offload_peak_bound(problem):
        return _plan(search, budget, Status.INFEASIBLE, bound)
    try:
        bound = max(bound, _search(search, budget, bound, recompute))
    except KeyboardInterrupt:
        search.say("interrupted: going on with the best plan so far")
    return _plan(search, budget, Status.FEASIBLE, bound)


def _search(search: Search, budget: int, bound: float, recompute: bool) -> float:
    """Fill ``search.best``; returns a bound on the time."""
    moves = int(search.limits.work * default_moves(len(search.problem.ops)))
    enough = bound * (1 + CLOSE)
    search.anneal(moves, *HOT, enough)
    search.say(f"offload alone: best time {search.best.time[0]:.6g}")
    if search.best.time[0] <= enough or not recompute:
        return bound
    alone = search.found()
    again = solve_recompute(streamed(search.problem), budget, limits=search.limits, start=alone[0])
    starts: list[tuple[tuple[int, ...], tuple[Offload, ...]]] = [alone]
    if again.status in FOUND:
        starts.append((again.sequence, ()))
    for sequence, offloads in starts:
        search.load(sequence, offloads, budget, mix=True)
        search.anneal(moves, *COLD, enough)
        search.say(f"offload and recompute: best time {search.best.time[0]:.6g}")
    return bound


def _plan(search: Search, budget: int, status: Status, bound: float) -> Plan:
    problem = search.problem
    sequence, offloads = search.found()
    peak, time = check_plan(problem, sequence, offloads)
    unplanned_peak, unplanned_time = check_sequence(problem, tuple(range(len(problem.ops))))
    if status == Status.FEASIBLE and search.best.time[0] == float("inf"):
        status = Status.TIMED_OUT
    if status == Status.FEASIBLE and time <= bound * (1 + 1e-9):
        status = Status.OPTIMAL
    return Plan(
        sequence=sequence,
        budget=budget if status in FOUND else None,
        peak=peak,
        time=time,
        bound=min(bound, time),
        peak_bound=offload_peak_bound(problem),
        status=status,
        bound_scope="any order" if bound <= problem.total_time else "order fixed",
        offloads=offloads,
        solver=SOLVER,
        unplanned_peak=unplanned_peak,
        unplanned_time=unplanned_time,
    )

"""The solver: offload and recomputation weighed together, never worse than the better of the two alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memplan.errors import PlanError
from memplan.outcome import Limits, Status
from memplan.plans import Plan
from memplan.problem import Op, Problem
from memplan.solvers.offload.bound import home_bound, least_time, offload_peak_bound, streamed, tightest
from memplan.solvers.offload.late import fetched_late
from memplan.solvers.offload.program import LARGEST, columns, decide
from memplan.solvers.offload.search import Search
from memplan.solvers.offload.start import comes_and_goes, realise
from memplan.solvers.recompute import solve_recompute
from memplan.validate import check_plan, check_sequence

SOLVER = "offload and recompute: integer programs and joint annealing"
DEFAULT = Limits()
FOUND = (Status.OPTIMAL, Status.FEASIBLE)
CLOSE = 1e-4  # a plan so close to its bound is not improved further
# Temperature at start and end of a round, in multiples of an op's mean time. The hot one finds what fits from nothing;
# the cold ones repair a program's solution and polish the best: hotter ones forget it.
HOT, COLD, POLISH = (0.5, 0.01), (0.05, 0.005), (0.1, 0.005)
POSITIONS = (1, 2)  # of the programs; with more the solutions got worse, and the bounds of tight budgets little better
MANY = 1000  # ops from which recomputation alone is solved only where the joint plan is not proven to beat it


def solve_offload(
    problem: Problem,
    budget: int,
    *,
    limits: Limits = DEFAULT,
    start: Sequence[int] | None = None,
    recompute: bool = True,
) -> Plan:
    """The fastest plan found under ``budget`` bytes, resident buffers without a home included.

    ``start``: a valid sequence to begin from (PlanError otherwise), whose order of first runs the programs keep; without
    ``recompute`` nothing runs twice. With it the plan is no slower than the one without, and by CLOSE at most slower than
    ``solve_recompute``'s under the same limits (beyond MANY ops: or than any recomputation in the same order can be).
    INFEASIBLE (proven): the budget is below ``offload_peak_bound``; TIMED_OUT: nothing found; both carry the lowest plan
    met and no budget. An interrupt from the keyboard ends the search with the best plan so far.
    """
    sequence = tuple(start or range(len(problem.ops)))
    check_sequence(problem, sequence)
    order = tuple(dict.fromkeys(sequence))
    place = {i: t for t, i in enumerate(order)}
    ordered = _reordered(problem, order, place)
    plan = _solve(ordered, budget, limits, tuple(place[i] for i in sequence), recompute)
    unplanned_peak, unplanned_time = check_sequence(problem, tuple(range(len(problem.ops))))
    scope = {} if order == tuple(range(len(order))) else {"bound": min(plan.time, least_time(problem))}
    return replace(
        plan,
        sequence=tuple(order[t] for t in plan.sequence),
        unplanned_peak=unplanned_peak,
        unplanned_time=unplanned_time,
        bound_scope="any order" if scope or plan.bound <= least_time(problem) else "order fixed",
        **scope,
    )


def _reordered(problem: Problem, order: tuple[int, ...], place: dict[int, int]) -> Problem:
    """The problem with another stored order; ``place``: where each op stands in it."""

    def placed(op: Op) -> Op:
        return replace(op, after=tuple(place[j] for j in op.after), after_all=tuple(place[j] for j in op.after_all))

    return replace(problem, ops=tuple(placed(problem.ops[i]) for i in order))


def _solve(problem: Problem, budget: int, limits: Limits, sequence: tuple[int, ...], recompute: bool) -> Plan:
    if not recompute:
        sequence = tuple(range(len(problem.ops)))
    search = Search(problem, limits, limits.deadline())
    search.load(sequence, comes_and_goes(problem, sequence), budget, mix=recompute)
    bound, floor = home_bound(problem), offload_peak_bound(problem)
    if budget >= floor:
        try:
            bound = _search(search, budget, bound, recompute)
        except KeyboardInterrupt:
            search.say("interrupted: going on with the best plan so far")
    found, offloads = search.found()
    offloads = fetched_late(problem, found, offloads, budget)
    peak, time = check_plan(problem, found, offloads)
    status = Status.INFEASIBLE if budget < floor else Status.TIMED_OUT if peak > budget else Status.FEASIBLE
    if status == Status.FEASIBLE and time <= bound * (1 + 1e-9):
        status = Status.OPTIMAL
    return Plan(
        sequence=found,
        budget=budget if status in FOUND else None,
        peak=peak,
        time=time,
        bound=min(bound, time),
        peak_bound=floor,
        status=status,
        offloads=offloads,
        solver=SOLVER,
    )


def _search(search: Search, budget: int, bound: float, recompute: bool) -> float:
    """Fill ``search.best``; returns a bound on the time of plans in stored order.

    Offload alone first, as it is often free; then both; then what either alone may do better, where no bound excludes it.
    """
    problem = search.problem
    search.fit(*realise(problem), budget, mix=False)
    search.anneal(search.moves // 2, *HOT, bound * (1 + CLOSE))
    search.say(f"offload alone: best time {search.best.time[0]:.6g}")
    if search.best.time[0] <= bound * (1 + CLOSE):
        return bound
    if not recompute:
        return _programs(search, budget, bound, mix=False)
    both = Search(problem, search.limits, search.deadline)
    try:
        both.load(*search.found(), budget, mix=True)
        bound = _programs(both, budget, bound, mix=True)
        if both.best.time[0] > bound * (1 + CLOSE):
            _without_offload(both, budget, bound)
        if both.best.time[0] > _order_bound(problem, budget, both, again=False):
            _programs(search, budget, bound, mix=False)
    finally:
        search.load(*both.found(), budget, mix=True)
    return bound


def _without_offload(search: Search, budget: int, bound: float) -> None:
    """Go on from recomputation alone, unless none in this order is faster and there are many ops."""
    plain = streamed(search.problem)
    if search.out_of_time():
        return
    if len(plain.ops) > MANY and search.best.time[0] <= _order_bound(plain, budget, search, again=True):
        return
    plan = solve_recompute(plain, budget, limits=search.rest_of_limits())
    search.load(plan.sequence, comes_and_goes(search.problem, plan.sequence), budget, mix=True)
    search.anneal(search.moves // 2, *COLD, bound * (1 + CLOSE))
    search.say(f"from recomputation alone: best time {search.best.time[0]:.6g}")


def _order_bound(problem: Problem, budget: int, search: Search, again: bool) -> float:
    """A bound for the stored order by the smallest program."""
    return decide(problem, budget, tightest(problem, budget, 1), again=again, seconds=search.seconds_left()).bound


def _is_valid(problem: Problem, sequence: tuple[int, ...]) -> bool:
    """A realised solution may run an op again, in the right interval, but after its operand was updated."""
    try:
        check_sequence(problem, sequence)
    except PlanError:
        return False
    return True


def _programs(search: Search, budget: int, bound: float, mix: bool) -> float:
    """Repair the programs' solutions, and polish the best plan; returns the best bound. ``mix``: ops may run again."""
    problem = search.problem
    for count in POSITIONS if len(problem.ops) <= MANY else POSITIONS[:1]:
        at = tightest(problem, budget, count)
        enough = bound * (1 + CLOSE)
        if search.best.time[0] <= enough or len(at) < count or search.out_of_time():
            break
        if columns(problem, len(at)) > LARGEST:
            break
        decision = decide(problem, budget, at, again=mix, seconds=search.seconds_left())
        if decision.bound < float("inf"):
            bound = max(bound, decision.bound)
        search.say(f"program of {count} positions: no plan in this order is faster than {bound:.6g}")
        if decision.present is None:
            break
        sequence, offloads = realise(problem, at, decision)
        if not _is_valid(problem, sequence):
            break
        search.load(sequence, offloads, budget, mix)
        search.anneal(search.moves // 2, *COLD, enough)
        search.say(f"repaired: best time {search.best.time[0]:.6g}")
    search.load(*search.found(), budget, mix)
    search.anneal(search.moves, *POLISH, bound * (1 + CLOSE))
    search.say(f"polished: best time {search.best.time[0]:.6g}")
    return bound

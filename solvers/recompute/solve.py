"""The recomputation solver: search over the joint sequence of runs with the true peak as constraint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from memplan.outcome import Limits, Status
from memplan.plans import Plan
from memplan.problem import Problem
from memplan.solvers.recompute.bound import peak_bound, recompute_bound
from memplan.solvers.recompute.evict import RULES, evicting
from memplan.solvers.recompute.lowest import is_valid, lowest_sequence
from memplan.solvers.recompute.orderless import WORK as BOUNDING
from memplan.solvers.recompute.orderless import any_order_bound
from memplan.solvers.recompute.presence import WORK as PROGRAMS
from memplan.solvers.recompute.presence import refine
from memplan.solvers.recompute.reach import WORK, proves_infeasible
from memplan.solvers.recompute.search import DEFAULT, SOLVER, Search
from memplan.validate import check_sequence

# The rounds of a solve: share of the moves, temperature at start and end in multiples of an op's mean time. The hot
# one forgets most of its start; the cold one keeps the order of its start and removes what is not needed.
HOT, COLD = (0.2, 0.5, 0.01), (0.2, 0.1, 0.005)
# Restarts on each of two cores where a gap is left, from the start and then from the best: ends of equal rounds differ
# much, so many short ones find more than a long one, and a hot round from a good sequence ends better than from any other.
WIDE, RESTARTS = (0.1, 1.0, 0.01), 4
PATIENCE = 2  # restarts in a row that find nothing better: then the others rarely do
BRIEF = (0.0, 0.1, 0.1)  # one chunk: takes the start up and tidies it
TIDIED = 8  # sequences of eviction: on 38 graphs and budgets the others were within 0.4 % of these once tidied, mostly behind
MANY = 1000  # ops from which annealing is slower than the presence programs
EXACT = 1e-6  # of the added time: what the whole units of the presence programs leave, so a bound this close is met
CLOSE = 1e-4  # a plan so close to the bound of the stored order is not annealed further
WORTHWHILE = 0.01  # of the time: below such a gap restarts found nothing on graphs that leave little of the order free
SMALL = 0.005  # of the time: and below such a gap to the bound of any order, a tenth of it
FREE = 0.98  # where another order alone brings the peak below this share, plans keep little of the stored order


def solve_recompute(
    problem: Problem, budget: int, *, limits: Limits = DEFAULT, start: Sequence[int] | None = None
) -> Plan:
    """The fastest sequence found whose peak stays within ``budget`` bytes, resident buffers included.

    ``start``: a valid sequence to begin from (PlanError otherwise); the plan is never slower than it where it fits.
    INFEASIBLE (proven): the budget is below ``peak_bound``, or ``proves_infeasible``; TIMED_OUT: nothing found; both
    carry the sequence of ``minimise_peak`` and no budget, the same for every budget that is refused. An interrupt from the
    keyboard ends the search with the best plan so far.
    """
    stored = tuple(range(len(problem.ops)))
    unplanned_peak, unplanned_time = check_sequence(problem, stored)
    floor = peak_bound(problem)
    search: Search | None = None

    def plan(sequence: Sequence[int], status: Status, bound: float, any_order: bool) -> Plan:
        peak, time = check_sequence(problem, tuple(sequence))
        return Plan(
            sequence=tuple(sequence),
            budget=budget if status in (Status.OPTIMAL, Status.FEASIBLE) else None,
            peak=peak,
            time=time,
            bound=min(bound, time),
            peak_bound=max(floor, budget + 1) if search is not None and search.infeasible else floor,
            status=status,
            bound_scope="any order" if any_order else "order fixed",
            solver=SOLVER,
            unplanned_peak=unplanned_peak,
            unplanned_time=unplanned_time,
        )

    if unplanned_peak <= budget:
        return plan(stored, Status.OPTIMAL, problem.total_time, True)
    if start is not None:
        check_sequence(problem, tuple(start))
    search = Search(problem, limits)
    bounds = Bounds(problem.total_time, problem.total_time)
    try:
        bounds = _search(search, budget, floor, start)
    except KeyboardInterrupt:
        search.say("interrupted: going on with the best plan so far")
    found = search.fastest()
    if found is None and search.best.low[1] <= budget - problem.resident_bytes:
        found = search.lowest()  # interrupted before anything was made faster
    if found is None:
        status = Status.INFEASIBLE if search.infeasible else Status.TIMED_OUT
        return plan(search.lowest() or stored, status, problem.total_time, True)
    time = sum(problem.ops[i].time for i in found)
    slack = EXACT * (time - problem.total_time) + 1e-9 * time
    if bounds.any_order >= time - slack:
        return plan(found, Status.OPTIMAL, bounds.any_order, True)
    # A sequence in another order may beat the bound of the stored order: then only the other one holds.
    fixed = bounds.any_order + slack < bounds.stored_order <= time + slack
    return plan(found, Status.FEASIBLE, bounds.stored_order if fixed else bounds.any_order, not fixed)


class Bounds(NamedTuple):
    """Times that no plan can go below: with first runs in stored order, and in any order."""

    stored_order: float
    any_order: float


def _search(search: Search, budget: int, floor: int, start: Sequence[int] | None) -> Bounds:
    """Fill ``search.best``; returns the bounds.

    First any sequence that fits, maybe an order that needs no recomputation. Then the presence programs, whose sequence
    is often optimal for the stored order, and beside them what the rules of eviction give; a bound for any order; annealing,
    on two cores, where a gap is left.
    """
    problem, room = search.problem, budget - search.problem.resident_bytes
    total, work = problem.total_time, search.limits.work
    stored = tuple(range(len(problem.ops)))
    lowest, ordered = lowest_sequence(search, floor, start, enough=budget)
    if search.best.low[1] > room:
        search.infeasible = budget < floor or proves_infeasible(problem, budget, int(WORK * work))
        return Bounds(total, total)
    search.round(lowest, room, *BRIEF)
    if search.best.time[0] <= total * (1 + 1e-12):
        return Bounds(total, total)
    twin = search.twin()
    free = max(twin.loads(ordered)) < FREE * max(twin.loads(stored))
    relaxed = search.beside(
        lambda: _evict(search, room, start or stored),
        lambda: refine(problem, budget, twin.loads, search.deadline, PROGRAMS * work),
    )
    if search.best.time[0] <= total * (1 + 1e-12):
        return Bounds(total, total)
    fixed = max(relaxed.bound if relaxed.bound < np.inf else total, recompute_bound(problem, budget))
    search.say(f"presence programs: no plan in stored order is faster than {fixed:.6g}")
    if relaxed.sequence is not None and is_valid(problem, relaxed.sequence):
        search.round(relaxed.sequence, room, *BRIEF)
    goal = float(search.best.time[0])
    loose = any_order_bound(problem, budget, goal, search.deadline, BOUNDING * work)
    search.say(f"no plan in any order is faster than {loose:.6g}")
    # A plan faster than the bound for the stored order has another order, and that bound says nothing about it.
    least = fixed * (1 - 1e-9)
    stays = fixed * (1 + (CLOSE if free else WORTHWHILE))
    if goal > loose * (1 + SMALL) and not least <= goal <= stays:
        _anneal(search, twin, start or stored, room)
    if not least <= search.best.time[0] <= fixed * (1 + CLOSE):
        search.rounds(None, room, (COLD,), 1)
    return Bounds(max(fixed, loose), loose)


def _anneal(search: Search, twin: Search, start: Sequence[int], room: int) -> None:
    """Anneal on two cores: from the start and from the fastest so far, then cold."""
    small = len(start) <= MANY
    first, then = ((HOT, *(WIDE,) * RESTARTS), (WIDE,) * RESTARTS) if small else ((HOT,), ())

    def rounds(one: Search) -> None:
        one.rounds(start, room, first, PATIENCE)
        one.rounds(None, room, then, PATIENCE)
        one.rounds(None, room, (COLD,), 1)

    twin.adopt(search)
    search.beside(lambda: rounds(search), lambda: rounds(twin))
    search.adopt(twin)


def _evict(search: Search, room: int, order: Sequence[int]) -> None:
    """Tidy the fastest sequences that the rules of eviction give under the budget."""
    rules, first, ops = RULES if len(order) <= MANY else RULES[:1], tuple(dict.fromkeys(order)), search.problem.ops
    given = {evicting(search.graph, first, room, rule)[0] for rule in rules} - {None}
    for _, sequence in sorted((sum(ops[i].time for i in found), found) for found in given)[:TIDIED]:
        if is_valid(search.problem, sequence):
            search.round(sequence, room, *BRIEF)


def frontier(problem: Problem, budgets: Iterable[int], *, limits: Limits = DEFAULT) -> list[Plan]:
    """One plan a budget, in ascending order of budgets, monotone: a larger budget never gives a slower plan, a smaller
    one never a larger peak.

    Each solve starts from the plan of the budget below, which is valid for it too; a plan that also fits the next
    smaller budget replaces that one's.
    """
    plans: list[Plan] = []
    ok = (Status.OPTIMAL, Status.FEASIBLE)
    for budget in sorted(set(budgets)):
        below = plans[-1] if plans and plans[-1].status in ok else None
        found = solve_recompute(problem, budget, limits=limits)
        if below is not None and (found.status not in ok or found.time >= below.time):
            found = solve_recompute(problem, budget, limits=limits, start=below.sequence)
        plans.append(found)
    for at in range(len(plans) - 2, -1, -1):
        above, plan = plans[at + 1], plans[at]
        if above.status in ok and plan.budget is not None and above.peak <= plan.budget:
            plans[at] = replace(above, budget=plan.budget, bound=max(plan.bound, above.bound))
    return plans

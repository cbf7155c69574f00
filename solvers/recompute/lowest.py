"""The least peak: sequences by eviction under budgets that close in on it, then annealing against targets below."""

from __future__ import annotations

import time as clock
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from memplan.errors import PlanError
from memplan.outcome import Limits, Status
from memplan.plans import Plan
from memplan.problem import Problem
from memplan.solvers.order import solve_order
from memplan.solvers.recompute.bound import peak_bound
from memplan.solvers.recompute.evict import RULES, evicting
from memplan.solvers.recompute.reach import WORK, reach_bound
from memplan.solvers.recompute.search import DEFAULT, SOLVER, Search
from memplan.validate import check_sequence

ORDER_WORK = 0.1  # of the order solver's default effort, for an order that needs no recomputation or a good start
STEPS = (1 / 4, 1 / 16, 1 / 64, 1 / 256)  # down from the lowest peak, in shares of what is left above the bound
EVICTION_WORK = 200_000_000  # ops that the evictions together may look at: 5 s
LOWERINGS = 8  # targets that annealing sets itself one after the other
LOWERING_MOVES = 0.2  # of a solve's moves, for all of them together


def lowest_sequence(
    search: Search, floor: int, start: Sequence[int] | None = None, enough: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sequence with the lowest peak found, and a good order without recomputation; the search ends where a peak of
    ``enough`` bytes is reached.

    ``floor``: a bound on the peak. All bytes include the resident ones. ``enough`` only cuts the search short, so that a
    budget is kept if and only if the peak found without it is within that budget.
    """
    resident = search.problem.resident_bytes
    stored = tuple(range(len(search.problem.ops)))
    order = tuple(best_order(search, enough) if start is None else start)
    search.offer(stored)
    search.offer(order)
    try:
        _evict(search, (stored, order), floor - resident, enough - resident)
        _anneal(search, floor - resident, enough - resident)
        _evict(search, (search.lowest(),), floor - resident, enough - resident)
        _anneal(search, floor - resident, enough - resident)
    finally:
        search.best.time[0] = np.inf  # what kept a target need not keep the caller's budget
    return search.lowest(), order


def best_order(search: Search, goal: int) -> Sequence[int]:
    """A good order without recomputation, after a brief search that ends at a peak of ``goal`` bytes."""
    limits = search.limits
    left = max(0.0, search.deadline - clock.monotonic())
    brief = replace(limits, work=ORDER_WORK * limits.work, seconds=left if left < np.inf else None)
    return solve_order(search.problem, goal=goal, limits=brief).sequence


def is_valid(problem: Problem, sequence: Sequence[int]) -> bool:
    """Eviction and presence programs do not know ``after_all``: they may run an op again after its operand was updated."""
    try:
        check_sequence(problem, tuple(sequence))
    except PlanError:
        return False
    return True


def _evict(search: Search, orders: Iterable[Sequence[int]], floor: int, enough: int) -> None:
    """For each rule and order, go down from the lowest peak so far in long steps while they fit, then in short ones."""
    left = int(EVICTION_WORK * search.limits.work)
    firsts = dict.fromkeys(tuple(dict.fromkeys(order)) for order in orders)
    for step, rule, order in product(STEPS, RULES, firsts):
        fits = True
        while fits:
            lowest = int(search.best.low[1])
            if lowest <= max(floor, enough) or left <= 0 or search.out_of_time():
                return
            sequence, work = evicting(search.graph, order, lowest - max(1, int(step * (lowest - floor))), rule)
            left -= work
            if sequence is not None and is_valid(search.problem, sequence):
                search.offer(sequence)
            fits = bool(search.best.low[1] < lowest)
    search.say(f"eviction: lowest peak {search.best.low[1]}")


def _anneal(search: Search, floor: int, enough: int) -> None:
    """Anneal against targets a little below the lowest peak; one that was reached moves the next further down, one that
    was not, closer."""
    step = 0.25
    for at in range(LOWERINGS):
        lowest = int(search.best.low[1])
        if lowest <= max(floor, enough) or search.out_of_time():
            return
        target = max(floor, lowest - max(1, int((lowest - floor) * step)))
        search.load(search.lowest(), target)
        price = search.first_price()
        search.anneal(int(LOWERING_MOVES * search.moves / LOWERINGS), search.typical, 0.05 * search.typical, price)
        search.best.time[0] = np.inf  # while a sequence keeps its budget, no lower peak is remembered
        step = min(0.25, 1.5 * step) if search.best.low[1] <= target else 0.5 * step
        search.say(f"lowering {at + 1} of {LOWERINGS}: lowest peak {search.best.low[1]}, target {target}")


def minimise_peak(problem: Problem, *, limits: Limits = DEFAULT, start: Sequence[int] | None = None) -> Plan:
    """The sequence with the smallest peak found, whatever its time; OPTIMAL where it is proven the smallest.

    Under equal limits and from an equal ``start`` (a valid sequence; None: an order sought here), ``solve_recompute``
    finds a plan for a budget if and only if it is at least this peak."""
    unplanned_peak, unplanned_time = check_sequence(problem, tuple(range(len(problem.ops))))
    floor = peak_bound(problem)
    search = Search(problem, limits)
    try:
        lowest_sequence(search, floor, start)
    except KeyboardInterrupt:
        search.say("interrupted: going on with the lowest plan so far")
    found = search.lowest()
    peak, time = check_sequence(problem, found)
    floor = reach_bound(problem, floor, peak, int(WORK * limits.work))
    return Plan(
        sequence=found,
        budget=None,
        peak=peak,
        time=time,
        bound=problem.total_time,
        peak_bound=floor,
        status=Status.OPTIMAL if peak <= floor else Status.FEASIBLE,
        bound_scope="any order",
        solver=SOLVER,
        unplanned_peak=unplanned_peak,
        unplanned_time=unplanned_time,
    )

"""The recomputation solver: search over the joint sequence of runs with the true peak as constraint."""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

from memplan.errors import PlanError
from memplan.outcome import Limits, Status
from memplan.plans import Plan
from memplan.problem import Problem
from memplan.solvers.order import solve_order
from memplan.solvers.recompute.anneal import anneal, new_best, new_work, record
from memplan.solvers.recompute.arrays import Graph, pack
from memplan.solvers.recompute.bound import peak_bound, recompute_bound
from memplan.solvers.recompute.orderless import any_order_bound
from memplan.solvers.recompute.presence import REFINEMENTS, refine
from memplan.solvers.recompute.reach import proves_infeasible, reach_bound
from memplan.solvers.recompute.state import LENGTH, LOAD, OVER, N, new_state, reset
from memplan.validate import check_sequence

SOLVER = "recompute: sequence annealing"
DEFAULT = Limits()
CHUNK = 5_000  # moves between two looks at the clock: below 0.1 s at 3,000 ops
# The rounds of a solve: share of the moves, temperature at start and end in multiples of an op's mean time. The hot
# one forgets most of its start; the cold one keeps the order of its start and removes what is not needed.
HOT, COLD = (0.4, 0.5, 0.01), (0.4, 0.1, 0.005)
# Restarts on each of two cores where a gap is left: ends of equal rounds differ much (random_layered_n250 at 60 %: 9.4
# to 13.6 % in ten of 0.1, against 11.2 in one of 1.0), so many short ones find more than a long one.
WIDE, RESTARTS = (0.1, 1.0, 0.01), 8
BRIEF = (0.0, 0.1, 0.1)  # one chunk: takes the start up and tidies it
MANY = 1000  # ops from which annealing is slower than the presence programs
ORDER_WORK = 0.1  # of the order solver's default effort, for an order that needs no recomputation or a good start
EXACT = 1e-6  # of the added time: the tolerance to which HiGHS keeps constraints, so a bound this close is met
CLOSE = 1e-4  # a plan so close to the bound of the stored order is not annealed further
LOWERINGS = 20  # targets that a search for the lowest peak sets itself one after the other
# Where another order alone brings the peak below this share of the stored order's, plans keep little of the stored order,
# and of its programs only so many are solved: dense random graphs take up to 8 s for one.
FREE, FEW = 0.98, 2
FIRST_PRICE = 0.05  # all bytes over the budget of the first sequence together cost this share of the total time


def default_moves(ops: int) -> int:
    """Moves of a solve at work 1: 3 s at 400 ops, 8 s at 3,000, 40 s at 10,000, as a move takes 1 µs + 3 ns an op."""
    return max(120 * ops, min(2_000_000, max(800_000, 1_000_000_000 // max(1, ops))))


T = TypeVar("T")


class Search:
    """The state of a search on one problem, and the best sequences it has met."""

    def __init__(self, problem: Problem, limits: Limits, deadline: float | None = None) -> None:
        self.problem, self.limits = problem, limits
        self.graph: Graph = pack(problem)
        capacity = 4 * len(problem.ops) + 64
        self.state = new_state(self.graph, capacity)
        self.work = new_work(self.graph)
        self.random = np.array([1 + (limits.seed * 7919 + 12345) % 2147483646], np.int64)
        self.deadline = limits.deadline() if deadline is None else deadline
        self.best = new_best(capacity)
        self.time = 0.0
        self.moves = int(limits.work * default_moves(len(problem.ops)))
        self.infeasible = False  # proven
        self.price = 1e-9  # of the round before, per byte over the budget at one position
        self.typical = max(problem.total_time, 1e-9) / max(1, len(problem.ops))

    def load(self, sequence: Sequence[int], room: int) -> None:
        """Make ``sequence`` the current one under a budget of ``room`` bytes beyond the resident ones."""
        self.time = reset(*self.graph, self.state, np.array(sequence, np.int64), len(sequence), room)

    def loads(self, sequence: Sequence[int]) -> list[int]:
        """Bytes beyond the resident ones at every position of a sequence."""
        self.load(sequence, 0)
        return [int(x) for x in self.state[LOAD, : self.state[N, LENGTH]]]

    @property
    def peak(self) -> int:
        """Bytes beyond the resident ones that the current sequence holds at most."""
        return int(self.state[LOAD, : self.state[N, LENGTH]].max(initial=0))

    def out_of_time(self) -> bool:
        return clock.monotonic() > self.deadline

    def anneal(self, steps: int, hot: float, cold: float, price: np.ndarray) -> None:
        """Anneal from the current sequence in chunks, until the steps are done or the deadline has passed."""
        chunks = max(1, steps // CHUNK)
        ratio = (cold / hot) ** (1 / chunks)
        for _ in range(chunks):
            if self.out_of_time():
                return
            self.time = anneal(
                *self.graph, self.state, self.work, self.best, self.time, CHUNK, hot, hot * ratio, price, self.random
            )
            hot *= ratio

    def first_price(self) -> np.ndarray:
        """What a byte over the budget at one position costs at first."""
        return np.array([FIRST_PRICE * max(self.problem.total_time, 1e-9) / max(1, int(self.state[N, OVER]))])

    def fastest(self) -> tuple[int, ...] | None:
        """The fastest sequence within the budget found so far."""
        if not np.isfinite(self.best.time[0]):
            return None
        return tuple(int(i) for i in self.best.seq[: self.best.length[0]])

    def lowest(self) -> tuple[int, ...]:
        """The sequence with the lowest peak found so far."""
        return tuple(int(i) for i in self.best.low_seq[: self.best.low[0]])

    def round(self, sequence: Sequence[int], room: int, share: float, hot: float, cold: float) -> None:
        """One round of annealing from ``sequence``."""
        self.load(sequence, room)
        price = self.first_price() if self.state[N, OVER] else np.array([self.price])
        self.anneal(int(share * self.moves), hot * self.typical, cold * self.typical, price)
        self.price = float(price[0])
        self.say(f"round done: best time {self.best.time[0]:.6g}, lowest peak {self.best.low[1]}")

    def rounds(self, sequence: Sequence[int], room: int, each: Iterable[tuple[float, float, float]]) -> None:
        """Rounds that all begin at ``sequence``."""
        for share, hot, cold in each:
            self.round(sequence, room, share, hot, cold)

    def twin(self) -> Search:
        """A search of its own on the same problem, with other random numbers."""
        return Search(self.problem, replace(self.limits, seed=self.limits.seed + 1), self.deadline)

    def adopt(self, other: Search) -> None:
        """Take over the better of the other search's sequences."""
        if other.best.time[0] < self.best.time[0]:
            self.best.time[0], self.best.length[0] = other.best.time[0], other.best.length[0]
            self.best.seq[:] = other.best.seq
        if other.best.low[1] < self.best.low[1]:
            self.best.low[:] = other.best.low
            self.best.low_seq[:] = other.best.low_seq

    def beside(self, mine: Callable[[], None], other: Callable[[], T]) -> T:
        """Run ``mine`` on a second thread while ``other`` runs; the loops and HiGHS let other threads run meanwhile."""
        with ThreadPoolExecutor(1) as side:
            running = side.submit(mine)
            try:
                result = other()
                running.result()
            except KeyboardInterrupt:
                self.deadline = 0.0  # ends ``mine`` after its next chunk
                raise
        return result

    def say(self, text: str) -> None:
        if self.limits.progress:
            self.limits.progress(text)


def solve_recompute(
    problem: Problem, budget: int, *, limits: Limits = DEFAULT, start: Sequence[int] | None = None
) -> Plan:
    """The fastest sequence found whose peak stays within ``budget`` bytes, resident buffers included.

    ``start``: a valid sequence to begin from (PlanError otherwise); the plan is never slower than it where it fits.
    INFEASIBLE (proven): the budget is below ``peak_bound``, or ``proves_infeasible``; TIMED_OUT: nothing found; both
    carry the lowest sequence met and no budget. An interrupt from the keyboard ends the search with the best plan so far.
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
            peak_bound=budget + 1 if search is not None and search.infeasible else floor,
            status=status,
            bound_scope="any order" if any_order else "order fixed",
            solver=SOLVER,
            unplanned_peak=unplanned_peak,
            unplanned_time=unplanned_time,
        )

    if unplanned_peak <= budget:
        return plan(stored, Status.OPTIMAL, problem.total_time, True)
    if budget < floor:
        return plan(start or stored, Status.INFEASIBLE, problem.total_time, True)
    if start is not None:
        check_sequence(problem, tuple(start))
    search = Search(problem, limits)
    bounds = Bounds(problem.total_time, problem.total_time)
    try:
        bounds = _search(search, budget, floor, start)
    except KeyboardInterrupt:
        search.say("interrupted: going on with the best plan so far")
    found = search.fastest()
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

    First an order that needs no recomputation. Then the presence programs, whose sequence is often optimal for the
    stored order, and beside them, up to MANY ops, a hot round that may find a better order; annealing from what they
    found where a gap is left, on two cores.
    """
    problem, room = search.problem, budget - search.problem.resident_bytes
    total = problem.total_time
    stored = tuple(range(len(problem.ops)))
    small = len(problem.ops) <= MANY
    ordered = start or _best_order(search, budget)
    search.round(ordered, room, *BRIEF)
    if search.best.time[0] <= total * (1 + 1e-12):
        return Bounds(total, total)
    twin = search.twin()
    free = max(twin.loads(ordered)) < FREE * max(twin.loads(stored))
    programs = FEW if free else REFINEMENTS
    relaxed = search.beside(
        (lambda: search.round(start or stored, room, *HOT)) if small else (lambda: None),
        lambda: refine(problem, budget, twin.loads, search.deadline, programs),
    )
    if search.best.time[0] <= total * (1 + 1e-12):
        return Bounds(total, total)
    if search.fastest() is None and proves_infeasible(problem, budget):
        search.infeasible = True
        return Bounds(total, total)
    fixed = max(relaxed.bound if relaxed.bound < np.inf else total, recompute_bound(problem, budget))
    search.say(f"presence programs: no plan in stored order is faster than {fixed:.6g}")
    if relaxed.sequence is not None and _is_valid(problem, relaxed.sequence):
        search.round(relaxed.sequence, room, *(COLD if small else BRIEF))
    # A plan faster than the bound for the stored order has another order, and that bound says nothing about it.
    if not fixed * (1 - 1e-9) <= search.best.time[0] <= fixed * (1 + CLOSE):
        again = (WIDE,) * RESTARTS if small else (HOT,)
        search.beside(
            lambda: search.rounds(start or stored, room, again), lambda: twin.rounds(start or stored, room, again)
        )
        search.adopt(twin)
        search.round(search.fastest() or ordered, room, *COLD)
    if search.fastest() is None:
        search.say("nothing fits yet: lowering the peak")
        _lower(search, floor - problem.resident_bytes, start or stored, enough=room)
        search.best.time[0] = np.inf  # what fits a target above the budget does not count
        if search.best.low[1] <= room:
            search.round(search.lowest(), room, *COLD)
    loose = any_order_bound(problem, budget, float(search.best.time[0]), search.deadline)
    search.say(f"no plan in any order is faster than {loose:.6g}")
    if loose == np.inf:
        search.infeasible = True
    return Bounds(max(fixed, loose) if loose < np.inf else fixed, loose)


def _best_order(search: Search, budget: int) -> Sequence[int]:
    """A good order without recomputation, after a brief search."""
    limits = search.limits
    left = max(0.0, search.deadline - clock.monotonic())
    brief = replace(limits, work=ORDER_WORK * limits.work, seconds=left if left < np.inf else None)
    return solve_order(search.problem, goal=budget, limits=brief).sequence


def _is_valid(problem: Problem, sequence: Sequence[int]) -> bool:
    """The presence programs do not know ``after_all``: they may run an op again after its operand was updated."""
    try:
        check_sequence(problem, tuple(sequence))
    except PlanError:
        return False
    return True


def _lower(search: Search, goal: int, start: Sequence[int], enough: int = 0) -> None:
    """Anneal against targets that stay a little below the lowest peak found, until ``enough`` or ``goal`` is reached.

    A target that was reached moves the next one further down towards ``goal``, one that was not, closer; after a miss
    every other round begins at ``start`` again, as the lowest sequence may be a dead end.
    """
    search.load(start, 0)
    record(search.state, search.time, search.best)
    sequence: Sequence[int] = search.lowest()
    step = 0.5
    for at in range(LOWERINGS):
        lowest = int(search.best.low[1])
        if lowest <= max(goal, enough) or search.out_of_time():
            return
        target = max(goal, lowest - max(1, int((lowest - goal) * step)))
        search.load(sequence, target)
        price = search.first_price()
        search.best.time[0] = np.inf
        search.anneal(search.moves // LOWERINGS, search.typical, 0.05 * search.typical, price)
        sequence = start if search.best.low[1] > target and at % 2 else search.lowest()
        step = min(0.5, 1.5 * step) if search.best.low[1] <= target else 0.6 * step
        search.say(f"lowering {at + 1} of {LOWERINGS}: lowest peak {search.best.low[1]}, target {target}")


def minimise_peak(problem: Problem, *, limits: Limits = DEFAULT, start: Sequence[int] | None = None) -> Plan:
    """The sequence with the smallest peak found, whatever its time; OPTIMAL where it is proven the smallest."""
    stored = tuple(range(len(problem.ops)))
    unplanned_peak, unplanned_time = check_sequence(problem, stored)
    floor = peak_bound(problem)
    found = stored
    if start is not None and check_sequence(problem, tuple(start))[0] < unplanned_peak:
        found = tuple(start)
    if check_sequence(problem, found)[0] > floor:
        search = Search(problem, limits)
        try:
            _lower(search, floor - problem.resident_bytes, found)
        except KeyboardInterrupt:
            search.say("interrupted: going on with the lowest plan so far")
        found = search.lowest() or found
    peak, time = check_sequence(problem, found)
    floor = reach_bound(problem, floor, peak)
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

"""The recomputation solver: search over the joint sequence of runs with the true peak as constraint."""

from __future__ import annotations

import time as clock
from collections.abc import Sequence

import numpy as np

from memplan.outcome import Limits, Status
from memplan.plans import Plan
from memplan.problem import Problem
from memplan.solvers.recompute.anneal import anneal, new_best, new_work
from memplan.solvers.recompute.arrays import Graph, pack
from memplan.solvers.recompute.bound import peak_bound, recompute_bound
from memplan.solvers.recompute.state import LENGTH, LOAD, OVER, N, new_state, reset

SOLVER = "recompute: sequence annealing"
DEFAULT = Limits()
CHUNK = 10_000  # moves between two looks at the clock: below 0.1 s at 3,000 ops


class Search:
    """One problem's state of the search; every budget of a sweep may use the same."""

    def __init__(self, problem: Problem, limits: Limits) -> None:
        self.problem, self.limits = problem, limits
        self.graph: Graph = pack(problem)
        self.capacity = 4 * len(problem.ops) + 64
        self.state = new_state(self.graph, self.capacity)
        self.work = new_work(self.graph)
        self.random = np.array([1 + (limits.seed * 7919 + 12345) % 2147483646], np.int64)
        self.deadline = limits.deadline()
        self.best = new_best(self.capacity)
        self.time = 0.0

    def load(self, sequence: Sequence[int], budget: int) -> float:
        """Make ``sequence`` the current state under ``budget`` bytes beyond the resident ones; returns its time."""
        self.time = reset(*self.graph, self.state, np.array(sequence, np.int64), len(sequence), budget)
        return self.time

    @property
    def peak(self) -> int:
        """Bytes beyond the resident ones that the current sequence holds at most."""
        return int(self.state[LOAD, : self.state[N, LENGTH]].max(initial=0))

    def anneal(self, steps: int, hot: float, cold: float, price: np.ndarray) -> None:
        """Anneal in chunks until the steps are done, the deadline passes, or the user interrupts."""
        chunks = max(1, steps // CHUNK)
        ratio = (cold / hot) ** (1 / chunks)
        for _ in range(chunks):
            if clock.monotonic() > self.deadline:
                return
            self.time = anneal(
                *self.graph, self.state, self.work, self.best, self.time, CHUNK, hot, hot * ratio, price, self.random
            )
            hot *= ratio

    def fastest(self) -> tuple[int, ...] | None:
        """The fastest sequence within the budget found so far."""
        if not np.isfinite(self.best.time[0]):
            return None
        return tuple(int(i) for i in self.best.seq[: self.best.length[0]])

    def lowest(self) -> tuple[int, ...]:
        """The sequence with the lowest peak found so far."""
        return tuple(int(i) for i in self.best.low_seq[: self.best.low[0]])


def solve_recompute(
    problem: Problem, budget: int, *, limits: Limits = DEFAULT, start: Sequence[int] | None = None
) -> Plan:
    """The fastest sequence found whose peak stays within ``budget`` bytes, resident buffers included.

    INFEASIBLE when the budget is below ``peak_bound``; TIMED_OUT, with the lowest-peak sequence found, when no
    sequence within the budget was found. ``start``: a valid sequence to begin from.
    """
    search = Search(problem, limits)
    room = budget - problem.resident_bytes
    stored = tuple(range(len(problem.ops)))
    unplanned_time = search.load(stored, room)
    unplanned_peak = search.peak + problem.resident_bytes
    floor = peak_bound(problem)

    def plan(sequence: Sequence[int], status: Status) -> Plan:
        time = search.load(sequence, room)
        return Plan(
            sequence=tuple(sequence),
            budget=budget if status in (Status.OPTIMAL, Status.FEASIBLE) else None,
            peak=search.peak + problem.resident_bytes,
            time=time,
            bound=bound,
            peak_bound=floor,
            status=status,
            solver=SOLVER,
            unplanned_peak=unplanned_peak,
            unplanned_time=unplanned_time,
        )

    bound = problem.total_time
    if unplanned_peak <= budget:
        return plan(stored, Status.OPTIMAL)
    if budget < floor:
        return plan(stored, Status.INFEASIBLE)
    bound = recompute_bound(problem, budget)
    try:
        _search(search, room, start or stored)
    except KeyboardInterrupt:
        if limits.progress:
            limits.progress("interrupted: the best plan so far")
    found = search.fastest()
    if found is None:
        return plan(search.lowest(), Status.TIMED_OUT)
    time = sum(problem.ops[i].time for i in found)
    if time < bound:  # only another order can beat a bound for the stored one
        bound = problem.total_time
    return plan(found, Status.OPTIMAL if len(found) == len(stored) else Status.FEASIBLE)


def _search(search: Search, room: int, start: Sequence[int]) -> None:
    n = len(search.problem.ops)
    total = search.problem.total_time
    moves = int(search.limits.work * 2_000_000)
    search.load(start, room)
    over = max(1, int(search.state[N, OVER]))
    price = np.array([0.05 * total / over])
    typical = total / n
    search.anneal(moves, 0.5 * typical, 0.005 * typical, price)


def minimise_peak(problem: Problem, *, limits: Limits = DEFAULT, start: Sequence[int] | None = None) -> Plan:
    """The sequence with the smallest peak found, whatever its time."""
    search = Search(problem, limits)
    stored = tuple(range(len(problem.ops)))
    floor = peak_bound(problem)
    total = search.load(stored, 0)
    unplanned = search.peak + problem.resident_bytes
    if unplanned > floor:
        try:
            _lower(search, floor - problem.resident_bytes, start or stored)
        except KeyboardInterrupt:
            if limits.progress:
                limits.progress("interrupted: the lowest plan so far")
    found = search.lowest() if search.best.low[0] else stored
    time = search.load(found, 0)
    peak = search.peak + problem.resident_bytes
    return Plan(
        sequence=found,
        budget=None,
        peak=peak,
        time=time,
        bound=problem.total_time,
        peak_bound=floor,
        status=Status.OPTIMAL if peak <= floor else Status.FEASIBLE,
        solver=SOLVER,
        unplanned_peak=unplanned,
        unplanned_time=total,
    )


def _lower(search: Search, floor: int, start: Sequence[int]) -> None:
    """Anneal against a budget that stays a little below the lowest peak found."""
    rounds = 24
    typical = search.problem.total_time / len(search.problem.ops)
    sequence: Sequence[int] = start
    for k in range(rounds):
        search.load(sequence, 0)
        peak = min(search.peak, int(search.best.low[1]))
        if peak <= floor or clock.monotonic() > search.deadline:
            return
        target = max(floor, peak - max(1, int((peak - floor) * 0.5 ** (1 + k / 4))))
        over_price = np.array([typical / max(1, peak - target)])
        search.load(sequence, target)
        search.anneal(int(search.limits.work * 2_000_000 / rounds), typical, 0.05 * typical, over_price)
        sequence = search.lowest()

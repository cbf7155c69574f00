"""An integer program that weighs recomputation and offload at once, and bounds the time of both.

The relaxation of Checkmate's program (Jain et al., MLSys 2020) to a few positions t_1 < … < t_K of the stored order, at
each of which the budget must hold, with a third state beside present and lost: away on a tier. What is away at t_k was
copied out between its making and t_k, and comes back between t_k and its next use; a tier's engine moves no more in
such a window than the window is long, runs again and waits in it included (the energy argument of unary resources).
"""

from __future__ import annotations

import time as clock
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from memplan.problem import Phase, Problem

NODES = 30  # most of the proof is there at the root
WINDOWS = 12  # of each engine at each position: rows that say nearly the same cost time and prove little
LARGEST = 150_000  # columns of a program
TOLERANCE = 1e-6  # the tolerance to which HiGHS keeps constraints


@dataclass(frozen=True)
class Decision:
    """What the program proved, and what its solution holds at its positions."""

    bound: float  # time that no plan with first runs in stored order can go below; inf: there is none
    present: tuple[frozenset[int], ...] | None = None  # per position the buffers on the device
    away: tuple[dict[int, int], ...] = ()  # per position the buffers that come back, and the tier each comes from


class Program:
    """Rows ``Σ factor · variable ≤ limit``. Blocks of columns, one of each for each position or interval k:

    p[b, k]: buffer b is on the device at position k. x[b, k, j]: it is away on tier j there, and comes back from it.
    y[i, k]: op i runs again in the interval that ends at position k (the last one ends with the step).
    z[k]: what else that interval takes longer: waits for transfers above all. e[k]: by how much it is longer in all.
    """

    def __init__(self, problem: Problem, at: list[int], again: bool = True) -> None:
        self.problem, self.at, self.again = problem, at, again
        self.buffers, self.ops, self.tiers = len(problem.buffers), len(problem.ops), len(problem.tiers)
        width = columns(problem, len(at))
        self.block = width // (len(at) + 1)
        self.cost, self.low, self.high = np.zeros(width), np.zeros(width), np.zeros(width)
        self.whole = np.ones(width)
        self.lines: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []
        self.limits: list[float] = []
        self.unit = max(problem.total_time, 1e-9)
        self.until = [0.0, *accumulate(op.time for op in problem.ops)]  # until[i]: time of the ops before i
        self.begin = next((t for t, op in enumerate(problem.ops) if op.phase != Phase.FORWARD), self.ops)
        self.held = {b for b in problem.forward_outputs if problem.writer[b] >= 0 and self.begin < self.ops}
        self.live = [b for b, w in enumerate(problem.writer) if w >= 0 or problem.buffers[b].home]
        self.uses = problem.readers
        followers = {i: u for u in reversed(range(self.ops)) for i in problem.ops[u].after_all}
        self.last = [followers.get(i, self.ops) for i in range(self.ops)]  # the op before which all runs of op i come

    def p(self, b: int, k: int) -> int:
        return k * self.block + b

    def x(self, b: int, k: int, j: int) -> int:
        return k * self.block + self.buffers * (1 + j) + b

    def y(self, i: int, k: int) -> int:
        return k * self.block + self.buffers * (1 + self.tiers) + i

    def z(self, k: int) -> int:
        return (k + 1) * self.block - 2

    def e(self, k: int) -> int:
        return (k + 1) * self.block - 1

    def row(self, limit: float, *terms: tuple[float, int]) -> None:
        for factor, column in terms:
            self.lines.append(len(self.limits))
            self.columns.append(column)
            self.values.append(factor)
        self.limits.append(limit)

    def needs(self, b: int, k: int, limit: float, *terms: tuple[float, int]) -> None:
        """A row ``terms ≤ limit + [b is at hand in interval k]``: held, brought back, or made again."""
        there = [(-1.0, self.p(b, k - 1)), *((-1.0, self.x(b, k - 1, j)) for j in range(self.tiers))] if k else []
        writer = self.problem.writer[b]
        again = [(-1.0, self.y(writer, k))] if writer >= 0 else []
        self.row(limit, *terms, *there, *again)

    def interval(self, k: int) -> None:
        """What happens after position k - 1, up to position k."""
        ops, writer, n = self.problem.ops, self.problem.writer, self.ops
        first = self.at[k - 1] + 1 if k else 0  # first runs of this interval
        stop = self.at[k] + 1 if k < len(self.at) else n
        self.high[self.z(k)] = self.high[self.e(k)] = np.inf
        self.whole[self.z(k)] = self.whole[self.e(k)] = 0.0
        self.cost[self.z(k)] = 1.0
        longer = [(-op.time / self.unit, self.y(i, k)) for i, op in enumerate(ops[:first]) if not op.once]
        self.row(0.0, (1.0 / self.unit, self.e(k)), (-1.0 / self.unit, self.z(k)), *longer)
        for i in range(min(first, n)):
            if self.again and not ops[i].once and self.last[i] >= first:
                self.high[self.y(i, k)] = 1.0
                self.cost[self.y(i, k)] = ops[i].time
                for b in self.problem.operands[i]:
                    self.needs(b, k, 0.0, (1.0, self.y(i, k)))
        needed = {b for i in range(first, stop) for b in self.problem.operands[i] if writer[b] < first}
        if k:
            needed |= {b for i in range(first, stop) for b in ops[i].reads if self.problem.buffers[b].home}
        if k == len(self.at):
            needed |= {b for b in self.problem.outputs if 0 <= writer[b] < first}
        for b in needed:
            self.needs(b, k, -1.0)
        if k < len(self.at):
            for b in self.live:
                if 0 <= writer[b] < first:
                    self.needs(b, k, 0.0, (1.0, self.p(b, k)), *((1.0, self.x(b, k, j)) for j in range(self.tiers)))
                elif writer[b] < 0 and k:
                    self.needs(b, k, 0.0, (1.0, self.p(b, k)))

    def position(self, k: int, room: int) -> None:
        """The budget at position k; the running op's operands and results are there."""
        t = self.at[k]
        op, problem = self.problem.ops[t], self.problem
        used = {*op.reads, *op.writes} | (self.held if t >= self.begin else set()) | problem.given
        unit = max(1, room)
        terms = []
        for b in self.live:
            if problem.writer[b] > t:
                continue
            self.high[self.p(b, k)], self.low[self.p(b, k)] = 1.0, float(b in used)
            terms.append((problem.buffers[b].size / unit, self.p(b, k)))
            if b not in used:
                for j in range(self.tiers):
                    self.high[self.x(b, k, j)] = 1.0
                self.row(1.0, (1.0, self.p(b, k)), *((1.0, self.x(b, k, j)) for j in range(self.tiers)))
        self.row((room - op.workspace) / unit, *terms)

    def next_use(self, b: int, t: int) -> int:
        """The first op in stored order after position t that reads b for its first run; without one the end."""
        return next((use for use in self.uses[b] if use > t), self.ops)

    def engines(self, k: int) -> None:
        """What is away at position k crossed in time, and will."""
        problem, t = self.problem, self.at[k]
        unit = self.unit
        for j, tier in enumerate(problem.tiers):
            out, back = [], []
            for b in self.live:
                if problem.writer[b] > t or not self.high[self.x(b, k, j)]:
                    continue
                size = problem.buffers[b].size
                if problem.writer[b] >= 0:
                    out.append((problem.writer[b], (tier.latency + size / tier.write) / unit, self.x(b, k, j)))
                back.append((self.next_use(b, t), (tier.latency + size / tier.read) / unit, self.x(b, k, j)))
            for since in _quantiles(sorted({w for w, _, _ in out})):
                terms = [(share, column) for w, share, column in out if w >= since]
                self.window(terms, since + 1, t)
            for until in _quantiles(sorted({use for use, _, _ in back})):
                terms = [(share, column) for use, share, column in back if use <= until]
                self.window(terms, t + 1, until)

    def window(self, terms: list[tuple[float, int]], since: int, until: int) -> None:
        """An engine is busy for ``terms``, in units of the step's time, between the start of op ``since`` and that of op ``until``."""
        spare = []
        for k in range(len(self.at) + 1):
            first = self.at[k - 1] + 1 if k else 0
            stop = self.at[k] + 1 if k < len(self.at) else self.ops + 1
            if first <= until and since < stop:  # an interval that overlaps the window
                spare.append((-1.0 / self.unit, self.e(k)))
        self.row((self.until[until] - self.until[min(since, until)]) / self.unit, *terms, *spare)

    def homes(self) -> None:
        """What lies at home when the step begins crosses before its first use."""
        problem, unit = self.problem, self.unit
        for tier in problem.tiers:
            back = [
                (self.uses[b][0], (tier.latency + problem.buffers[b].size / tier.read) / unit)
                for b in problem.homed
                if problem.buffers[b].home == tier.name and self.uses[b]
            ]
            for until in _quantiles(sorted({use for use, _ in back})):
                busy = sum(share for use, share in back if use <= until)
                before = len(self.limits)
                self.window([], 0, until)
                self.limits[before] -= busy

    def solve(self, room: int, nodes: int, seconds: float) -> Decision:
        """The program's bound and, unless ``seconds`` cut it off, its solution."""
        for k in range(len(self.at) + 1):
            self.interval(k)
        for k in range(len(self.at)):
            self.position(k, room)
        for k in range(len(self.at)):
            self.engines(k)
        self.homes()
        shape = (len(self.limits), len(self.cost))
        matrix = coo_array((self.values, (self.lines, self.columns)), shape=shape).tocsr()
        began = clock.monotonic()
        result = milp(
            self.cost,
            constraints=LinearConstraint(matrix, -np.inf, np.array(self.limits)),
            bounds=Bounds(self.low, self.high),
            integrality=self.whole,
            options={"time_limit": max(0.01, seconds), "node_limit": nodes},
        )
        if result.status == 2:
            return Decision(float("inf"))
        proven = result.mip_dual_bound
        bound = self.problem.total_time + (0.0 if proven is None else max(0.0, float(proven)) * (1 - TOLERANCE))
        cut_off = result.status == 1 and clock.monotonic() - began >= seconds
        if result.x is None or cut_off:
            return Decision(bound)
        return Decision(bound, *self._states(result.x))

    def _states(self, value: np.ndarray) -> tuple[tuple[frozenset[int], ...], tuple[dict[int, int], ...]]:
        stops = range(len(self.at))
        present = tuple(frozenset(b for b in self.live if value[self.p(b, k)] > 0.5) for k in stops)
        away = tuple(
            {b: j for b in self.live for j in range(self.tiers) if value[self.x(b, k, j)] > 0.5} for k in stops
        )
        return present, away


def columns(problem: Problem, positions: int) -> int:
    """How many columns the program of so many positions has."""
    return (len(problem.buffers) * (1 + len(problem.tiers)) + len(problem.ops) + 2) * (positions + 1)


def decide(
    problem: Problem, budget: int, at: list[int], *, again: bool = True, nodes: int = NODES, seconds: float = np.inf
) -> Decision:
    """Solve the program for ``budget`` bytes, resident buffers without a home included, at ascending positions.

    ``again``: ops may run again; ``nodes``: so often HiGHS may branch; ``seconds``: a solution that this cuts off is not
    used, so that plans repeat.
    """
    return Program(problem, at, again).solve(budget - problem.resident_bytes, nodes, seconds)


def _quantiles(values: list[int]) -> list[int]:
    """At most WINDOWS of the ascending values, the first and the last among them."""
    if len(values) <= WINDOWS:
        return values
    return [values[k * (len(values) - 1) // (WINDOWS - 1)] for k in range(WINDOWS)]

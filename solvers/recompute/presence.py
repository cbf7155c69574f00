"""A linear program that bounds the time of recomputation: what is present at some positions, what runs again between.

The relaxation of Checkmate's program (Jain et al., MLSys 2020) to a few positions t_1 < … < t_K of the stored order, at
each of which the budget must hold. It keeps what the knapsack over one position lacks: a buffer absent at several
positions pays for each return, and an op that runs again needs its operands, held or run again themselves.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from memplan.problem import Phase, Problem

REFINEMENTS = 6  # programs one after the other; each costs about as much as the ones before together
LARGEST = 150_000  # columns of a program: 10 s for HiGHS
SECONDS = 8.0  # the programs of training graphs take up to 2 s; those of dense random graphs may take minutes; more per 5,000 columns
NODES = 30  # most of the proof is there at the root: more nodes changed no bound of the public graphs by 0.01 %


@dataclass(frozen=True)
class Presence:
    """What the program proved, and the sequence its solution suggests (its peak may be over the budget)."""

    bound: float  # time that no plan with first runs in stored order can go below; inf: there is none
    sequence: tuple[int, ...] | None


def presence(problem: Problem, budget: int, at: list[int], nodes: int = NODES, seconds: float = SECONDS) -> Presence:
    """Solve the program for ``budget`` bytes, resident buffers included, kept at the ascending positions ``at``.

    ``nodes`` above 0: variables are whole, and HiGHS may branch so often; what it has proven by then counts. Whole
    variables bound far better: on the public residual network at half its memory 12.2 % against 9.6 %. ``seconds`` is
    a stop for graphs that HiGHS finds hard; a solution cut off by it is not used, so that plans repeat.
    """
    room = budget - problem.resident_bytes
    rows = _Rows(problem, at)
    for k in range(len(at) + 1):
        rows.interval(k)
    for k in range(len(at)):
        rows.position(k, room)
    shape = (len(rows.limits), len(rows.cost))
    began = clock.monotonic()
    result = milp(
        rows.cost,
        constraints=LinearConstraint(
            coo_array((rows.values, (rows.lines, rows.columns)), shape=shape).tocsr(), -np.inf, np.array(rows.limits)
        ),
        bounds=Bounds(rows.low, rows.high),
        integrality=np.full(len(rows.cost), int(nodes > 0)),
        options={"time_limit": max(0.01, seconds)} | ({"node_limit": nodes} if nodes > 0 else {}),
    )
    if result.status == 2:
        return Presence(float("inf"), None)
    cut_off = result.status == 1 and clock.monotonic() - began >= seconds
    proven = result.mip_dual_bound if nodes > 0 else result.fun
    # 1e-6: the tolerance to which HiGHS keeps constraints.
    bound = problem.total_time + (0.0 if proven is None else max(0.0, float(proven)) * (1 - 1e-6))
    return Presence(bound, None if result.x is None or cut_off else _sequence(problem, at, rows, result.x))


def _sequence(problem: Problem, at: list[int], rows: _Rows, x: np.ndarray) -> tuple[int, ...]:
    """First runs in stored order; what was let go at a position runs again, with what it lacks, before its next use."""
    ops, writer = problem.ops, problem.writer
    here: set[int] = set()
    sequence: list[int] = []
    stops = {t: k for k, t in enumerate(at)}
    for t in range(len(ops)):
        wanted, missing = [t], []
        while wanted:  # an op waits on the stack until its operands have been run again
            i = wanted[-1]
            missing = [b for b in problem.operands[i] if b not in here and not ops[writer[b]].once]
            if missing:
                wanted.append(writer[missing[0]])
                continue
            wanted.pop()
            if i == t or not set(ops[i].writes) <= here:
                sequence.append(i)
                here.update(ops[i].writes)
        if t in stops:
            here = {b for b in here if x[rows.present(b, stops[t])] > 0.5 or ops[writer[b]].once}
    lost = [b for b in problem.outputs if writer[b] >= 0 and b not in here and b not in rows.held]
    return (*sequence, *_rebuild(problem, lost, here))


def _rebuild(problem: Problem, lost: list[int], here: set[int]) -> list[int]:
    """The runs, in order, that make the lost buffers again from those that are here."""
    again: set[int] = set()
    wanted = [problem.writer[b] for b in lost]
    while wanted:
        i = wanted.pop()
        if i not in again:
            again.add(i)
            wanted += [problem.writer[b] for b in problem.operands[i] if b not in here]
    return sorted(again)


def _loads(problem: Problem) -> list[int]:
    """Bytes beyond the resident ones at every position of the stored order."""
    n = len(problem.ops)
    change = [0] * (n + 1)
    for b, w in enumerate(problem.writer):
        if w >= 0:
            change[w] += problem.buffers[b].size
            last = n - 1 if b in problem.outputs else max((w, *problem.readers[b]))
            change[last + 1] -= problem.buffers[b].size
    loads, held = [], 0
    for t in range(n):
        held += change[t]
        loads.append(held + problem.ops[t].workspace)
    return loads


def tightest(problem: Problem, budget: int, count: int) -> list[int]:
    """The positions over the budget in ``count`` runs of equal length, of each run the one with the largest load."""
    loads = _loads(problem)
    over = [t for t, load in enumerate(loads) if load + problem.resident_bytes > budget]
    parts = [over[len(over) * k // count : len(over) * (k + 1) // count] for k in range(count)]
    return [max(part, key=lambda t: loads[t]) for part in parts if part]


def refine(
    problem: Problem, budget: int, weigh: Callable[[tuple[int, ...]], Sequence[int]], deadline: float = float("inf")
) -> Presence:
    """Programs of growing exactness: each also keeps the budget where the last one's sequence broke it most.

    ``weigh``: the loads of a sequence, without the resident bytes; ``deadline``: of time.monotonic(). Returns the best bound with the sequence of the
    lowest peak; where that peak is within the budget the sequence is optimal among those with first runs in stored order.
    """
    room = budget - problem.resident_bytes
    at = tightest(problem, budget, 1)
    best = Presence(problem.total_time, None)
    lowest: float = float("inf")
    columns = len(problem.ops) + len(problem.buffers)
    for _ in range(REFINEMENTS):
        if not at or columns * (len(at) + 1) > LARGEST or clock.monotonic() > deadline:
            break
        found = presence(
            problem, budget, at, seconds=min(SECONDS * max(1, columns / 5000), deadline - clock.monotonic())
        )
        best = replace(best, bound=max(best.bound, found.bound))
        if found.sequence is None:
            break
        loads = weigh(found.sequence)
        if max(loads) < lowest:
            lowest, best = max(loads), replace(best, sequence=found.sequence)
        if max(loads) <= room:
            break
        at = sorted({*at, *_worst(found.sequence, loads, room, set(at))})
    return best


def _worst(sequence: tuple[int, ...], loads: Sequence[int], room: int, known: set[int]) -> list[int]:
    """The stored positions, two at most, during whose stages the loads are furthest over ``room``."""
    stage, over = 0, dict[int, int]()
    for t, i in enumerate(sequence):
        stage = max(stage, i)
        if loads[t] > room and stage not in known:
            over[stage] = max(over.get(stage, 0), loads[t] - room)
    return sorted(over, key=lambda t: (-over[t], t))[:2]


class _Rows:
    """Rows ``Σ factor · variable ≤ limit``. Variables: p[b, k], b is present at position k; y[i, k], op i runs again in
    the interval that ends there. Both are laid out as one block of buffers and ops a position.
    """

    def __init__(self, problem: Problem, at: list[int]) -> None:
        self.problem, self.at = problem, at
        self.buffers, self.ops = len(problem.buffers), len(problem.ops)
        self.width = (self.buffers + self.ops) * (len(at) + 1) // 2 + 1
        self.cost = np.zeros(2 * self.width)
        self.high = np.zeros(2 * self.width)
        self.low = np.zeros(2 * self.width)
        self.lines: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []
        self.limits: list[float] = []
        begin = next((t for t, op in enumerate(problem.ops) if op.phase != Phase.FORWARD), self.ops)
        self.begin = begin
        self.held = {b for b in problem.forward_outputs if problem.writer[b] >= 0 and begin < self.ops}

    def present(self, b: int, k: int) -> int:
        return k * (self.buffers + self.ops) + b

    def again(self, i: int, k: int) -> int:
        return k * (self.buffers + self.ops) + self.buffers + i

    def row(self, limit: float, *terms: tuple[float, int]) -> None:
        for factor, column in terms:
            self.lines.append(len(self.limits))
            self.columns.append(column)
            self.values.append(factor)
        self.limits.append(limit)

    def interval(self, k: int) -> None:
        """What happens after position k - 1, up to position k."""
        ops, writer, n = self.problem.ops, self.problem.writer, self.ops
        first = self.at[k - 1] + 1 if k else 0  # first runs of this interval
        stop = self.at[k] + 1 if k < len(self.at) else n
        for i in range(min(stop, n)):
            if not ops[i].once and i < first:
                self.high[self.again(i, k)] = 1.0
                self.cost[self.again(i, k)] = ops[i].time
                for u in self.problem.operands[i]:
                    self.back(k, writer[u], u, self.again(i, k))
        needed = {u for i in range(first, stop) for u in self.problem.operands[i] if writer[u] < first}
        if stop == n and k == len(self.at):
            needed |= {b for b in self.problem.outputs if 0 <= writer[b] < first}
        for u in needed:
            self.row(-1.0, (-1.0, self.present(u, k - 1)), (-1.0, self.again(writer[u], k)))
        if k < len(self.at):
            for b, w in enumerate(writer):
                if 0 <= w < first:
                    self.back(k, w, b, self.present(b, k))

    def back(self, k: int, w: int, b: int, variable: int) -> None:
        """``variable`` needs b of op w: there at position k - 1, or made again since."""
        self.row(0.0, (1.0, variable), (-1.0, self.present(b, k - 1)), (-1.0, self.again(w, k)))

    def position(self, k: int, room: int) -> None:
        """The budget at position k, in units of itself; the running op's operands and results are there."""
        t = self.at[k]
        op, writer = self.problem.ops[t], self.problem.writer
        used = {*self.problem.operands[t], *op.writes} | (self.held if t >= self.begin else set())
        unit = max(1, room)
        terms = []
        for b in range(self.buffers):
            if 0 <= writer[b] <= t:
                self.high[self.present(b, k)] = 1.0
                self.low[self.present(b, k)] = float(b in used)
                terms.append((self.problem.buffers[b].size / unit, self.present(b, k)))
        self.row((room - op.workspace) / unit, *terms)

"""An integer program that bounds the time of recomputation: what is present at some positions, what runs again between.

The relaxation of Checkmate's program (Jain et al., MLSys 2020) to a few positions t_1 < … < t_K of the stored order, at
each of which the budget must hold. It keeps what the knapsack over one position lacks: a buffer absent at several
positions pays for each return, and an op that runs again needs its operands, held or run again themselves.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from memplan.problem import Phase, Problem
from memplan.solvers.recompute.engines import COST, Rows, by_cp_sat, by_highs

REFINEMENTS = 10  # programs one after the other; each costs about as much as the ones before together
LARGEST = 150_000  # columns of a program
WORK = 1.0  # for all programs together, in CP-SAT's deterministic seconds, which are about real ones
# From so many ops on HiGHS solves the programs. With layers that repeat and so solutions that differ by which layer pays,
# the last thousandths of the added time take it ten times as long as the rest: its programs may leave them, and have so
# long together for 5,000 ops and buffers.
LARGE, TOLERANCE, EXACT, TOGETHER = 1000, 3e-3, 1e-4, 4.0


@dataclass(frozen=True)
class Presence:
    """What the program proved, and the sequence its solution suggests (its peak may be over the budget)."""

    bound: float  # time that no plan with first runs in stored order can go below; inf: there is none
    sequence: tuple[int, ...] | None
    work: float = 0.0  # that it took, in CP-SAT's deterministic seconds


def presence(
    problem: Problem,
    budget: int,
    at: list[int],
    work: float = WORK,
    seconds: float = float("inf"),
    before: Sequence[int] | None = None,
    tolerance: float = EXACT,
) -> Presence:
    """Solve the program for ``budget`` bytes, resident buffers included, kept when the ops ``at`` run first.

    ``before``: for each op those that run no later, itself included, as bits; ``at`` must be a chain of it. Without it
    the first runs stand in stored order.

    Whole variables bound far better than fractions: on the public residual network at half its memory 12.2 % against
    9.6 %. ``work``: what CP-SAT may spend, in its deterministic seconds; ``seconds``: a solution cut off by the clock is
    not used, so that plans repeat. ``tolerance``: of the added time, how far the solution may be from the bound.
    """
    program = _Program(problem, at, before or stored_order(problem))
    for k in range(len(at)):
        program.position(k, budget - problem.resident_bytes)
    if len(problem.ops) > LARGE:
        answer = by_highs(program, seconds, tolerance)
    else:
        answer = by_cp_sat(program, work, seconds, tolerance)
    bound = problem.total_time + answer.bound * program.unit
    sequence = None if answer.chosen is None else _sequence(problem, at, program, answer.chosen)
    return Presence(bound, sequence, answer.work)


def _sequence(problem: Problem, at: list[int], program: _Program, chosen: frozenset[int]) -> tuple[int, ...]:
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
            here = {b for b in here if program.present(b, stops[t]) in chosen or ops[writer[b]].once}
    lost = [b for b in problem.outputs if writer[b] >= 0 and b not in here and b not in program.held]
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


def stored_order(problem: Problem) -> list[int]:
    """For each op, as bits, the ops up to it in the stored order."""
    return [(2 << i) - 1 for i in range(len(problem.ops))]


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
    problem: Problem,
    budget: int,
    weigh: Callable[[tuple[int, ...]], Sequence[int]],
    deadline: float = float("inf"),
    work: float = WORK,
) -> Presence:
    """Programs of growing exactness: each also keeps the budget where the last one's sequence broke it most.

    ``weigh``: the loads of a sequence, without the resident bytes; ``deadline``: of time.monotonic(); ``work``: of all
    programs. Returns the best bound with the sequence of the lowest peak; where that peak
    is within the budget the sequence is optimal among those with first runs in stored order.
    """
    room = budget - problem.resident_bytes
    at = tightest(problem, budget, 1)
    best = Presence(problem.total_time, None)
    lowest: float = float("inf")
    columns = len(problem.ops) + len(problem.buffers)
    large = len(problem.ops) > LARGE
    tolerance, together = (TOLERANCE, TOGETHER * max(1, columns / 5000)) if large else (EXACT, float("inf"))
    deadline = min(deadline, clock.monotonic() + together)
    for _ in range(REFINEMENTS):
        seconds = deadline - clock.monotonic()
        if not at or columns * (len(at) + 1) > LARGEST or seconds <= 0 or best.work >= work:
            break
        found = presence(problem, budget, at, work=work - best.work, seconds=seconds, tolerance=tolerance)
        rose = found.bound > best.bound * (1 + 1e-9)
        best = replace(best, bound=max(best.bound, found.bound), work=best.work + found.work)
        if found.sequence is None:
            break
        loads = weigh(found.sequence)
        if max(loads) < lowest:
            lowest, best = max(loads), replace(best, sequence=found.sequence)
        elif not rose:
            break  # it left its nodes before it was as far as the one before: the next would be slower still
        if max(loads) <= room:
            break
        more = _worst(found.sequence, loads, room, set(at))
        if not more:
            break
        at = sorted({*at, *more})
    return best


def _worst(sequence: tuple[int, ...], loads: Sequence[int], room: int, known: set[int]) -> list[int]:
    """The stored positions, two at most, in or before whose stages the loads are furthest over ``room``.

    Before: what runs again in the stage of a known position may be over the budget, for which the one before may help.
    """
    stage, over = 0, dict[int, int]()
    for t, i in enumerate(sequence):
        stage = max(stage, i)
        at = stage - 1 if stage in known else stage
        if loads[t] > room and at >= 0 and at not in known:
            over[at] = max(over.get(at, 0), loads[t] - room)
    return sorted(over, key=lambda t: (-over[t], t))[:2]


class _Program(Rows):
    """One block of columns a position k, the end of interval k.

    Variables: p[b, k], b is present at position k; y[i, k], op i runs again in interval k, having run before it;
    x[i, k], op i has run by position k. x is known where ``before`` tells it: then it is one of the first two columns.
    """

    ZERO, ONE = 0, 1

    def __init__(self, problem: Problem, at: list[int], before: Sequence[int]) -> None:
        super().__init__()
        self.problem, self.at, self.before = problem, at, before
        self.buffers, self.ops, self.last = len(problem.buffers), len(problem.ops), len(at)
        self.unit = max(problem.total_time, 1e-9) / COST
        self.ones.add(self.ONE)
        backward = any(op.phase != Phase.FORWARD for op in problem.ops)
        self.held = {b for b in problem.forward_outputs if problem.writer[b] >= 0 and backward}
        for k in range(self.last + 1):
            self.interval(k)
        for i in range(self.ops):
            self.first_run(i)
        for b in problem.outputs:
            if problem.writer[b] >= 0:
                self.row((1, self.ran(problem.writer[b], self.last - 1)), *self.had(b, self.last, self.last))

    def present(self, b: int, k: int) -> int:
        return 2 + k * (self.buffers + 2 * self.ops) + b if k >= 0 else self.ZERO

    def again(self, i: int, k: int) -> int:
        return 2 + k * (self.buffers + 2 * self.ops) + self.buffers + i

    def ran(self, i: int, k: int) -> int:
        """The column of x[i, k]."""
        if k < 0:
            return self.ZERO
        if k >= self.last or self.before[self.at[k]] >> i & 1:
            return self.ONE
        if self.before[i] >> self.at[k] & 1:
            return self.ZERO
        return 2 + k * (self.buffers + 2 * self.ops) + self.buffers + self.ops + i

    def row(self, *terms: tuple[int, int], limit: int = 0) -> None:
        self.rows.append((limit, [term for term in terms if term[1] != self.ZERO]))

    def had(self, b: int, low: int, high: int) -> list[tuple[int, int]]:
        """Minus: b is present at position ``low`` - 1 or made again in an interval from ``low`` to ``high``."""
        w = self.problem.writer[b]
        return [(-1, self.present(b, low - 1)), *((-1, self.again(w, k)) for k in range(low, high + 1))]

    def interval(self, k: int) -> None:
        """What may be there at position k, from what was there at the position before."""
        for i, op in enumerate(self.problem.ops):
            then, now = self.ran(i, k - 1), self.ran(i, k)
            if then != self.ZERO and not op.once:
                self.free.add(self.again(i, k))
                self.cost[self.again(i, k)] = int(op.time / self.unit)
                for u in self.problem.operands[i]:
                    self.row((1, self.again(i, k)), *self.had(u, k, k))
            if k == self.last or now == self.ZERO:
                continue
            if then != now:
                if now != self.ONE:
                    self.unknown(i, k)
                continue  # its first run may be in this interval
            for b in op.writes:
                self.row((1, self.present(b, k)), *self.had(b, k, k))

    def unknown(self, i: int, k: int) -> None:
        """Whether op i has run by position k is for the program to say: not before its operands, and for good."""
        self.free.add(self.ran(i, k))
        self.row((-1, self.ran(i, k)), (1, self.ran(i, k - 1)))
        for j in {
            *(self.problem.writer[u] for u in self.problem.operands[i]),
            *self.problem.ops[i].after,
            *self.problem.ops[i].after_all,
        }:
            if self.ran(j, k) != self.ONE:
                self.row((1, self.ran(i, k)), (-1, self.ran(j, k)))
        for b in self.problem.ops[i].writes:
            first = ((-1, self.ran(i, k)), (1, self.ran(i, k - 1)))
            self.row((1, self.present(b, k)), *first, *self.had(b, k, k))

    def first_run(self, i: int) -> None:
        """Op i runs first in one of the intervals ``low`` to ``high``; its operands are there then."""
        low = next((k for k in range(self.last, 0, -1) if self.ran(i, k - 1) == self.ZERO), 0)
        high = next((k for k in range(low, self.last) if self.ran(i, k) == self.ONE), self.last)
        for k in range(max(1, low), high + 1):
            for u in self.problem.operands[i]:
                made = self.ran(self.problem.writer[u], k - 1)
                if made != self.ZERO:  # its writer has run by position k - 1 and op i has not: it is used later
                    self.row((1, made), (-1, self.ran(i, k - 1)), *self.had(u, k, high))

    def position(self, k: int, room: int) -> None:
        """The budget at position k, in bytes; the running op's operands and results are there."""
        op, writer = self.problem.ops[self.at[k]], self.problem.writer
        used = {*self.problem.operands[self.at[k]], *op.writes} | (self.held if op.phase != Phase.FORWARD else set())
        terms = []
        for b in range(self.buffers):
            if writer[b] >= 0 and self.ran(writer[b], k) != self.ZERO:
                (self.ones if b in used else self.free).add(self.present(b, k))
                terms.append((self.problem.buffers[b].size, self.present(b, k)))
        self.row(*terms, limit=room - op.workspace)

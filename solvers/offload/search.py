"""The state of a joint search, and its rounds."""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from memplan.outcome import Limits
from memplan.plans import Offload
from memplan.problem import Problem
from memplan.solvers.offload.anneal import anneal, new_best, record
from memplan.solvers.offload.arrays import COUNT, WIDTH, pack
from memplan.solvers.offload.engines import (
    AHEAD,
    FROM,
    LOAD,
    NUMBERS,
    OVER,
    RELEASE,
    TIER,
    evaluate,
    new_slots,
    new_view,
)
from memplan.solvers.offload.moves import (
    AGAIN,
    BUDGET,
    FREE_RUNS,
    LENGTH,
    MIX,
    N_FREE,
    OP,
    RUNS,
    STATE_ROWS,
    TRIAL,
    TRIAL_LENGTH,
    N,
)

PROGRAM = 20.0  # seconds; programs of the public graphs take up to 3; what is cut off makes plans differ
CHUNK = 1000  # moves between two looks at the clock
FIRST_PRICE = 0.05  # all bytes over the budget of the first sequence together cost this share of the total time
LEAST_PRICE = 1e-3  # of the first price: where nothing costs time, the price must not fall to nothing


def default_moves(ops: int) -> int:
    """Moves of a round at work 1: 1.5 s at 400 ops, 2 s at 3,000, as a move takes 45 ns an op."""
    return max(2000, min(100_000, 40_000_000 // max(1, ops)))


class Search:
    """The state of a search on one problem, and the best it has met."""

    def __init__(self, problem: Problem, limits: Limits, deadline: float) -> None:
        self.problem, self.limits = problem, limits
        self.moves = int(limits.work * default_moves(len(problem.ops)))
        self.graph = pack(problem)
        self.capacity = 4 * len(problem.ops) + 64
        self.slots = new_slots(self.graph, self.capacity)
        view, times = new_view(self.graph, self.capacity)
        self.views, self.times = np.array([view, view]), np.array([times, times])
        self.state = np.zeros((STATE_ROWS, max(self.capacity, 64) + 2), np.int64)
        self.now = np.zeros(1, np.int64)
        self.random = np.array([1 + (limits.seed * 7919 + 12345) % 2147483646], np.int64)
        self.deadline = deadline  # of time.monotonic()
        self.best = new_best(self.capacity, view.shape[1])
        self.time = 0.0
        self.typical = max(problem.total_time, 1e-9) / max(1, len(problem.ops))
        self.reads = [
            [b for b in dict.fromkeys(op.reads) if problem.writer[b] >= 0 or problem.buffers[b].home]
            for op in problem.ops
        ]
        self.tiers = [tier.name for tier in problem.tiers]

    def load(self, sequence: Sequence[int], offloads: Sequence[Offload], budget: int, mix: bool) -> None:
        """Make a sequence with its offloads the current one, under a budget that counts resident bytes."""
        s, length = self.state, len(sequence)
        s[:] = 0
        s[RUNS, :length] = s[TRIAL, :length] = np.arange(length)
        s[OP, :length] = sequence
        ran: set[int] = set()
        for p, i in enumerate(sequence):
            s[AGAIN, p] = i in ran
            ran.add(i)
        free = np.arange(self.capacity - 1, length - 1, -1)
        s[FREE_RUNS, : len(free)] = free
        s[N, LENGTH], s[N, TRIAL_LENGTH], s[N, N_FREE] = length, length, len(free)
        s[N, BUDGET], s[N, MIX] = budget - self.problem.resident_bytes, int(mix)
        self._load_slots(sequence, offloads)
        self.now[0] = 0
        self.time = evaluate(
            self.graph, s[TRIAL], s[OP], length, self.slots, s[N, BUDGET], self.views[0], self.times[0]
        )
        record(s, self.views[0], self.time, self.best)

    def fit(self, sequence: Sequence[int], offloads: Sequence[Offload], budget: int, mix: bool) -> None:
        """Load a sequence with its offloads, each copy on the device no longer than the budget allows: where all absences
        as long as can be keep it, so does what is loaded."""
        self.load(
            sequence, [replace(stay, out_until=stay.out_from, in_from=stay.in_until) for stay in offloads], budget, mix
        )
        loads = self.views[0][LOAD, : len(sequence) + 1].copy()
        room, size = budget - self.problem.resident_bytes, [buffer.size for buffer in self.problem.buffers]
        fitted = list(offloads)
        for n in sorted(range(len(fitted)), key=lambda n: fitted[n].out_from):
            stay = fitted[n]
            full = np.flatnonzero(loads[stay.out_from : stay.out_until] + size[stay.buffer] > room)
            until = stay.out_from + int(full[0]) if len(full) else stay.out_until
            loads[stay.out_from : until] += size[stay.buffer]
            fitted[n] = replace(stay, out_until=until)
        for n in sorted(range(len(fitted)), key=lambda n: fitted[n].in_until):
            stay = fitted[n]
            full = np.flatnonzero(loads[stay.in_from : stay.in_until] + size[stay.buffer] > room)
            since = stay.in_from + int(full[-1]) + 1 if len(full) else stay.in_from
            loads[since : stay.in_until] += size[stay.buffer]
            fitted[n] = replace(stay, in_from=since)
        self.load(sequence, fitted, budget, mix)

    def _load_slots(self, sequence: Sequence[int], offloads: Sequence[Offload]) -> None:
        width = int(self.graph.table[COUNT, WIDTH])
        self.slots[:] = 0
        self.slots[TIER] = -1
        ending = {(stay.buffer, stay.in_until): stay for stay in offloads}
        last: dict[int, int] = {}

        def set_slot(slot: int, b: int, p: int) -> None:
            stay = ending.get((b, p))
            if stay is not None:
                since = last.get(b, -1) + 1
                self.slots[TIER, slot] = self.tiers.index(stay.tier)
                self.slots[FROM, slot] = stay.out_from - since
                self.slots[RELEASE, slot] = stay.out_until - since
                self.slots[AHEAD, slot] = p - stay.in_from

        for p, i in enumerate(sequence):
            for k, b in enumerate(self.reads[i]):
                set_slot(p * width + k, b, p)
                last[b] = p
            last.update(dict.fromkeys(self.problem.ops[i].writes, p))
        behind = self.slots.shape[1] - len(self.problem.buffers)
        for b in range(len(self.problem.buffers)):
            set_slot(behind + b, b, len(sequence))

    @property
    def over(self) -> int:
        """Bytes over the budget and the capacities, summed over positions."""
        return int(self.views[self.now[0]][NUMBERS, OVER])

    def anneal(self, steps: int, hot: float, cold: float, enough: float) -> None:
        """Anneal in chunks, temperatures in multiples of an op's mean time, until the best takes ``enough`` time."""
        chunks = max(1, steps // CHUNK)
        ratio = (cold / hot) ** (1 / chunks)
        over = self.over or self.problem.resident_bytes + 1
        first = FIRST_PRICE * max(self.problem.total_time, 1e-9) / over
        prices = np.array([first, first * LEAST_PRICE])
        hot *= self.typical
        for _ in range(chunks):
            if self.best.time[0] <= enough or clock.monotonic() > self.deadline:
                break
            self.time = anneal(
                self.graph,
                self.state,
                self.slots,
                self.views,
                self.times,
                self.now,
                self.best,
                self.time,
                CHUNK,
                hot,
                hot * ratio,
                prices,
                self.random,
            )
            hot *= ratio

    def out_of_time(self) -> bool:
        return clock.monotonic() > self.deadline

    def seconds_left(self) -> float:
        """Until the deadline, or PROGRAM, whichever comes first."""
        return min(PROGRAM, self.deadline - clock.monotonic())

    def rest_of_limits(self) -> Limits:
        """The same limits for a part of the search that begins now."""
        if self.limits.seconds is None:
            return self.limits
        return replace(self.limits, seconds=max(0.0, self.deadline - clock.monotonic()))

    def say(self, text: str) -> None:
        if self.limits.progress:
            self.limits.progress(text)

    def found(self) -> tuple[tuple[int, ...], tuple[Offload, ...]]:
        """The best sequence and its offloads."""
        runs, stays = (int(n) for n in self.best.count)
        rows = self.best.stays[:, :stays].T.tolist()
        return tuple(self.best.seq[:runs].tolist()), tuple(self._offload(*row) for row in rows)

    def _offload(self, buffer: int, made: int, gone: int, free: int, back: int, there: int, tier: int) -> Offload:
        return Offload(buffer, made, gone, free, back, there, self.tiers[tier])

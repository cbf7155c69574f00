"""The state of a search: annealing rounds over sequences of runs, and the best sequences they have met."""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np

from memplan.outcome import Limits
from memplan.problem import Problem
from memplan.solvers.recompute.anneal import anneal, new_best, new_work, record
from memplan.solvers.recompute.arrays import Graph, pack
from memplan.solvers.recompute.state import LENGTH, LOAD, OVER, N, new_state, reset

SOLVER = "recompute: sequence annealing"
DEFAULT = Limits()
CHUNK = 5_000  # moves between two looks at the clock: below 0.1 s at 3,000 ops
FIRST_PRICE = 0.05  # all bytes over the budget of the first sequence together cost this share of the total time


def default_moves(ops: int) -> int:
    """Moves of a solve at work 1. A move takes 1 µs + 3 ns an op, and ten times as long where little fits the budget."""
    return max(120 * ops, min(2_000_000, max(800_000, 600_000_000 // max(1, ops))))


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

    def offer(self, sequence: Sequence[int]) -> None:
        """Remember a valid sequence if it has the lowest peak so far."""
        self.load(sequence, 0)
        record(self.state, self.time, self.best)

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

    def rounds(
        self, sequence: Sequence[int] | None, room: int, each: Iterable[tuple[float, float, float]], patience: int
    ) -> None:
        """Rounds that all begin at ``sequence``, or each at the fastest so far, until ``patience`` in a row have found
        nothing better."""
        vain = 0
        for share, hot, cold in each:
            before, begin = self.best.time[0], sequence or self.fastest()
            if begin is None:
                return
            self.round(begin, room, share, hot, cold)
            vain = 0 if self.best.time[0] < before else vain + 1
            if vain == patience:
                return

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
        """Run ``mine`` on a second thread while ``other`` runs; the loops and CP-SAT let other threads run meanwhile."""
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

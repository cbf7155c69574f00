"""One component on its way to a placement, and the effort that its engines may spend."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Executor
from enum import IntEnum

import numpy as np

from memplan.outcome import Limits
from memplan.solvers.placement import branch
from memplan.solvers.placement.component import Component, Ints
from memplan.solvers.placement.exact import Search, ranking, ranks
from memplan.solvers.placement.fit import fit_in_order, fit_in_time

PARALLEL = 2  # searches side by side, on threads without the interpreter lock; part of what fixes a plan
DEFAULT_WORK = 1_500_000_000  # elementary steps at work = 1; 1e8 to 3e8 of them a second on one core
SLICE = 4_000_000  # elementary steps between two looks at the clock: 15 to 50 ms
MOST_FITTED = (
    5000  # buffers up to which all fits in order are tried; beyond, each takes longer than a tenth of a second
)
MOST_SCANNED = 300_000_000  # steps up to which the fit in time runs: about a second


class Outcome(IntEnum):
    """How a search ended."""

    SOLVED = branch.SOLVED
    REFUTED = branch.REFUTED
    PAUSED = branch.PAUSED


class Effort:
    """What is left of the limits; ``spent`` is true once a solve must end."""

    def __init__(self, limits: Limits, pool: Executor) -> None:
        self.pool = pool
        self.deadline = limits.deadline()
        self.work = limits.work * DEFAULT_WORK
        self.progress = limits.progress
        self.next_line = time.monotonic() + 1.0

    @property
    def spent(self) -> bool:
        return self.work <= 0 or time.monotonic() >= self.deadline

    def use(self, work: float, height: int, bound: int) -> None:
        """Count work; at most once a second say where the solve stands."""
        self.work -= work
        now = time.monotonic()
        if self.progress is not None and now >= self.next_line:
            self.next_line = now + 1.0
            self.progress(f"placement: height {height}, bound {bound}, effort left {max(0.0, self.work):.2g}")


class Task:
    """The best offsets of a component and its proven bound, both in units."""

    def __init__(self, component: Component, seed: int) -> None:
        self.component = component
        self.bound = component.bound
        self.off: Ints = np.cumsum(component.size) - component.size
        self.height = component.height(self.off)
        self.bytes = component.bytes_of(self.off)
        self.solver = "stack"
        self.rng = np.random.default_rng(seed)
        self.weight = np.zeros(component.sections)
        self.searches: list[Search] = []

    def offer(self, off: Ints, solver: str) -> None:
        """Keep offsets that take fewer bytes than the best."""
        taken = self.component.bytes_of(off)
        if taken < self.bytes:
            self.height, self.bytes, self.off, self.solver = self.component.height(off), taken, off.copy(), solver

    def fit(self, goal: int, effort: Effort) -> None:
        """Constructive fits until one reaches the goal; the first is linear and always runs."""
        c, n = self.component, len(self.component)
        if n == 1:
            return
        if np.dot(c.members, np.bincount(c.lo, minlength=c.sections)) < MOST_SCANNED:
            off = np.zeros(n, np.int64)
            fit_in_time(np.lexsort((-c.size, c.hi, c.lo)), c.lo, c.hi, c.size, off, np.zeros(n + 1, np.int64))
            self.offer(off, "fit in time")
        for name, order in fit_orders(c):
            for best in (True, False):
                if self.height <= goal or effort.spent:
                    return
                self._fit_in_order(order, best, f"{'best' if best else 'first'} fit by {name}", effort)
                if n > MOST_FITTED:
                    return

    def fit_around(self, placed: Ints, off: Ints, effort: Effort) -> None:
        """First fit of all other buffers around those ``placed``, whose offsets are ``off``."""
        _, order = next(fit_orders(self.component))
        rising = np.argsort(off, kind="stable")
        others = order[~np.isin(order, placed)]
        solver = "first fit around the large"
        self._fit_in_order(np.concatenate([placed[rising], others]), False, solver, effort, off[rising])

    def _fit_in_order(self, order: Ints, best: bool, solver: str, effort: Effort, first: Ints | None = None) -> None:
        """One constructive fit, in slices; given up when it cannot beat the best, or when the effort is spent.

        ``first`` are offsets in rising order for the first buffers of the order.
        """
        c, n = self.component, len(self.component)
        off, where, ends = np.zeros(n, np.int64), np.zeros((n, 3), np.int64), np.zeros(n, np.int64)
        begin = height = 0
        if first is not None:
            begin, here = len(first), order[: len(first)]
            off[here], ends[:begin] = first, first + c.size[here]
            where[:begin] = np.stack([c.lo[here], c.hi[here], first], axis=1)
            height = int(ends.max())
        while begin < n:
            end = min(n, begin + 1 + SLICE // (begin + 1000))
            height = fit_in_order(
                order, begin, end, best, self.height - 1, height, c.lo, c.hi, c.size, off, where, ends
            )
            effort.use((end - begin) * begin / 4, self.bytes, self.bound * c.unit)
            if height >= self.height or effort.spent:
                return
            begin = end
        self.offer(off, solver)

    def attempt(self, wanted: int, fails: int, turn: int, effort: Effort, late: Ints | None = None) -> Outcome:
        """Searches of up to ``fails`` failed nodes, side by side, for a height of at most ``wanted`` units.

        ``turn`` numbers the first one's ranking. ``late`` are latest offsets, when they are not those that the height
        implies. In every slice the first search with an answer wins, whichever thread was faster. A refutation raises
        the bound.
        """
        c = self.component
        if not self.searches:
            self.searches = [Search(c) for _ in range(PARALLEL)]
        for k, search in enumerate(self.searches):
            rank = ranks(c, ranking(turn + k), self.weight, self.rng)
            search.begin(wanted, wanted - c.size if late is None else late, rank)
        active = self.searches
        while active and not effort.spent:
            before = sum(search.work for search in self.searches)
            outcomes = list(effort.pool.map(lambda search: search.advance(SLICE, fails), active))
            effort.use(sum(s.work for s in self.searches) - before, self.bytes, self.bound * c.unit)
            for search, outcome in zip(active, outcomes, strict=True):
                if outcome == branch.SOLVED:
                    self.offer(search.off, "branch and bound")
                    return Outcome.SOLVED
                if outcome == branch.REFUTED and search.complete:
                    if late is None:
                        self.bound = max(self.bound, min(search.next_height, self.height))
                    return Outcome.REFUTED
            active = [
                search
                for search, outcome in zip(active, outcomes, strict=True)
                if outcome == branch.PAUSED and search.fails < fails
            ]
        for search in self.searches:
            self.weight = 0.8 * self.weight + search.weight / max(1.0, search.weight.sum())
        return Outcome.PAUSED


def fit_orders(c: Component) -> Iterator[tuple[str, Ints]]:
    """Orders for ``fit_in_order``, the best on average first."""
    yield "size and lifetime", np.lexsort((-c.length, -(np.sqrt(c.length) * c.size)))
    yield "size", np.lexsort((-c.length, -c.size))
    yield "width", np.lexsort((-c.size, -(c.hi - c.lo)))
    yield "area", np.lexsort((-c.length, -(c.size * c.length.astype(np.float64))))
    yield "start", np.lexsort((-c.size, c.lo))

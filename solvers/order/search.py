"""The search for a lower peak: best of several list schedules, stronger bounds, exact search."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from memplan.outcome import Limits, relative_gap
from memplan.solvers.order.bound import cut_bound, forced_live
from memplan.solvers.order.model import OrderModel
from memplan.solvers.order.sweep import KEYS, list_schedule, sweep
from memplan.units import format_bytes

# Effort at ``Limits.work`` 1, in units that do not depend on the machine.
CUT_WORK = 500_000  # nodes of the graphs whose minimum cuts are taken
BRIEF_WORK = 1_000_000  # runs that exact search may look at, in each direction: before annealing
EXACT_WORK = 20_000_000  # and after it
WORK_PER_SECOND = 3_000_000  # a slow machine's; 5 to 20 million where this was written
MOVES = 1_500_000  # of annealing
TARGETS = (0.03, 0.01)  # how far below the best peak the rounds aim, in turn


class OrderSearch:
    """The best order and the best bound so far; ``closed`` when they meet, ``stopped`` also at ``goal`` bytes."""

    def __init__(self, model: OrderModel, limits: Limits, goal: int = 0) -> None:
        self.model = model
        self.goal = goal
        self.limits = limits
        self.deadline = limits.deadline()
        self.order: Sequence[int] = range(model.n)
        self.peak = model.peak(self.order)
        self.bound = max(forced_live(model), default=model.base)

    @property
    def closed(self) -> bool:
        return self.peak <= self.bound

    @property
    def stopped(self) -> bool:
        return self.peak <= max(self.bound, self.goal) or time.monotonic() > self.deadline

    def offer(self, order: Sequence[int], source: str) -> None:
        """Keep a valid order if it is better."""
        peak = self.model.peak(order)
        if peak < self.peak:
            self.order, self.peak = order, peak
            self._tell(source)

    def raise_bound(self, bound: int, source: str) -> None:
        if bound > self.bound:
            self.bound = bound
            self._tell(source)

    def run(self) -> None:
        """All methods, cheapest first, until the bound or the goal is met, the limits are spent, or Ctrl-C."""
        methods: tuple[Callable[[], None], ...] = (
            self.list_schedules,
            self.cuts,
            lambda: self.exact(BRIEF_WORK),
            self.anneal,
            lambda: self.exact(EXACT_WORK),
        )
        with suppress(KeyboardInterrupt):  # the best order so far is the answer
            for method in methods:
                if self.stopped:
                    return
                method()

    def list_schedules(self) -> None:
        for backward in (True, False):
            s = sweep(self.model, backward=backward)
            for key in KEYS:
                self.offer(list_schedule(s, key), "list schedule")

    def cuts(self) -> None:
        loads = dict(zip(self.order, self.model.loads(self.order), strict=True))
        work = int(CUT_WORK * self.limits.work)
        self.raise_bound(cut_bound(self.model, loads, self.bound, work, self.deadline), "minimum cut")

    def exact(self, work: float) -> None:
        """Close the interval between bound and peak by exact search, in either direction; they differ in effort."""
        from memplan.solvers.order.exact import ExactSearch  # loads numba, which easy problems do without

        for backward in (False, True):
            search = ExactSearch(sweep(self.model, backward=backward))
            left = int(work * self.limits.work)
            unsolved: list[int] = []  # limits that took too much work
            while left > 0 and not self.stopped and (limit := self._limit_to_try(unsolved)) is not None:
                answer = search.within(limit, min(left >> len(unsolved), self._affordable()))
                left -= answer.work
                if answer.order is not None:
                    self.offer(answer.order, "exact search")
                elif answer.bound:
                    self.raise_bound(answer.bound, "exact search")
                else:
                    unsolved.append(limit)

    def _affordable(self) -> int:
        """Work of exact search that fits the time left; it cannot be stopped on the way."""
        return int(min(max(0.0, self.deadline - time.monotonic()), 3600.0) * WORK_PER_SECOND)

    def _limit_to_try(self, unsolved: list[int]) -> int | None:
        """The middle of the interval; where that is too hard, just below the peak, then what is left at its foot."""
        if not unsolved:
            return (self.bound + self.peak - 1) // 2
        if max(unsolved) < self.peak - 1:
            return self.peak - 1
        foot = min(self.peak, *unsolved)
        limit = (self.bound + foot - 1) // 2
        return limit if limit < foot and len(unsolved) < 5 else None

    def anneal(self) -> None:
        """Rounds of annealing, each from where the last one ended, aimed at a target just below the best peak."""
        from memplan.solvers.order.anneal import Annealer  # loads numba, which easy problems do without

        annealer = Annealer(self.model, self.order, self.limits.seed)
        moves = int(MOVES * self.limits.work)
        for below in itertools.cycle(TARGETS):
            if self.stopped or annealer.moves > moves:
                return
            self.offer(annealer.round(max(self.bound, int(self.peak * (1 - below)))), "annealing")

    def _tell(self, source: str) -> None:
        if self.limits.progress is not None:
            gap = 100 * relative_gap(self.peak, self.bound)
            self.limits.progress(
                f"order: peak {format_bytes(self.peak)}, bound {format_bytes(self.bound)}, gap {gap:.2f} % ({source})"
            )

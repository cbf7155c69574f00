"""The search for a lower peak: best of several list schedules, stronger bounds, exact search."""

from __future__ import annotations

import time
from collections.abc import Sequence

from memplan.outcome import Limits, relative_gap
from memplan.solvers.order.bound import cut_bound, forced_live
from memplan.solvers.order.exact import ExactSearch
from memplan.solvers.order.model import OrderModel
from memplan.solvers.order.sweep import KEYS, list_schedule, sweep
from memplan.units import format_bytes

# Effort at ``Limits.work`` 1, in units that do not depend on the machine.
CUT_WORK = 2_000_000  # nodes of the graphs whose minimum cuts are taken
EXACT_WORK = 4_000_000  # sets of runs times runs, for one limit in one direction


class OrderSearch:
    """The best order and the best bound so far. ``closed`` when they meet."""

    def __init__(self, model: OrderModel, limits: Limits) -> None:
        self.model = model
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
        return self.closed or time.monotonic() > self.deadline

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
        """All methods, cheapest first, until the bound is met or the limits are spent."""
        for method in (self.list_schedules, self.cuts, self.exact):
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
        self.raise_bound(cut_bound(self.model, loads, self.bound, int(CUT_WORK * self.limits.work)), "minimum cut")

    def exact(self) -> None:
        """Halve the interval between bound and peak by exact search; backwards it mostly needs fewer sets."""
        states = int(EXACT_WORK * self.limits.work) // (self.model.n + 1)
        for backward in (True, False):
            search = ExactSearch(sweep(self.model, backward=backward))
            while not self.stopped:
                answer = search.within((self.bound + self.peak - 1) // 2, states)
                if answer.order is not None:
                    self.offer(answer.order, "exact search")
                elif answer.bound:
                    self.raise_bound(answer.bound, "exact search")
                else:
                    break

    def _tell(self, source: str) -> None:
        if self.limits.progress is not None:
            gap = 100 * relative_gap(self.peak, self.bound)
            self.limits.progress(
                f"order: peak {format_bytes(self.peak)}, bound {format_bytes(self.bound)}, gap {gap:.2f} % ({source})"
            )

"""Whether a compiled step keeps its budget: one step is measured, and what broke the budget is planned anew, tighter."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from memplan import torch_compat
from memplan.backend import device_type
from memplan.errors import BudgetInfeasibleError
from memplan.meters import Meter, start_meter
from memplan.pieces import Model, Piece, parameters_of
from memplan.problem import Category
from memplan.realise import Planned
from memplan.units import format_bytes

log = logging.getLogger("memplan")

_TIGHTENINGS = 2  # each costs a compile; what two do not reach is said in a warning


class MeasuredStep:
    """The bytes that a step holds, added up over the spans in which compiled code runs: forwards, then backwards."""

    def __init__(self, resident: int, device_type: str) -> None:
        self.held = self.peak = resident
        self.whole = True  # no span was missed because a profiler of the user's ran
        self._device_type = device_type
        self._meter: Meter | None = None

    def start(self) -> None:
        self._meter = start_meter(self._device_type)
        self.whole &= self._meter is not None

    def stop(self) -> None:
        if self._meter is not None:
            peak, net = self._meter.stop()
            self.peak = max(self.peak, self.held + peak)
            self.held += net
            self._meter = None


@dataclass
class WatchedModel(Model):
    """A model whose kernels and buffers someone else chooses. A step is measured once the same plans ran one before: the
    first one also compiles."""

    limit: int | None = None  # the user's budget in bytes
    tightenings: int = 0
    settled: bool = False  # measured, and within the budget or given up
    _plans: tuple[int, ...] = ()  # of the step under way
    _ran: tuple[int, ...] = ()  # plans that a whole step has run
    _step: MeasuredStep | None = field(default=None, repr=False)

    def forward_begins(self, piece: Piece) -> None:
        if piece is self.pieces[0]:
            self._plans, planned = self._now(), self._planned()
            compiled = not self.settled and planned and self._plans == self._ran
            self._step = MeasuredStep(self._resident(), device_type(planned[0].built.capture)) if compiled else None
        self.span_begins()

    def backward_ends(self, piece: Piece) -> None:
        """The first piece's backward is the step's last."""
        self.span_ends()
        if not self.settled and piece.planned is self._planned()[0]:
            step, self._step = self._step, None
            if self._plans == self._now():
                self._ran = self._plans
                if step is not None and step.whole:
                    self._judge(piece, step.peak)

    def span_begins(self) -> None:
        if self._step is not None:
            self._step.start()

    def span_ends(self) -> None:
        if self._step is not None:
            self._step.stop()

    def tighten(self, budget: int) -> None:
        """Have every piece planned anew at its next call, for ``budget`` bytes."""
        self.options = replace(self.options, memory_budget=max(1, budget) + int(self.options.reserved))

    def give_up(self, why: str) -> None:
        """Run on as it is, and say so once."""
        self.settled = True
        log.warning("the budget of %s is not kept: %s", format_bytes(self.limit or 0), why)

    def _judge(self, first: Piece, held: int) -> None:
        assert first.planned is not None and first.planned_for is not None
        budget = first.planned.plan.budget
        if budget is None:
            self.settled = True
            return
        budget += first.planned_for.held
        self.limit = self.limit or budget
        log.info("a step holds %d of %d bytes; it was planned for %d", held, self.limit, budget)
        if held <= self.limit:
            self.settled = True
        elif self.tightenings < _TIGHTENINGS:
            self.tightenings += 1
            self.tighten(budget - (held - self.limit))
        else:
            self.give_up(f"a measured step holds {format_bytes(held)}; Inductor's own choices take the rest")

    def _planned(self) -> list[Planned]:
        return [p.planned for p in self.pieces if p.planned is not None]

    def _now(self) -> tuple[int, ...]:
        return tuple(id(p.planned) for p in self.pieces)

    def _resident(self) -> int:
        """Bytes that stand before the step: every parameter and buffer once, and what the first piece is given."""
        planned = self._planned()
        kept: Counter[tuple[str, int]] = Counter()
        for one in planned:
            kept |= parameters_of(one)
        first = planned[0].problem
        given = (first.buffers[b] for b in first.resident if first.buffers[b].category == Category.INPUT)
        return sum(size * count for (_, size), count in kept.items()) + sum(b.size for b in given)


class WatchedPiece(Piece):
    """A piece that tells its model where its forward begins and where its backward ends."""

    _model: WatchedModel

    @torch_compat.never_traced
    def __call__(self, *args: Any) -> Any:
        model = self._model
        if model.settled:
            return super().__call__(*args)
        model.forward_begins(self)
        try:
            result = super().__call__(*args)
        finally:
            model.span_ends()
        torch_compat.around_backward(result, model.span_begins, lambda: model.backward_ends(self))
        return result

    def _plan(self, first: bool) -> None:
        """A budget tightened further than any plan goes is replaced by the smallest that one keeps."""
        try:
            super()._plan(first)
        except BudgetInfeasibleError as error:
            if not self._model.tightenings or error.smallest is None or self.planned is None:
                raise
            assert self.planned_for is not None
            if error.smallest >= self.planned.plan.peak + self.planned_for.held:
                self._model.give_up("a plan that leaves more room for Inductor's own choices does not exist")
                return
            self._model.tighten(error.smallest)
            super()._plan(first)

"""A model in pieces: graph breaks give several graphs, which share one budget.

While a piece runs, the others hold something too: their parameters, what earlier pieces saved for their backward, the
gradients that later pieces have made. The first piece is planned before the later ones are known, so plans are made
again, piece by piece from the first, once a step has shown them all.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import fx

from memplan import torch_compat
from memplan.errors import BudgetInfeasibleError
from memplan.options import Options
from memplan.planner import Elsewhere
from memplan.problem import Category, Phase
from memplan.realise import Planned

log = logging.getLogger("memplan")

_REPLANS = 2  # a piece's needs change when its neighbours' plans do; twice settles all but contrived models

Compile = Callable[[Options, Elsewhere, Sequence[Any]], tuple[Callable[..., Any], Planned | None]]


class Piece:
    """One graph of a model, callable; plans itself again when what the other pieces hold has changed."""

    def __init__(
        self, model: Model, compile_piece: Compile, graph_module: fx.GraphModule, inputs: Sequence[Any]
    ) -> None:
        self._model, self._compile, self._inputs = model, compile_piece, inputs
        self._context = torch_compat.TracingContext.try_get()
        self.planned_for: Elsewhere | None = None
        self._options = model.options
        self._replans = 0
        self.planned: Planned | None = None
        self.frame = torch_compat.frame_id()
        model.add(self)
        self._plan(first=True)
        # A later plan needs only their shapes; the first batch must not live as long as the compiled function.
        self._inputs = torch_compat.fake_inputs(graph_module, inputs)

    @torch_compat.never_traced
    def __call__(self, *args: Any) -> Any:
        moved = (
            self.planned is not None and self._replans < _REPLANS and self._model.elsewhere(self) != self.planned_for
        )
        if moved or self._options != self._model.options:
            self._replans += moved
            with torch_compat.tracing(self._context):
                self._plan(first=False)
        return self._run(*args)

    def _plan(self, first: bool) -> None:
        elsewhere, self._options = self._model.elsewhere(self), self._model.options
        try:
            self._run, self.planned = self._compile(self._options, elsewhere, self._inputs)
        except BudgetInfeasibleError as error:
            if not first or len(self._model.pieces) == 1 or error.smallest is None:
                raise
            # The earlier pieces were planned as if they were alone. From the next step on they leave room for this one.
            log.warning(
                "a later part of the model does not fit beside the parts before it; the next step is planned anew"
            )
            self._run, self.planned = self._compile(self._model.options.without_budget(), elsewhere, self._inputs)
        self.planned_for = elsewhere


@dataclass
class Model:
    """The pieces compiled under one ``torch.compile`` call, in the order in which they were first met."""

    options: Options
    pieces: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """A new piece, or the same one compiled again for other shapes, which takes the old one's place."""
        at = self._place(piece)
        self.pieces[at : at + 1] = [piece]

    def _place(self, piece: Piece) -> int:
        """Where the frame stands that a piece was compiled from; the end for a new one."""
        same = (k for k, p in enumerate(self.pieces) if p is piece or (p.frame is not None and p.frame == piece.frame))
        return next(same, len(self.pieces))

    def elsewhere(self, piece: Piece) -> Elsewhere:
        """What the other pieces hold while ``piece`` runs."""
        at = self._place(piece)
        before = [p.planned for p in self.pieces[:at] if p.planned is not None]
        after = [p.planned for p in self.pieces[at + 1 :] if p.planned is not None]
        mine = piece.planned
        seen = parameters_of(mine) if mine is not None else Counter()
        parameters = 0
        for other in (*before, *after):
            fresh = parameters_of(other) - seen
            parameters += sum(size * count for (_, size), count in fresh.items())
            seen |= fresh
        saved = sum(_left(p) for p in before)
        gradients = sum(_gradients(p) for p in after)
        meanwhile, passed = 0, 0
        for p in after:
            meanwhile = max(meanwhile, passed + p.timeline.peak - p.problem.resident_bytes)
            passed += _left(p)
        return Elsewhere(parameters + saved + gradients, max(0, meanwhile - gradients))


def parameters_of(planned: Planned) -> Counter[tuple[str, int]]:
    """Name and size of each parameter and buffer of a graph."""
    buffers = (planned.problem.buffers[b] for b in planned.problem.resident)
    return Counter((b.name, b.size) for b in buffers if b.category in (Category.PARAMETER, Category.BUFFER))


def _left(planned: Planned) -> int:
    """Bytes that a piece's forward leaves for its backward and its readers, the resident ones not counted."""
    program = planned.lowered.program
    held = 0
    for step in program.steps:
        if step.phase != Phase.FORWARD:
            break
        held += sum(program.storages[s].size for s in step.makes) - sum(program.storages[s].size for s in step.frees)
    return held


def _gradients(planned: Planned) -> int:
    """Bytes of the gradients that a piece's backward hands to the caller."""
    outputs, buffers = set(planned.problem.outputs), planned.problem.buffers
    made = (b for op in planned.problem.ops for b in op.writes)
    return sum(buffers[b].size for b in made if b in outputs and buffers[b].category == Category.GRADIENT)


M = TypeVar("M", bound=Model)


class Models(Generic[M]):
    """Finds the model that a graph belongs to: torch hands every graph of one ``torch.compile`` the same object.

    The models compiled last are remembered, so that a process that compiles for ever does not grow for ever.
    """

    def __init__(self, make: Callable[[Options], M], remembered: int = 32) -> None:
        self._make, self._remembered = make, remembered
        self._known: dict[int, tuple[object, M]] = {}

    def of(self, given: object, options: Options) -> M:
        # The reference to ``given`` keeps its id from reuse.
        known = self._known.pop(id(given), None) or (given, self._make(options))
        self._known[id(given)] = known
        if len(self._known) > self._remembered:
            del self._known[next(iter(self._known))]
        return known[1]

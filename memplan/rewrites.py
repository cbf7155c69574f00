"""Rewrites of what a model computes on the way, equal to rounding: each is weighed, and kept where its plan is better.

Weighing compiles nothing. A candidate's outline is its step without a budget, which no budget makes faster; its
estimate is its plan under the budget. Both are of the regions as they would be, with no kernel made: only the winner's
kernels are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import fx

from memplan.errors import BudgetInfeasibleError
from memplan.realise import Planned

log = logging.getLogger("memplan")

Compiled = tuple[Callable[..., Any], Planned | None]


class Rewrite(Protocol):
    """A pass over dynamo's graph, before autograd."""

    @property
    def name(self) -> str: ...

    @property
    def for_memory_alone(self) -> bool:
        """Whether it can only slow down what need not save memory."""

    def apply(self, graph_module: fx.GraphModule) -> fx.GraphModule | None:
        """A rewritten copy; None where nothing is to be rewritten."""


class Compiler(Protocol):
    """What becomes of a graph. ``budget``: bytes, what the rest of the model holds included; None for the user's."""

    def outline(self, graph_module: fx.GraphModule) -> Planned | None:
        """Its plan without a budget, no kernel made; None for a graph that would run unplanned."""

    def budget(self, outline: Planned) -> int | None:
        """Bytes that the user's budget means for the graph of this outline; None without a budget."""

    def estimate(self, graph_module: fx.GraphModule, budget: int | None) -> Planned | None:
        """Its plan, no kernel made. Raises BudgetInfeasibleError."""

    def compile(self, graph_module: fx.GraphModule, budget: int | None) -> Compiled:
        """Raises BudgetInfeasibleError."""


@dataclass(frozen=True)
class _Candidate:
    graph_module: fx.GraphModule
    compiler: Compiler
    allowed: int | None = None  # bytes; None for the user's budget, which may be a share of this graph's own peak

    @cached_property
    def outline(self) -> Planned | None:
        return self.compiler.outline(self.graph_module)

    @cached_property
    def estimate(self) -> Planned | BudgetInfeasibleError | None:
        try:
            return self.compiler.estimate(self.graph_module, self.allowed)
        except BudgetInfeasibleError as refused:
            return refused

    @property
    def is_slowed(self) -> bool:
        """Whether its plan pays with time for the budget."""
        found, free = self.estimate, self.outline
        return isinstance(found, BudgetInfeasibleError) or (
            found is not None and free is not None and found.timeline.time > free.timeline.time
        )

    def rank(self, smallest: bool) -> tuple[float, ...]:
        """Less is better: what fits, then what is fastest, then what holds least; with ``smallest``, the last two the
        other way round. An unplanned graph's memory is not limited: it never replaces a planned one."""
        found = self.estimate
        if found is None:
            return (2,)
        if isinstance(found, BudgetInfeasibleError):
            return (1, found.smallest or 0)
        order = -1 if smallest else 1
        return (0, *(found.timeline.time, found.held)[::order])


def compile_best(
    graph_module: fx.GraphModule, rewrites: Sequence[Rewrite], compiler: Compiler, smallest: bool = False
) -> Compiled:
    """Compile a graph as it is, or rewritten where that is better: what fits the budget, then what is fastest, then what
    holds least; with ``smallest``, what holds least first.

    A rewrite is weighed on top of those that were kept, under the bytes that the budget means for the graph as it is.
    Raises BudgetInfeasibleError where nothing fits.
    """
    best, passed = _Candidate(graph_module, compiler), list[_Candidate]()
    for rewrite in rewrites:
        rewritten = rewrite.apply(best.graph_module)
        if rewritten is None:
            continue
        allowed = best.allowed
        if allowed is None and best.outline is not None:
            allowed = compiler.budget(best.outline)
        found = _Candidate(rewritten, compiler, allowed)
        limited = smallest or allowed is not None
        if _is_better(found, best, limited, smallest, rewrite.for_memory_alone):
            log.info("%s is kept", rewrite.name)
            passed.append(best)
            best = found
    return _compile_first([best, *reversed(passed)])


def _is_better(new: _Candidate, old: _Candidate, limited: bool, smallest: bool, for_memory_alone: bool) -> bool:
    """Plans under the budget are made only where the outlines do not tell."""
    if for_memory_alone and not smallest and not (limited and old.is_slowed):
        return False
    if new.outline is None or old.outline is None:
        return new.outline is not None
    quick, slow = (o.timeline.time for o in (new.outline, old.outline))
    if not limited:
        return (quick, new.outline.held) < (slow, old.outline.held)
    if not smallest and quick <= slow and new.outline.held <= old.outline.held:
        return True
    known = old.estimate
    if not smallest and isinstance(known, Planned) and quick >= known.timeline.time:
        return False
    return new.rank(smallest) < old.rank(smallest)


def _compile_first(candidates: Sequence[_Candidate]) -> Compiled:
    """Kernels may take more workspace than estimated: then the next candidate, and at last the least refusal."""
    refusals = []
    for candidate in candidates:
        try:
            return candidate.compiler.compile(candidate.graph_module, candidate.allowed)
        except BudgetInfeasibleError as refused:
            refusals.append(refused)
    raise min(refusals, key=lambda refused: refused.smallest or 0)

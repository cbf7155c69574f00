"""Rewrites of what a model computes on the way, equal to rounding: each is tried, and kept where its plan is better."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import fx

from memplan.errors import BudgetInfeasibleError
from memplan.planner import Planned

log = logging.getLogger("memplan")

Compiled = tuple[Callable[..., Any], Planned | None]
Compile = Callable[[fx.GraphModule, int | None], Compiled]  # of a graph under a budget in bytes, None for the user's


class Rewrite(Protocol):
    """A pass over dynamo's graph, before autograd."""

    @property
    def name(self) -> str: ...

    @property
    def for_memory_alone(self) -> bool:
        """Whether it can only slow down what need not save memory."""

    def apply(self, graph_module: fx.GraphModule) -> fx.GraphModule | None:
        """A rewritten copy; None where nothing is to be rewritten."""


def compile_best(
    graph_module: fx.GraphModule, rewrites: Sequence[Rewrite], compile_graph: Compile, held: int, smallest: bool = False
) -> Compiled:
    """Compile a graph as it is and rewritten; what fits the budget, then what is fastest, then what holds least; with
    ``smallest``, what holds least first.

    A rewrite is tried on top of those that were kept, under the bytes that the budget means for the graph as it is.
    ``held``: bytes that the rest of the model holds beside it. Raises BudgetInfeasibleError where nothing fits.
    """
    best: Compiled | None = None
    refused: BudgetInfeasibleError | None = None
    try:
        best = compile_graph(graph_module, None)
    except BudgetInfeasibleError as error:
        refused = error
    budget = _budget(best, refused, held)
    for rewrite in rewrites:
        if rewrite.for_memory_alone and not smallest and best is not None and not _is_slowed(best[1]):
            continue
        rewritten = rewrite.apply(graph_module)
        if rewritten is None:
            continue
        try:
            found = compile_graph(rewritten, budget)
        except BudgetInfeasibleError as error:
            if refused is not None and (error.smallest or 0) < (refused.smallest or 0):
                graph_module, refused = rewritten, error
            continue
        if best is None or _is_better(found[1], best[1], smallest):
            log.info("%s is kept", rewrite.name)
            graph_module, best = rewritten, found
    if best is None:
        assert refused is not None
        raise refused
    return best


def _budget(best: Compiled | None, refused: BudgetInfeasibleError | None, held: int) -> int | None:
    """Bytes that the graph and what is held elsewhere may take together."""
    if refused is not None:
        return refused.budget
    planned = best[1] if best is not None else None
    if planned is None or planned.plan.budget is None:
        return None
    return planned.plan.budget + held


def _is_slowed(planned: Planned | None) -> bool:
    """Whether the plan pays with time for its budget."""
    return planned is not None and planned.plan.time > planned.plan.unplanned_time


def _is_better(new: Planned | None, old: Planned | None, smallest: bool) -> bool:
    """Both keep the budget. An unplanned graph's memory is not limited: it never replaces a planned one."""
    if new is None or old is None:
        return old is None and new is not None
    order = -1 if smallest else 1
    return (new.timeline.time, new.held)[::order] < (old.timeline.time, old.held)[::order]

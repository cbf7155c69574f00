"""Compute once what a graph computes twice, where that holds nothing longer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from memplan.capture import input_nodes
from memplan.passes.copying import holders
from memplan.passes.values import value_numbers


@dataclass(frozen=True)
class MergeDuplicates:
    """Runs on a captured graph. A node gives way to an earlier one of its value whose storage is held at its place
    anyway: no instant then holds more, and a mask that every layer makes and saves for its backward is saved once.

    What the caller gets keeps a storage of its own. What died before would be held for its second reader alone, and is
    computed again as it was.
    """

    name: ClassVar[str] = "merge-duplicates"

    def apply(self, graph_module: fx.GraphModule) -> bool:
        """Returns whether the graph changed."""
        merger = _Merger(graph_module.graph)
        modified = [merger.merge(at, node) for at, node in enumerate(merger.nodes)]
        if any(modified):
            graph_module.graph.eliminate_dead_code()
            graph_module.recompile()
        return any(modified)


class _Merger:
    def __init__(self, graph: fx.Graph) -> None:
        *self.nodes, output = graph.nodes
        self.graph = graph
        self.numbers = value_numbers(graph)
        self.holders = holders(self.nodes)
        self.results = set(input_nodes(output))
        self.given_away = {holder for node in self.results for holder in self.holders[node]}
        self.last_use: dict[fx.Node, int] = {}  # of a storage, by the node that holds it first
        for at, node in enumerate((*self.nodes, output)):
            for operand in input_nodes(node):
                self.last_use.update((holder, at) for holder in self.holders[operand])
        self.first: dict[int, fx.Node] = {}

    def merge(self, at: int, node: fx.Node) -> bool:
        """Whether the node at position ``at`` gave way to an earlier one."""
        if node.op != "call_function":
            return False
        known = self.first.get(self.numbers[node])
        if known is None or not self._may_stand_in(known, node, at):
            self.first[self.numbers[node]] = node
            return False
        last = max(self._last_uses(node), default=at)
        self.last_use.update((holder, max(self.last_use[holder], last)) for holder in self.holders[known])
        node.replace_all_uses_with(known)
        self.graph.erase_node(node)
        return True

    def _may_stand_in(self, known: fx.Node, node: fx.Node, at: int) -> bool:
        if known in self.results or node in self.results or (_is_backward(known) and not _is_backward(node)):
            return False
        theirs, own = self.holders[known], self.holders[node]
        is_tensor = isinstance(node.meta["val"], torch.Tensor)
        if node in own and not (is_tensor and self.given_away.isdisjoint((*theirs, *own))):  # it makes a storage
            return False
        return all(self.last_use.get(holder, -1) >= at for holder in theirs)

    def _last_uses(self, node: fx.Node) -> Sequence[int]:
        return [self.last_use[holder] for holder in self.holders[node] if holder in self.last_use]


def _is_backward(node: fx.Node) -> bool:
    return node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")

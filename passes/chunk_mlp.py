"""Never make the wide middle of an MLP whole: its two products run block by block of tokens."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memplan.passes.calls import argument, insert, name_of, rewritten, value_of

_POINTWISE = {
    "gelu",
    "relu",
    "silu",
    "tanh",
    "sigmoid",
    "hardswish",
    "pow",
    "mul",
    "add",
    "sub",
    "div",
    "square",
    "float",
}
_SAME_ROWS = {"view", "contiguous"}  # where the last dimension stays as it is


@dataclass(frozen=True)
class _Middle:
    """What stands between a source [..., D] and the product that leads out of the wide middle."""

    source: fx.Node
    members: tuple[fx.Node, ...]  # in the graph's order
    width: int


@dataclass(frozen=True)
class ChunkMLP:
    """Runs on dynamo's graph, so that AOTAutograd derives the backward of each block, and the planner decides block by
    block what is kept and what runs again.

    The pattern: one product or several (a gate) of one source, pointwise ops between them and numbers, and a product of
    the result, where nothing in between goes anywhere else. Rows are independent of each other; weight gradients are
    sums over blocks, equal to rounding. It costs a sum of each weight's gradient for every further block.
    """

    name: ClassVar[str] = "chunk-mlp"
    for_memory_alone: ClassVar[bool] = True
    blocks: int = 4  # the middle is then a quarter of the bytes; the products of a block still fill a core
    least_rows: int = 64  # of a block

    def apply(self, graph_module: fx.GraphModule) -> fx.GraphModule | None:
        """The rewritten copy; None where nothing is to be rewritten."""
        return rewritten(graph_module, lambda node: _factor(node) is not None, self._rewrite)

    def _rewrite(self, graph: fx.Graph, last: fx.Node) -> bool:
        middle, made = _middle(last), value_of(last)
        if middle is None or made is None:
            return False
        given = value_of(middle.source)
        if given is None or given.dim() < 2 or middle.width <= given.shape[-1]:
            return False
        rows = given.numel() // given.shape[-1]
        count = min(self.blocks, rows // self.least_rows)
        if count < 2:
            return False
        flat = insert(graph, last, torch.reshape, (middle.source, (-1, given.shape[-1])))
        split = insert(graph, last, torch.split, (flat, -(-rows // count)))
        done = []
        for block in range(-(-rows // -(-rows // count))):
            part = insert(graph, last, operator.getitem, (split, block))
            done.append(_of_block(graph, last, middle, part))
        whole = insert(graph, last, torch.cat, (done,))
        last.replace_all_uses_with(insert(graph, last, torch.reshape, (whole, tuple(made.shape))))
        graph.erase_node(last)
        return True


def _of_block(graph: fx.Graph, last: fx.Node, middle: _Middle, part: fx.Node) -> fx.Node:
    """The members and the last product over one block of rows; views between them are not needed any more."""
    now: dict[fx.Node, fx.Node] = {}
    for node in (*middle.members, last):
        factor = _factor(node)
        if factor is None and name_of(node) in _SAME_ROWS:
            now[node] = now[node.args[0]]  # type: ignore[index]
            continue
        if factor is not None:
            now[factor] = now.get(factor, part)  # a product of the source, or of its view, reads the block
        with graph.inserting_before(last):
            now[node] = graph.node_copy(node, lambda n: now.get(n, n))
    return now[last]


def _middle(last: fx.Node) -> _Middle | None:
    """What a product reads, walked back to the products of one source; None for anything but the pattern."""
    inner = _factor(last)
    value = value_of(inner)
    if inner is None or value is None or _factor(inner) is not None:
        return None
    found: set[fx.Node] = set()
    sources: set[fx.Node] = set()
    waiting = [inner]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        factor = _factor(node)
        if factor is not None:
            sources.add(_behind_views(factor))
        elif _keeps_rows(node):
            waiting += node.all_input_nodes
        else:
            return None
    members = _together(found, last)
    if len(sources) != 1 or members is None:
        return None
    return _Middle(sources.pop(), members, value.shape[-1])


def _together(found: set[fx.Node], last: fx.Node) -> tuple[fx.Node, ...] | None:
    """The nodes in order if nothing else reads them, and nothing but views of the source stands among them."""
    if any(user not in found and user is not last for node in found for user in node.users):
        return None
    ordered: list[fx.Node] = []
    node = last.prev
    while len(ordered) < len(found):
        if node in found:
            ordered.append(node)
        elif node.op in ("placeholder", "root") or not (node.op == "get_attr" or name_of(node) in _SAME_ROWS):
            return None
        node = node.prev
    return tuple(reversed(ordered))


def _factor(node: fx.Node) -> fx.Node | None:
    """What a product with a weight is of: the left operand of ``linear``, the middle one of ``addmm``; None if it is no
    such product."""
    name = name_of(node)
    if name == "linear":
        factor, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    elif name == "addmm" and len(node.args) == 3 and not node.kwargs:
        factor, weight = node.args[1:]
    else:
        return None
    is_given = isinstance(weight, fx.Node) and weight.op in ("placeholder", "get_attr")
    return factor if is_given and isinstance(factor, fx.Node) else None


def _keeps_rows(node: fx.Node) -> bool:
    """Whether each element of a row depends on that row of the operands alone."""
    name, made = name_of(node), value_of(node)
    operands: list[Any] = [value_of(n) for n in node.all_input_nodes]
    if made is None or made.dim() < 2 or not operands or any(o is None for o in operands):
        return False
    if name in _SAME_ROWS:
        return operands[0].shape[-1] == made.shape[-1]
    return name in _POINTWISE and all(o.shape == made.shape for o in operands)


def _behind_views(node: fx.Node) -> fx.Node:
    """The tensor whose rows a chain of views looks at."""
    while name_of(node) in _SAME_ROWS and _keeps_rows(node):
        node = node.all_input_nodes[0]
    return node

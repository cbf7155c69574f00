"""Put the gradients of slices side by side, where autograd adds up wholes that are zero but for one slice."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx

from memplan import torch_compat

aten = torch.ops.aten

_SELECT = aten.select_backward.default
_SLICES = (_SELECT, aten.slice_backward.default)


@dataclass(frozen=True)
class JoinSlices:
    """Runs on a captured graph. Of every slice that a model reads (``x[:, t]`` in a loop over time, queries, keys and values
    of one product), the backward makes a tensor of the whole's size and adds these up: n slices write the whole 2 n times.
    Where they do not overlap, one copy of their gradients gives the same numbers; a zero may have the other sign.

    At most one more term stands in such a sum: with two, the order of the additions would round otherwise.
    """

    name: ClassVar[str] = "join-slices"

    def apply(self, graph_module: fx.GraphModule) -> bool:
        """Returns whether the graph changed."""
        graph = graph_module.graph
        if not any(node.target in _SLICES for node in graph.nodes):
            return False
        modified = False
        within: set[fx.Node] = set()  # sums that a larger one holds
        for node in reversed(graph.nodes):
            if node not in within and _is_sum(node):
                sums, terms = _terms(node)
                joined = _joined(graph, node, terms)
                if joined is not None:
                    node.replace_all_uses_with(joined)
                    within.update(sums)
                    modified = True
        graph.eliminate_dead_code()
        graph_module.recompile()
        return modified


class _Slice(NamedTuple):
    """A term that is zero but for ``start`` to ``stop`` along ``dim``."""

    start: int
    stop: int
    dim: int
    term: fx.Node

    @property
    def gradient(self) -> fx.Node:
        """Has that dimension or, where it was selected, has lost it."""
        return self.term.args[0]  # type: ignore[return-value]


def _is_sum(node: fx.Node) -> bool:
    return (
        node.target is aten.add.Tensor
        and not node.kwargs
        and all(isinstance(a, fx.Node) and _same_kind(a, node) for a in node.args)
    )


def _same_kind(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _terms(root: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The sums that make up a sum, itself included, and what they add up."""
    sums, terms, left = [], [], [root]
    while left:
        node = left.pop()
        if node is root or (_is_sum(node) and len(node.users) == 1):
            sums.append(node)
            left += node.args  # type: ignore[arg-type]
        else:
            terms.append(node)
    return sums, terms


def _joined(graph: fx.Graph, root: fx.Node, terms: list[fx.Node]) -> fx.Node | None:
    """A node of the same value as ``root``; None where its terms are no slices side by side."""
    slices = {term: found for term in terms if len(term.users) == 1 and (found := _slice(term)) is not None}
    others = [term for term in terms if term not in slices]
    parts = sorted(slices.values(), key=lambda part: part[:3])
    if len(parts) < 2 or len(parts) + len(others) < len(terms) or len(others) > 1 or len({p.dim for p in parts}) > 1:
        return None
    if any(before.stop > after.start for before, after in pairwise(parts)):
        return None
    value = root.meta["val"]
    with graph.inserting_before(root):
        pieces = list(_pieces(graph, root, parts, value.shape))
        joined = _call(graph, root, aten.cat.default, pieces, parts[0].dim)
        for other in others:
            joined = _call(graph, root, aten.add.Tensor, joined, other)
        # Kernels follow the layout of their first operands; what reads the sum was traced with the one it had.
        return joined if joined.meta["val"].stride() == value.stride() else None


def _slice(node: fx.Node) -> _Slice | None:
    if node.target not in _SLICES:
        return None
    arguments: Any = node.args
    _, sizes, dim, *place = arguments
    if not all(type(number) is int for number in (*sizes, dim, *place)):
        return None
    dim, size = dim % len(sizes), sizes[dim]
    if node.target is _SELECT:
        start = place[0] % size
        return _Slice(start, start + 1, dim, node)
    start, stop, step = slice(*place).indices(size)
    return _Slice(start, max(start, stop), dim, node) if step == 1 else None


def _pieces(graph: fx.Graph, like: fx.Node, parts: list[_Slice], shape: torch.Size) -> Iterator[fx.Node]:
    """What the whole consists of along the parts' dimension, zeros between them included."""
    dim, reached = parts[0].dim, 0
    small = _small_parts([part.gradient for part in parts])
    for part in parts:
        if part.start > reached:
            yield _zeros(graph, like, part, shape, part.start - reached)
        piece = part.gradient
        if piece in small:
            with graph.inserting_before(part.term):
                piece = _call(graph, part.term, aten.clone.default, piece)
        yield _call(graph, like, aten.unsqueeze.default, piece, dim) if part.term.target is _SELECT else piece
        reached = part.stop
    if reached < shape[dim]:
        yield _zeros(graph, like, parts[0], shape, shape[dim] - reached)


def _small_parts(gradients: list[fx.Node]) -> set[fx.Node]:
    """Those of which less than half of their storage is read here: without a copy, all of it would be held until the last
    gradient is there."""
    read: dict[int, int] = defaultdict(int)
    for node in gradients:
        read[torch_compat.storage_key(node.meta["val"])] += node.meta["val"].nbytes
    held = {node: node.meta["val"].untyped_storage().nbytes() for node in gradients}
    return {node for node in gradients if held[node] > 2 * read[torch_compat.storage_key(node.meta["val"])]}


def _zeros(graph: fx.Graph, like: fx.Node, part: _Slice, shape: torch.Size, size: int) -> fx.Node:
    sizes = [*shape[: part.dim], size, *shape[part.dim + 1 :]]
    return _call(graph, like, aten.new_zeros.default, part.gradient, sizes)


def _call(graph: fx.Graph, like: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta = copy.copy(like.meta) | {"val": target(*fx.node.map_arg(args, lambda n: n.meta["val"]))}
    return node

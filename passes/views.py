"""Look at a tensor directly where a graph looks at a view of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memplan import torch_compat
from memplan.capture import input_nodes

aten = torch.ops.aten

_RESHAPES = (aten.view.default, aten._unsafe_view.default)
# Which element of its operand each of theirs is follows from shapes alone, whatever the strides are.
_VIEWS = frozenset(
    (
        *_RESHAPES,
        aten.alias.default,
        aten.detach.default,
        aten.expand.default,
        aten.permute.default,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
    )
)


@dataclass(frozen=True)
class MergeViews:
    """Runs on a captured graph. A view that shows what an operand behind it shows gives way to that one, a reshape of a
    reshape skips the first: on small tensors a view takes as long as an op.

    Tracing leaves many: transposes of transposes in a linear layer's backward, expansions of a batched product to the
    shape it has, detached copies of what is saved. What the caller gets stays a tensor of its own.
    """

    name: ClassVar[str] = "merge-views"

    def apply(self, graph_module: fx.GraphModule) -> bool:
        """Returns whether the graph changed."""
        graph = graph_module.graph
        results = set(input_nodes(graph.output_node()))
        views = [n for n in graph.nodes if n.target in _VIEWS]
        modified = [_merge(node, results) for node in views]
        for node in reversed(views):
            if not node.users:
                graph.erase_node(node)
        if any(modified):
            graph_module.recompile()
        return any(modified)


def _merge(node: fx.Node, results: set[fx.Node]) -> bool:
    """``results``: what the caller gets, each a tensor that nobody else has."""
    look = _look(node)
    for behind in _behind(node) if look is not None else ():
        if _look(behind) == look and (node not in results or (behind.op == "call_function" and behind not in results)):
            node.replace_all_uses_with(behind)
            if node in results:
                results.add(behind)
            return True
    source = node.args[0]
    if node.target in _RESHAPES and isinstance(source, fx.Node) and source.target in _RESHAPES:
        node.update_arg(0, source.args[0])
        return True
    return False


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """What a view looks at, what that looks at, and so on."""
    while node.target in _VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        yield node


def _look(node: fx.Node) -> tuple[Any, ...] | None:
    """Equal for nodes that show the same bytes of a storage as the same elements; None where a size is symbolic."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or torch_compat.free_symbols(value):
        return None
    return value.dtype, value.shape, value.stride(), value.storage_offset()

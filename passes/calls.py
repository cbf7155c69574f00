"""Dynamo's graph, read: one name for every way in which a user may call an op."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_ALIASES = {
    "truediv": "div",
    "itruediv": "div",
    "imul": "mul",
    "multiply": "mul",
    "iadd": "add",
    "bmm": "matmul",
    "reshape": "view",
    "flatten": "view",
}
_MODULES = ("torch", "_operator", "operator")


def name_of(node: fx.Node) -> str:
    """``"matmul"`` for ``a @ b``, ``torch.matmul(a, b)``, ``a.matmul(b)`` and ``torch.bmm(a, b)``; '' for what is no
    call of torch's or Python's own."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function" and str(getattr(node.target, "__module__", "torch")).split(".")[0] in _MODULES:
        name = str(getattr(node.target, "__name__", ""))
    else:
        return ""
    return _ALIASES.get(name, name)


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument by its position or its name; for methods, the tensor itself is position 0."""
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def value_of(node: Any) -> torch.Tensor | None:
    """The fake tensor a node stands for, None for anything but one tensor of fixed sizes."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not all(type(size) is int for size in value.shape):
        return None
    return value


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads a node once; None if others do."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and user.op != "output" else None


def copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes may be rewritten; it shares tensors, and what dynamo noted about the arguments."""
    graph = fx.Graph()
    now: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        now[node] = graph.node_copy(node, now.__getitem__)
        if hasattr(node, "_dynamo_source"):
            now[node]._dynamo_source = node._dynamo_source
    module = fx.GraphModule(graph_module, graph)
    module.meta = copy.copy(graph_module.meta)
    return module


def rewritten(
    graph_module: fx.GraphModule, is_wanted: Callable[[fx.Node], bool], rewrite: Callable[[fx.Graph, fx.Node], bool]
) -> fx.GraphModule | None:
    """A copy in which ``rewrite`` changed some of the wanted nodes; None where it changed none.

    What lost its last reader is gone, and nothing else: what nobody read before, ``count.add_(1)`` for one, changes
    something in place."""
    module = copied(graph_module)
    graph = module.graph
    unread = {node for node in graph.nodes if not node.users}
    changed = [rewrite(graph, node) for node in [n for n in graph.nodes if is_wanted(n)]]
    if not any(changed):
        return None
    for node in reversed(graph.nodes):
        if not node.users and node not in unread and node.op != "placeholder":
            graph.erase_node(node)
    module.recompile()
    return module


def insert(graph: fx.Graph, like: fx.Node, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
    """A call just before ``like``, with its place in the user's source."""
    with graph.inserting_before(like):
        node = graph.call_function(function, args)
    node.meta = copy.copy(like.meta)
    return node

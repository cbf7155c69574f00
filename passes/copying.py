"""Copying a graph node by node, its free nodes (views, sizes) only where something needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import fx

from memplan import torch_compat
from memplan.build_problem import view_source
from memplan.capture import input_nodes, is_getitem, tensors


def resolve(node: fx.Node, now: Mapping[fx.Node, fx.Node], emit: Callable[[fx.Node], object]) -> fx.Node:
    """The copy in force of ``node``; it and what it needs are emitted first where they have none.

    ``now``: original → copy in force; ``emit`` adds a node whose operands are there. No recursion: view chains are long.
    """
    stack = [node]
    while stack:
        top = stack[-1]
        missing = [a for a in input_nodes(top) if a not in now] if top not in now else []
        if missing:
            stack.extend(missing)
            continue
        stack.pop()
        if top not in now:
            emit(top)
    return now[node]


def holders(nodes: Sequence[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """For each node those that hold the storages of its value first: itself, where it makes or brings them."""
    behind: dict[fx.Node, dict[int, fx.Node]] = {}
    for node in nodes:
        known = {k: holder for a in input_nodes(node) for k, holder in behind[a].items()}
        source = view_source(node)
        seen = behind[node] = {}
        for tensor in tensors(node.meta.get("val")):
            key = torch_compat.storage_key(tensor)
            if key in known and not (is_getitem(node) and known[key] is node.args[0]):
                seen[key] = known[key]
            elif source is not None:
                seen[key] = next(iter(behind[source].values()))
            else:
                seen[key] = node
    return {node: tuple(dict.fromkeys(seen.values())) for node, seen in behind.items()}

"""Copying a graph node by node, its free nodes (views, sizes) only where something needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from memplan.capture import input_nodes


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

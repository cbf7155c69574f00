"""Reductions as Triton expressions: what a lane starts from, what it adds up in, how rows and columns are joined."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from memplan.codegen.triton_ops import register_dtype
from memplan.codegen.triton_schedule import Space
from memplan.codegen.triton_views import REDUCTIONS, aten, reduced_dims

FILL = {"sum": "0", "mean": "0", "max": 'float("-inf")', "min": 'float("inf")', "any": "0"}


def dependents(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that reads these nodes, themselves included."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.users)
    return found


def reduction_reaches(node: fx.Node, space: Space) -> set[int]:
    """Atoms that a reduction removes."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return {a for d in reduced_dims(node) for a in space.index[source][d].atoms}


def accumulator(node: fx.Node) -> torch.dtype:
    """The type a reduction adds up in: float32 for half precision, int64 for whole numbers, as eager does."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    kind, dtype = REDUCTIONS[node.target], register_dtype(source.meta["val"].dtype)
    if kind == "any":
        return torch.int32
    if kind in ("sum", "mean"):
        return register_dtype(node.meta["val"].dtype)
    return dtype


def row_expression(kind: str, tile: str, dtype: torch.dtype) -> str:
    if kind in ("sum", "mean"):
        return f"tl.sum({tile}, axis=1, keep_dims=True)"
    if kind == "any" or not dtype.is_floating_point:
        return f"tl.{'min' if kind == 'min' else 'max'}({tile}, axis=1, keep_dims=True)"
    return f"row_{kind}({tile})"


def column_expression(kind: str, tile: str, dtype: torch.dtype) -> str:
    if kind == "any" or not dtype.is_floating_point:
        return f"tl.{'min' if kind == 'min' else 'max'}({tile}, axis=0, keep_dims=True)"
    return f"column_{kind}({tile})"


def larger(kind: str, dtype: torch.dtype) -> str:
    return "minimum" if kind == "min" else "maximum"


def online_pairs(space: Space) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
    """Sums of exp(v - max(v)): sum -> (v, the maximum)."""
    pairs = {}
    for node in space.rows:
        exponential = node.args[0]
        if (
            REDUCTIONS[node.target] != "sum"
            or not isinstance(exponential, fx.Node)
            or exponential.target is not aten.exp.default
        ):
            continue
        difference = exponential.args[0]
        if isinstance(difference, fx.Node) and difference.target is aten.sub.Tensor:
            value, largest = difference.args[:2]
            while isinstance(largest, fx.Node) and largest.target in (aten.unsqueeze.default, aten.alias.default):
                largest = largest.args[0]
            is_max = isinstance(largest, fx.Node) and largest in space.rows and REDUCTIONS[largest.target] == "max"
            if is_max and largest.args[0] is value and value.meta["val"].dtype == torch.float32:  # type: ignore[union-attr]
                pairs[node] = (value, largest)
    return pairs  # type: ignore[return-value]

"""The ops of a decomposed region as the emitter knows them, and what views do to an index.

A view computes nothing: where the element of its result lies in its operand is arithmetic on the index alone.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from memplan.codegen.index import Bounds, Index, Linear, broadcast, flat_strides, reshape

aten = torch.ops.aten
prims = torch.ops.prims

REDUCTIONS: dict[object, str] = {
    aten.sum.dim_IntList: "sum", aten.sum.default: "sum", prims.sum.default: "sum",
    aten.amax.default: "max", aten.amin.default: "min", aten.mean.dim: "mean", aten.mean.default: "mean",
    aten.any.dims: "any", aten.any.dim: "any", aten.any.default: "any",
    aten.var_mean.correction: "var_mean", aten.var.correction: "var",
}  # fmt: skip
RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
SQUEEZES = {aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default}
COPIES = {
    aten.clone.default, aten.alias.default, aten.detach.default, aten._to_copy.default, aten.lift_fresh_copy.default,
    aten.contiguous.default, prims.convert_element_type.default,
}  # fmt: skip
TABLES = {aten.gather.default, aten.scatter.value, aten.scatter.src}


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def operand_index(node: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    """The index into a view's operand of the element that ``index`` names in the view; None if the op is no view."""
    target, source = node.target, node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if target in COPIES:
        return index
    if target is operator.getitem:
        return _part_index(node, source, index)
    old = shape_of(source) if isinstance(source.meta["val"], torch.Tensor) else ()
    if _is_reshape(node):
        return reshape(index, shape_of(node), old, bounds)
    if target in SQUEEZES:
        return _move_ones(index, shape_of(node), old)
    if target is aten.expand.default:
        return broadcast(index, old)
    if target in (aten.permute.default, aten.transpose.int, aten.t.default):
        order = _permutation(node, len(old))
        return tuple(index[order.index(d)] for d in range(len(old)))
    if target is aten.slice.Tensor:
        dim, start, step = _argument(node, 1, 0) % len(old), _argument(node, 2, 0) or 0, _argument(node, 4, 1)
        start = max(0, start + old[dim] if start < 0 else start)
        return (*index[:dim], index[dim] * step + start, *index[dim + 1 :])
    if target is aten.select.int:
        dim, at = node.args[1] % len(old), node.args[2] % old[node.args[1]]  # type: ignore[operator,index]
        return (*index[:dim], Linear(const=at), *index[dim:])
    return None


def result_index(node: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    """The reverse of :func:`operand_index` for views that keep every element; None for others."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target in COPIES:
        return index
    if _is_reshape(node):
        return reshape(index, shape_of(source), shape_of(node), bounds)
    if node.target in SQUEEZES:
        return _move_ones(index, shape_of(source), shape_of(node))
    if node.target in (aten.permute.default, aten.transpose.int, aten.t.default):
        return tuple(index[d] for d in _permutation(node, len(index)))
    return None


def _is_reshape(node: fx.Node) -> bool:
    """A view that keeps the row-major order; ``as_strided`` of dense by dense is one."""
    if node.target is not aten.as_strided.default:
        return node.target in RESHAPES
    source: Any = node.args[0]
    value, size, stride = source.meta["val"], *node.args[1:3]
    same = value.is_contiguous() and list(stride) == flat_strides(size) and value.numel() == node.meta["val"].numel()  # type: ignore[arg-type]
    return same and not (len(node.args) > 3 and node.args[3])


def _argument(node: fx.Node, place: int, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else default


def _permutation(node: fx.Node, rank: int) -> list[int]:
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        return [d % rank for d in dims]
    order = list(range(rank))
    a, b = (node.args[1], node.args[2]) if node.target is aten.transpose.int else (0, rank - 1)
    order[a], order[b] = order[b], order[a]  # type: ignore[index]
    return order


def _move_ones(index: Index, old: tuple[int, ...], new: tuple[int, ...]) -> Index:
    real = iter([form for form, extent in zip(index, old) if extent != 1])
    return tuple(next(real) if extent != 1 else Linear() for extent in new)


def _part_index(node: fx.Node, source: fx.Node, index: Index) -> Index | None:
    """A part of a split tensor is a slice of it."""
    if source.target not in (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int):
        return None
    operand = source.args[0]
    assert isinstance(operand, fx.Node) and isinstance(node.args[1], int)
    rank, part = len(shape_of(operand)), node.args[1]
    if source.target is aten.unbind.int:
        dim = _argument(source, 1, 0) % rank
        return (*index[:dim], Linear(const=part), *index[dim:])
    dim = _argument(source, 2, 0) % rank
    sizes = source.args[1]
    start = sizes * part if isinstance(sizes, int) else sum(sizes[:part])  # type: ignore[arg-type,index]
    return (*index[:dim], index[dim] + start, *index[dim + 1 :])


def reduced_dims(node: fx.Node) -> tuple[int, ...]:
    """Dimensions of the operand that a reduction removes, ascending."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    rank = len(shape_of(operand))
    given = _argument(node, 1, None)
    if given is None or given == []:
        return tuple(range(rank))
    return tuple(sorted({d % rank for d in ([given] if isinstance(given, int) else given)}))


def reduced_count(node: fx.Node) -> int:
    """How many elements each result of a reduction is made of; 1 where it only drops dimensions."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    count = 1
    for d in reduced_dims(node):
        count *= shape_of(operand)[d]
    return count

"""What the cost of a node depends on: its target, and its arguments with every tensor replaced by its layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from memplan.torch_compat import size_hint


class Layout(NamedTuple):
    """A tensor without its data. Sizes and strides in elements; symbolic ones are taken at their hint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str  # torch device type

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def extent(self) -> int:
        """Elements of storage it spans: fewer than ``numel`` where it is expanded, more where it is strided."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=False))

    @property
    def nbytes(self) -> int:
        """Bytes of the elements it really holds."""
        return min(self.numel, self.extent) * self.dtype.itemsize


class Signature(NamedTuple):
    """Hashable: two nodes of one signature cost the same."""

    target: Any  # OpOverload or another callable
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def operands(self) -> list[Layout]:
        """The tensors among the arguments, nested ones included."""
        return layouts((self.args, tuple(value for _, value in self.kwargs)))


def signature(node: fx.Node) -> Signature:
    """Of a node whose arguments carry ``meta["val"]``. Arguments given by name move to their position where they can."""
    args = [describe(a) for a in node.args]
    if not node.kwargs:
        return Signature(node.target, tuple(args), ())
    named = {name: describe(value) for name, value in node.kwargs.items()}
    if isinstance(node.target, torch._ops.OpOverload):
        for argument in node.target._schema.arguments[len(args) :]:
            if argument.kwarg_only or argument.name not in named:
                break
            args.append(named.pop(argument.name))
    return Signature(node.target, tuple(args), tuple(named.items()))


def results(node: fx.Node) -> list[Layout]:
    """Layouts of the tensors a node returns."""
    return layouts(describe(node.meta.get("val")))


def layouts(described: Any) -> list[Layout]:
    """Every Layout in nested tuples."""
    if isinstance(described, Layout):
        return [described]
    if type(described) is tuple:
        return [layout for part in described for layout in layouts(part)]
    return []


def describe(value: Any) -> Any:
    """An argument or a result with every tensor, and every node of one, replaced by its layout."""
    if isinstance(value, fx.Node):
        return describe(value.meta.get("val"))
    if isinstance(value, torch.Tensor):
        stride = value.stride() if value.layout is torch.strided else ()
        return Layout(value.dtype, _concrete(value.shape), _concrete(stride), value.device.type)
    if isinstance(value, (list, tuple)):
        return tuple([describe(part) for part in value])
    if isinstance(value, torch.SymInt):
        return size_hint(value)
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return type(value).__name__
    if isinstance(value, dict):
        return tuple([(key, describe(part)) for key, part in value.items()])
    if isinstance(value, slice):
        return (describe(value.start), describe(value.stop), describe(value.step))
    return value


def _concrete(sizes: Sequence[int | torch.SymInt]) -> tuple[int, ...]:
    plain = tuple(sizes)
    for size in plain:
        if type(size) is not int:
            return tuple([size_hint(s) for s in plain])
    return plain  # type: ignore[return-value]

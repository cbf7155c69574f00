"""Views as what they come to: sizes, strides and an offset into the tensor that a kernel made or the caller gave."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from memplan.build_problem import view_source
from memplan.capture import is_getitem


@dataclass(frozen=True)
class Alias:
    """A view of ``root``, which is none. ``offset``: elements from the root's first one to the view's."""

    root: fx.Node
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def describes(self, view: object, root: object) -> bool:
        """Whether a real view of the real root is the one that tracing foresaw."""
        return (
            isinstance(view, torch.Tensor)
            and isinstance(root, torch.Tensor)
            and view.data_ptr() == root.data_ptr() + self.offset * root.element_size()
            and (view.size(), view.stride()) == (self.size, self.stride)
            and _kind(view) == _kind(root)
        )


def aliases(nodes: Iterable[fx.Node]) -> dict[fx.Node, Alias]:
    """The views among a graph's nodes whose sizes, strides and offset tracing knew as numbers."""
    found: dict[fx.Node, Alias] = {}
    for node in nodes:
        root = _root(node)
        if root is not node:
            alias = _alias(node.meta.get("val"), root)
            if alias is not None:
                found[node] = alias
    return found


def looked_at(node: fx.Node) -> fx.Node | None:
    """The node whose memory a view, or one of several views made at once, shows; None for all others."""
    return view_source(node.args[0] if is_getitem(node) else node)  # type: ignore[arg-type]


def is_known(tensor: torch.Tensor) -> bool:
    """Whether all that says where a tensor lies is numbers: where shapes are dynamic, some of it is symbols."""
    return all(type(n) is int for n in (*tensor.shape, *tensor.stride(), tensor.storage_offset()))


def _root(node: fx.Node) -> fx.Node:
    while (source := looked_at(node)) is not None:
        node = source
    return node


def _alias(view: object, root: fx.Node) -> Alias | None:
    base = root.meta.get("val")
    if not isinstance(view, torch.Tensor) or not isinstance(base, torch.Tensor) or _kind(view) != _kind(base):
        return None
    if view.layout != torch.strided or not all(map(is_known, (view, base))):
        return None
    return Alias(root, tuple(view.shape), view.stride(), int(view.storage_offset() - base.storage_offset()))


def _kind(tensor: torch.Tensor) -> tuple[object, ...]:
    """What a view may change besides the geometry."""
    return tensor.dtype, tensor.layout, tensor.is_conj(), tensor.is_neg()

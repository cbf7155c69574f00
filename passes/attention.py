"""Never make the scores: a written-out softmax(QKᵀ)V becomes scaled_dot_product_attention."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memplan import torch_compat
from memplan.passes.calls import argument, insert, name_of, only_user, rewritten, value_of
from memplan.runtime.attention import NOTHING, attend


@dataclass(frozen=True)
class _Scores:
    """How scores are made: ``query @ keys * scale``, then ``mask`` is added, or hides where it is True as ``fill`` does."""

    query: fx.Node
    keys: fx.Node
    scale: float
    mask: fx.Node | None
    fill: float | None
    inverted: bool  # the mask is True where scores stay


@dataclass(frozen=True)
class FuseAttention:
    """Runs on dynamo's graph, so that AOTAutograd derives the backward of the fused kernel.

    The pattern: a product of 3 or 4 dimensions, scaled by numbers, one mask that is added or hides (``masked_fill``,
    ``where``), a softmax over the last dimension, and a product. Left alone: dropout that drops (its draws would be
    others), masks that are learned, scores that are read elsewhere, what torch would not give to a fused kernel.
    A row that -inf hides as a whole is NaN in eager and uniform here.
    """

    name: ClassVar[str] = "fuse-attention"
    for_memory_alone: ClassVar[bool] = False

    def apply(self, graph_module: fx.GraphModule) -> fx.GraphModule | None:
        """The rewritten copy; None where nothing is to be rewritten."""
        return rewritten(graph_module, lambda node: name_of(node) == "softmax", _rewrite)


def _rewrite(graph: fx.Graph, softmax: fx.Node) -> bool:
    value = value_of(softmax)
    if value is None or argument(softmax, 1, "dim") not in (-1, value.dim() - 1) or value.dim() not in (3, 4):
        return False
    product = _product_behind(softmax)
    scores = _scores(softmax.args[0])
    if product is None or scores is None or not _is_fused_by_torch(scores, product):
        return False
    mask = insert(graph, product, operator.invert, (scores.mask,)) if scores.inverted else scores.mask
    made = value_of(product)
    assert made is not None
    args = (scores.query, scores.keys, product.args[1], mask, scores.fill, scores.scale, made.dtype)
    product.replace_all_uses_with(insert(graph, product, attend, args))
    graph.erase_node(product)
    return True


def _product_behind(softmax: fx.Node) -> fx.Node | None:
    """The product with the values, past casts and a dropout that drops nothing; None for anything else."""
    node = softmax
    while (user := only_user(node)) is not None and user.args and user.args[0] is node:
        if name_of(user) == "matmul":
            return user
        if name_of(user) == "dropout":
            if argument(user, 1, "p", 0.5) and argument(user, 2, "training", True):
                return None
        elif name_of(user) not in ("to", "type", "type_as", "float"):
            return None
        node = user
    return None


def _scores(node: Any) -> _Scores | None:
    """What a softmax reads, walked back to the product of queries and keys; None for anything but the pattern."""
    mask: fx.Node | None = None
    fill: float | None = None
    scale, inverted = 1.0, False
    while isinstance(node, fx.Node) and only_user(node) is not None and value_of(node) is not None:
        name, args = name_of(node), node.args
        if name == "matmul":
            return _Scores(args[0], args[1], scale, mask, fill, inverted)  # type: ignore[arg-type]
        if name in ("mul", "div") and len(args) == 2 and isinstance(args[1], (int, float)) and not node.kwargs:
            scale *= args[1] if name == "mul" else 1 / args[1]
        elif name in ("add", "masked_fill", "where"):
            if mask is not None or scale != 1.0 or node.kwargs:  # two masks, or one that is scaled
                return None
            node, mask, fill, inverted = _unmasked(name, args)
            if mask is None or (fill is None) != (name == "add"):
                return None
            continue
        elif name not in ("float", "to"):
            return None
        node = args[0]
    return None


def _unmasked(name: str, args: tuple[Any, ...]) -> tuple[Any, Any, float | None, bool]:
    """(scores, mask, fill, whether the mask is True where scores stay) of an op that masks scores."""
    if name == "where":
        return args[1], args[0], _nothing(args[2]), True
    if name == "masked_fill":
        return args[0], args[1], _nothing(args[2]), False
    made = ("matmul", "mul", "div", "float", "to")
    scores, mask = args if name_of(args[0]) in made else args[::-1]
    return scores, mask, None, False


def _nothing(value: Any) -> float | None:
    """A number, or a tensor filled with one, that hides a score; None for anything else."""
    if isinstance(value, fx.Node):
        place = {"full": 1, "tensor": 0, "scalar_tensor": 0}.get(name_of(value))
        value = None if place is None else argument(value, place, "fill_value")
    hides = isinstance(value, (int, float)) and value <= NOTHING
    return float(value) if hides else None


def _is_fused_by_torch(scores: _Scores, product: fx.Node) -> bool:
    """Whether torch has a kernel for these operands that makes no scores."""
    query, keys, value = (value_of(n) for n in (scores.query, scores.keys, product.args[1]))
    mask = value_of(scores.mask)
    if query is None or keys is None or value is None or (scores.mask is not None and mask is None):
        return False
    if query.dim() not in (3, 4) or not query.dim() == keys.dim() == value.dim():
        return False
    if mask is not None and (mask.requires_grad or (mask.dtype == torch.bool) != (scores.fill is not None)):
        return False

    def stand_in(query: torch.Tensor, keys: torch.Tensor, value: torch.Tensor, *mask: torch.Tensor) -> torch.Tensor:
        return attend(query, keys, value, mask[0] if mask else None, scores.fill, scores.scale, query.dtype)

    operands = [query, keys, value, *([] if mask is None else [mask])]
    traced = torch_compat.trace_fake(stand_in, torch_compat.fakes_like(operands))
    return any("_scaled_dot_product" in str(n.target) for n in traced.graph.nodes)

"""Attention whose key and value heads serve several query heads each: never repeat them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from memplan import torch_compat
from memplan.passes.calls import argument, name_of, rewritten, value_of

_NAME = "scaled_dot_product_attention"
_ALL = slice(None, None, None)


@dataclass(frozen=True)
class GroupedHeads:
    """Runs on dynamo's graph, so that autograd derives the backward. Keys and values [B, H, N, E] whose every head is
    repeated for the query heads that it serves (grouped-query attention, Ainslie et al., EMNLP 2023) are given to the
    kernel as they are, where torch has a fused kernel that takes them so.

    The forward's bits stay; the gradients of keys and values are summed over the repeated heads within the kernel.
    """

    name: ClassVar[str] = "grouped-heads"

    def apply(self, graph_module: fx.GraphModule) -> fx.GraphModule | None:
        """The rewritten copy; None where nothing is to be rewritten."""
        if not any(_is_repeated(node) for node in graph_module.graph.nodes):
            return None
        return rewritten(graph_module, _is_repeated, _regroup)


def _is_repeated(node: fx.Node) -> bool:
    return name_of(node) == _NAME and len(node.args) >= 3 and all(_unrepeated(n) for n in node.args[1:3])


def _regroup(_: fx.Graph, node: fx.Node) -> bool:
    query, key, value = node.args[0], _unrepeated(node.args[1]), _unrepeated(node.args[2])
    if node.kwargs.get("enable_gqa") or not _stays_fused(node, query, key, value):
        return False
    node.args = (query, key, value, *node.args[3:])
    node.kwargs = {**node.kwargs, "enable_gqa": True}
    return True


def _unrepeated(node: Any) -> fx.Node | None:
    """[B, G, N, E] where ``node`` is [B, H, N, E] with every head of it repeated in place; None for anything else."""
    whole = value_of(node)
    if whole is None or whole.dim() != 4:
        return None
    if name_of(node) == "repeat_interleave":
        source = node.args[0] if argument(node, 2, "dim") in (1, -3) else None
        times = argument(node, 1, "repeats")
        return source if isinstance(times, int) and _serves(value_of(source), whole) else None
    repeated = node.args[0]
    if name_of(node) != "view" or not isinstance(repeated, fx.Node) or name_of(repeated) != "expand":
        return None
    one = repeated.args[0]
    source = _before_third(one) if isinstance(one, fx.Node) else None
    heads, five = value_of(source), value_of(repeated)
    if heads is None or five is None or not _serves(heads, whole):
        return None
    batch, groups, length, width = heads.shape
    return source if five.shape == (batch, groups, whole.shape[1] // groups, length, width) else None


def _before_third(node: fx.Node) -> Any:
    """What ``node`` looks at with a new third dimension."""
    if name_of(node) == "unsqueeze":
        return node.args[0] if argument(node, 1, "dim") in (2, -3) else None
    whole = (_ALL, _ALL, None, _ALL, _ALL)
    return node.args[0] if name_of(node) == "getitem" and node.args[1] in (whole[:3], whole) else None


def _serves(heads: torch.Tensor | None, whole: torch.Tensor) -> bool:
    if heads is None or heads.dim() != 4 or whole.shape[1] == heads.shape[1] or whole.shape[1] % heads.shape[1]:
        return False
    return (heads.shape[0], *heads.shape[2:]) == (whole.shape[0], *whole.shape[2:])


def _stays_fused(node: fx.Node, *operands: Any) -> bool:
    """Whether torch gives grouped heads to a kernel that makes no scores and repeats nothing."""
    values = [value_of(n) for n in operands]
    mask = argument(node, 3, "attn_mask")
    given = [v for v in (*values, value_of(mask)) if v is not None]
    computed = value_of(node)
    if computed is None or len(given) != 3 + (mask is not None):
        return False
    dropout, causal = argument(node, 4, "dropout_p", 0.0), argument(node, 5, "is_causal", False)

    def grouped(*given: torch.Tensor) -> torch.Tensor:
        # autocast, which is off here, may have narrowed what the call computes with
        query, key, value, *mask = (t.to(computed.dtype) if t.is_floating_point() else t for t in given)
        hides = mask[0] if mask else None
        return scaled_dot_product_attention(query, key, value, hides, dropout, causal, enable_gqa=True)

    traced = torch_compat.trace_fake(grouped, torch_compat.fakes_like(given))
    targets = [str(n.target) for n in traced.graph.nodes if n.op == "call_function"]
    return any("_scaled_dot_product" in t for t in targets) and not any("bmm" in t or "clone" in t for t in targets)

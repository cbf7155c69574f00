"""Attention under a mask that is known before the graph runs: the kernel is told what it hides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memplan import torch_compat
from memplan.passes.values import Constants

aten = torch.ops.aten

_ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


@dataclass(frozen=True)
class KnownMasks:
    """Runs on a captured graph. A mask that no input decides and that hides nothing, or each query's later keys alone,
    becomes the kernel's own: it then computes no score that is hidden, and no mask is made or saved for the backward.

    Models build such masks from the numbers of the positions while they are traced; run eagerly, they ask for the
    kernel's own themselves. The bits are the same: what is hidden weighs exactly nothing.
    """

    name: ClassVar[str] = "known-masks"

    def apply(self, graph_module: fx.GraphModule) -> bool:
        """Returns whether the graph changed."""
        graph = graph_module.graph
        masked = [n for n in graph.nodes if n.target in _ATTENTION and isinstance(_given(n, "attn_mask"), fx.Node)]
        if not masked:
            return False
        constants = Constants(graph)
        verdicts: dict[int, str] = {}
        modified = False
        for node in masked:
            mask: fx.Node = _given(node, "attn_mask")
            number = constants.numbers[mask]
            if number not in verdicts:
                verdicts[number] = what_is_hidden(constants.value(mask))
            modified |= _tell(node, verdicts[number])
        if modified:
            graph.eliminate_dead_code()
            graph_module.recompile()
        return modified


def what_is_hidden(mask: torch.Tensor | None) -> str:
    """Of a mask that is added to scores ([.., queries, keys]): "nothing", "later" keys of each query, or "" for
    anything else."""
    if not isinstance(mask, torch.Tensor) or not mask.is_floating_point() or mask.dim() < 2:
        return ""
    queries, keys = mask.shape[-2:]
    with torch_compat.disable_current_modes():
        if not mask.any():
            return "nothing"
        if queries != keys:  # which of them come later is then the kernel's to say
            return ""
        later = torch.ones(queries, keys, dtype=torch.bool).triu(1)
        hidden = mask <= torch.finfo(mask.dtype).min
        is_causal = torch.equal(hidden, later.expand_as(mask)) and not mask.masked_fill(hidden, 0).any()
    return "later" if is_causal else ""


def _tell(node: fx.Node, hidden: str) -> bool:
    if not hidden or _given(node, "is_causal"):
        return False
    query, key = (_given(node, name).meta["val"] for name in ("query", "key"))
    if torch_compat.free_symbols(query) or torch_compat.free_symbols(key) or query.shape[-2] != key.shape[-2]:
        return False
    _give(node, "attn_mask", None)
    _give(node, "is_causal", hidden == "later")
    return True


def _place(node: fx.Node, name: str) -> tuple[int, Any]:
    """Position of an argument among those of the op, and its default."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    at = next(k for k, argument in enumerate(arguments) if argument.name == name)
    return at, arguments[at].default_value if arguments[at].has_default_value() else None


def _given(node: fx.Node, name: str) -> Any:
    at, default = _place(node, name)
    return node.args[at] if at < len(node.args) else node.kwargs.get(name, default)


def _give(node: fx.Node, name: str, value: Any) -> None:
    at, _ = _place(node, name)
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)

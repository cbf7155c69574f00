"""Log-probabilities that regions can make again: logits, and the maximum and the logarithm of the sum of each row."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memplan import torch_compat

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitLogSoftmax:
    """Runs on a captured graph whose plan will have Inductor's regions. A log-softmax that its backward reads becomes
    the arithmetic of its kernel, (x - max x) - log Σ exp(x - max x): a region of the backward then repeats the two
    differences, from logits that are held anyway, and what is saved is two numbers a row in place of the whole matrix.

    Only where logits and result are of one wide dtype: of narrow ones the kernel rounds the result alone.
    """

    name: ClassVar[str] = "split-log-softmax"

    def apply(self, graph_module: fx.GraphModule) -> bool:
        """Returns whether the graph changed."""
        graph = graph_module.graph
        found = [n for n in graph.nodes if n.target is aten._log_softmax.default and _is_plain(n)]
        for node in found:
            _split(graph, node)
        if found:
            graph_module.recompile()
        return bool(found)


def _is_plain(node: fx.Node) -> bool:
    logits, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return (
        any(user.target is aten._log_softmax_backward_data.default for user in node.users)
        and logits.dtype == result.dtype
        and result.dtype in (torch.float32, torch.float64)
        and not torch_compat.free_symbols(result)
        and (result.numel() > 0 and result.dim() > 0)
        and logits.stride() == result.stride()
    )


def _split(graph: fx.Graph, node: fx.Node) -> None:
    logits, dim, _ = node.args

    def call(target: Any, *args: Any) -> fx.Node:
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        made = graph.call_function(target, args)
        made.meta = copy.copy(node.meta) | {"val": target(*values)}
        return made

    with graph.inserting_before(node), torch_compat.fake_mode_of([node.meta["val"]]):
        shifted = call(aten.sub.Tensor, logits, call(aten.amax.default, logits, [dim], True))
        total = call(aten.sum.dim_IntList, call(aten.exp.default, shifted), [dim], True)
        result = call(aten.sub.Tensor, shifted, call(aten.log.default, total))
    node.replace_all_uses_with(result)
    graph.erase_node(node)

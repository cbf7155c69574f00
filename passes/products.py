"""Let every matrix product run in the library that is fastest at its shape: torch's BLAS, or oneDNN."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memplan import torch_compat
from memplan.cost import CostModel

aten = torch.ops.aten

# Of the time of torch's own kernel: two measurements of one kernel differ by less on a quiet machine.
_FASTER = 0.97
# Bytes of workspace that speed may cost: blocks of a packed weight took up to 132 KB. MKL's come from memory that it
# keeps, and oneDNN copies a transposed first operand as a whole, 123 MB for the logits of 30,000 words.
_PACKED = 256 * 1024
# Terms of a sum: MKL adds up in parts, oneDNN in one chain. Against float64, the error of random products was 1.4 times
# MKL's up to 384 terms, 1.5 to 1.7 times above, and 2.2 times at 3,072.
_TERMS = 384


@dataclass(frozen=True)
class ChooseProducts:
    """Runs on a captured graph, where kernels of other bits are allowed: a library adds up in an order of its own.

    Torch's BLAS is MKL, which runs AVX2 code on processors that are not Intel's; oneDNN's just-in-time kernels use what
    the processor has. Which wins differs from shape to shape, and ``cost`` decides: an estimate that knows no libraries
    changes nothing. Only products in float32 on the CPU: for narrower dtypes torch asks oneDNN itself.
    """

    name: ClassVar[str] = "choose-products"
    cost: CostModel

    def apply(self, graph_module: fx.GraphModule) -> bool:
        """Returns whether the graph changed."""
        graph, linear = graph_module.graph, torch_compat.onednn_linear()
        if linear is None:
            return False
        modified = [self._choose(graph, node, linear) for node in list(graph.nodes) if node.target in _PRODUCTS]
        if any(modified):
            graph.eliminate_dead_code()
            graph_module.recompile()
        return any(modified)

    def _choose(self, graph: fx.Graph, node: fx.Node, linear: Any) -> bool:
        """oneDNN's op multiplies by the transpose of its second operand, and adds a row at most."""
        *bias, left, right = node.args
        if not all(_is_plain(operand) for operand in (node, left, right, *bias)):
            return False
        if left.meta["val"].shape[1] > _TERMS:  # type: ignore[union-attr]
            return False
        if bias and (node.kwargs or bias[0].meta["val"].dim() != 1):  # type: ignore[union-attr]
            return False
        with graph.inserting_before(node):
            weight = _transposed(graph, right)  # type: ignore[arg-type]
            other = graph.call_function(linear, (left, weight, bias[0] if bias else None, "none", [], ""))
        other.meta = copy.copy(node.meta)
        own, found = self.cost.cost(node), self.cost.cost(other)
        if found.time >= _FASTER * own.time or found.workspace > own.workspace + _PACKED:
            graph.erase_node(other)
            if not weight.users:
                graph.erase_node(weight)
            return False
        node.replace_all_uses_with(other)
        graph.erase_node(node)
        return True


_PRODUCTS = {aten.mm.default, aten.addmm.default}


def _is_plain(operand: Any) -> bool:
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    return (
        isinstance(value, torch.Tensor)
        and (value.dtype, value.device.type) == (torch.float32, "cpu")
        and not torch_compat.free_symbols(value)
        and value.numel() > 0
    )


def _transposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if node.target is aten.t.default:
        return node.args[0]  # type: ignore[return-value]
    turned = graph.call_function(aten.t.default, (node,))
    turned.meta = copy.copy(node.meta) | {"val": node.meta["val"].t()}
    return turned

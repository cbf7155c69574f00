"""Never gather an expert's matrix for each of its rows: rows are sorted by expert instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memplan.passes.calls import argument, insert, name_of, only_user, rewritten, value_of
from memplan.runtime.experts import multiply_gathered


@dataclass(frozen=True)
class GroupExperts:
    """Runs on dynamo's graph, so that autograd derives the backward of the grouped products.

    The pattern, of a mixture of experts whose routing must not break the graph: matrices [E, D, N] looked up by an expert
    a row, and their batched product with one vector each. Rewritten, it makes neither those copies nor, backward, a
    gradient of each; results and gradients are sums in another order. Left alone: copies that are read elsewhere, and
    rows of several vectors.
    """

    name: ClassVar[str] = "group-experts"
    for_memory_alone: ClassVar[bool] = False

    def apply(self, graph_module: fx.GraphModule) -> fx.GraphModule | None:
        """The rewritten copy; None where nothing is to be rewritten."""
        return rewritten(graph_module, lambda node: name_of(node) == "matmul" and len(node.args) == 2, _rewrite)


def _rewrite(graph: fx.Graph, product: fx.Node) -> bool:
    left, right = product.args
    for copies, vectors, from_left in ((left, right, False), (right, left, True)):
        looked_up, given, made = _looked_up(copies), value_of(vectors), value_of(product)
        if looked_up is None or given is None or made is None or given.dim() != 3:
            continue
        if given.shape[1 if from_left else 2] != 1 or given.shape[0] != made.shape[0]:
            continue
        args = (*looked_up, vectors, from_left, made.dtype)
        product.replace_all_uses_with(insert(graph, product, multiply_gathered, args))
        graph.erase_node(product)
        return True
    return False


def _looked_up(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(matrices [E, D, N], the expert of each row [S]) where ``node`` looks up a matrix a row and is read once."""
    whole = value_of(node)
    if whole is None or whole.dim() != 3 or only_user(node) is None:
        return None
    if name_of(node) == "getitem":
        index = node.args[1]
        if isinstance(index, tuple) and len(index) == 1:
            (index,) = index
    elif name_of(node) == "index_select" and argument(node, 1, "dim") == 0:
        index = argument(node, 2, "index")
    else:
        return None
    matrices, experts = value_of(node.args[0]), value_of(index)
    if matrices is None or experts is None or matrices.dim() != 3 or experts.dim() != 1:
        return None
    if experts.dtype not in (torch.int32, torch.int64) or not len(experts) or not matrices.is_floating_point():
        return None
    return node.args[0], index

"""Whether the values of a graph are described as its ops make them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memplan import torch_compat
from memplan.capture import tensors
from memplan.passes.dtypes import GROUPS_BACKWARD, NORMS

# Of these torch's fake results are wrong; dropout's lies as its first operand does.
_MISTAKEN = (*NORMS, GROUPS_BACKWARD, torch.ops.aten.native_dropout_backward.default)


def misdescribed(graph_module: fx.GraphModule) -> list[str]:
    """Ops of aten whose fake result, made from the described operands, has another shape, dtype or layout than the
    described one: a pass put something else in an operand's place. Empty where all is well."""
    found = []
    nodes = [n for n in graph_module.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    with torch.no_grad(), torch_compat.fake_mode_of(list(tensors([n.meta.get("val") for n in nodes]))):
        for node in nodes:
            around = (node, *node.all_input_nodes)
            if node.target in _MISTAKEN or not all("val" in n.meta for n in around):
                continue
            if any(torch_compat.free_symbols(n.meta["val"]) for n in around):
                continue  # with unknown sizes torch's fakes of some ops, _trilinear's among them, fail
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            made = node.target(*args, **kwargs)
            if _kinds(made) != _kinds(node.meta["val"]):
                found.append(f"{node.format_node()}: described {_kinds(node.meta['val'])}, made {_kinds(made)}")
    return found


def _kinds(value: Any) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors(value)]

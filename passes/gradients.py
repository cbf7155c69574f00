"""Parameters' gradients as the parameters lie in memory, so that the copy autograd would make is part of the plan."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from memplan import torch_compat
from memplan.capture import is_tangent


@dataclass(frozen=True)
class DenseGradients:
    """Clones each parameter's gradient that is laid out otherwise than its parameter, a transposed product for one.

    Autograd keeps a gradient only if its layout follows the parameter's (torch's AccumulateGrad) and copies it else:
    at the end of the backward, when all gradients exist, and outside of what is planned. Here the copy is an op of the
    graph. Runs on the captured joint graph.
    """

    name: ClassVar[str] = "dense-gradients"
    num_forward_outputs: int
    parameters: Collection[int]  # positions among the graph's primals

    def apply(self, graph_module: fx.GraphModule) -> bool:
        """Returns whether the graph changed."""
        graph = graph_module.graph
        output = graph.output_node()
        primals = [n for n in graph.nodes if n.op == "placeholder" and not is_tangent(n)]
        results = list(output.args[0])  # type: ignore[arg-type]
        gradients = results[self.num_forward_outputs :]
        modified = False
        for k, (primal, gradient) in enumerate(zip(primals, gradients, strict=False)):
            if k in self.parameters and isinstance(gradient, fx.Node):
                wanted = _format_to_keep(primal, gradient)
                if wanted is not None:
                    results[self.num_forward_outputs + k] = _clone(graph, gradient, wanted)
                    modified = True
        if modified:
            output.args = (results,)
            graph_module.recompile()
        return modified


def _format_to_keep(primal: fx.Node, gradient: fx.Node) -> torch.memory_format | None:
    """The parameter's memory format, if the gradient does not have it; None where autograd takes the gradient as is."""
    parameter, value = primal.meta["val"], gradient.meta["val"]
    if parameter.layout != torch.strided or parameter.shape != value.shape or torch_compat.free_symbols(value):
        return None
    for wanted in (torch.contiguous_format, torch.channels_last) if value.dim() == 4 else (torch.contiguous_format,):
        if parameter.is_contiguous(memory_format=wanted):
            return None if value.is_contiguous(memory_format=wanted) else wanted
    return None


def _clone(graph: fx.Graph, gradient: fx.Node, wanted: torch.memory_format) -> fx.Node:
    with graph.inserting_after(gradient):
        new = graph.call_function(torch.ops.aten.clone.default, (gradient,), {"memory_format": wanted})
    value = gradient.meta["val"]
    mode = torch_compat.detect_fake_mode([value])
    new.meta = copy.copy(gradient.meta)
    with mode if mode is not None else contextlib.nullcontext():
        new.meta["val"] = torch.empty_like(value, memory_format=wanted)
    return new

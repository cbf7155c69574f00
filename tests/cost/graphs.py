"""Graphs of aten ops over fake tensors for the cost model's tests."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx


def trace(function: Callable[..., Any], *inputs: torch.Tensor, symbolic: bool = False) -> fx.GraphModule:
    """``function`` as a graph of aten ops whose ``meta["val"]`` are fake."""
    return make_fx(lambda *given: function(*given), tracing_mode="symbolic" if symbolic else "fake")(*inputs)


def calls(graph_module: fx.GraphModule) -> Sequence[fx.Node]:
    """The aten ops of a graph, in order."""
    return [
        n for n in graph_module.graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload)
    ]


def only(function: Callable[..., Any], *inputs: torch.Tensor, symbolic: bool = False) -> fx.Node:
    """The last aten op of ``function``."""
    return calls(trace(function, *inputs, symbolic=symbolic))[-1]

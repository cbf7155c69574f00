"""Let convolutions work on images whose channels lie innermost, and with them all that stands between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from memplan import torch_compat
from memplan.passes.calls import copied, insert, name_of, value_of


@dataclass(frozen=True)
class ChannelsLast:
    """A rewrite of dynamo's graph: what a convolution reads is laid out channels-last first, where it is not already.

    A CPU's convolutions then read and write without turning images into blocks and back; norms, activations and sums keep
    the layout of what they read, so that one copy at the first convolution is all that is added. Kernels of another
    layout add up in another order: equal to rounding, where the norms between are regions (``codegen/decompositions.py``).
    What the caller gets keeps its strides. Left alone: other devices, and graphs where another layout makes a copy of what
    was a view and is written to, or makes a view impossible.
    """

    name: ClassVar[str] = "channels-last"
    for_memory_alone: ClassVar[bool] = False

    def apply(self, graph_module: fx.GraphModule) -> fx.GraphModule | None:
        """A copy; None where nothing is to be rewritten."""
        given = _given(graph_module)
        if given is None or not any(_is_loose(node) for node in graph_module.graph.nodes):
            return None
        module = copied(graph_module)
        twins = dict(zip(graph_module.graph.nodes, module.graph.nodes, strict=True))
        for node in list(module.graph.nodes):
            if _is_loose(node):
                _lay_out(module.graph, node)
        try:
            before, after = _values(graph_module, given), _values(module, given)
        except (RuntimeError, ValueError):  # a view of what no longer lies as it did
            return None
        if not all(_is_kept(node, twin, before, after) for node, twin in twins.items()):
            return None
        if not _restore_outputs(graph_module, module, before, after):
            return None
        module.recompile()
        return module


def _given(graph_module: fx.GraphModule) -> list[Tensor] | None:
    """What the placeholders stand for; None for graphs of unknown sizes, or with constants or graphs of their own."""
    if any(node.op in ("get_attr", "call_module") for node in graph_module.graph.nodes):
        return None
    values = [value_of(node) for node in graph_module.graph.nodes if node.op == "placeholder"]
    found = [value for value in values if value is not None]
    return found if len(found) == len(values) and found else None


def _is_loose(node: fx.Node) -> bool:
    value = value_of(node)
    return name_of(node) == "conv2d" and value is not None and value.dim() == 4 and value.device.type == "cpu"


def _lay_out(graph: fx.Graph, node: fx.Node) -> None:
    first = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(first, fx.Node)
    node.replace_input_with(first, insert(graph, node, _channels_last, (first,)))


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _values(module: fx.GraphModule, given: list[Tensor]) -> Mapping[fx.Node, Any]:
    """Of every node, over fake arguments of its own. RuntimeError or ValueError where an op refuses its operands' layout."""
    fakes = torch_compat.fakes_like(given)
    mode = torch_compat.detect_fake_mode(fakes)
    assert mode is not None
    with torch.no_grad(), mode:
        recorder = fx.Interpreter(module, garbage_collect_values=False)
        recorder.run(*fakes)
    return dict(recorder.env)


def _is_kept(node: fx.Node, twin: fx.Node, before: Mapping[fx.Node, Any], after: Mapping[fx.Node, Any]) -> bool:
    """Whether a view is a view as it was, or at least of what nobody writes to."""
    value = before.get(node)
    if not isinstance(value, Tensor) or node.op == "output":
        return True
    for operand, other in zip(node.all_input_nodes, twin.all_input_nodes, strict=True):
        viewed = before[operand]
        if isinstance(viewed, Tensor) and _share(viewed, value) and not _share(after[other], after[twin]):
            return value._version == 0
    return True


def _share(one: Tensor, other: Tensor) -> bool:
    return torch_compat.storage_key(one) == torch_compat.storage_key(other)


def _restore_outputs(
    graph_module: fx.GraphModule, module: fx.GraphModule, before: Mapping[fx.Node, Any], after: Mapping[fx.Node, Any]
) -> bool:
    """Whether what is returned could be laid out as it was."""
    old, new = (m.graph.output_node() for m in (graph_module, module))
    for node, twin in zip(old.all_input_nodes, new.all_input_nodes, strict=True):
        was, now = before[node], after[twin]
        if not isinstance(was, Tensor) or was.stride() == now.stride():
            continue
        if not was.is_contiguous():
            return False
        new.replace_input_with(twin, insert(module.graph, new, Tensor.contiguous, (twin,)))
    return True

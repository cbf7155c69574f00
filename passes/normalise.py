"""Rewrite what hides a decision from the planner: fused random ops, operands nobody reads. Values stay the same."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx

from memplan import torch_compat
from memplan.capture import EAGER, is_random
from memplan.runtime.random import draw, dropout_mask, rng_state

aten = torch.ops.aten


@dataclass(frozen=True)
class Normalise:
    """Runs on the captured joint graph, before the Problem is read from it.

    * CPU dropout becomes its mask (random, a byte an element) and the masking (recomputable from the mask), with the
      arithmetic of aten's own CPU kernel.
    * A random op gets its generator's state as an operand, so that it may run again from that state.
    * A functional copy into a contiguous tensor becomes a clone of what is copied: aten's would read, and clone with its
      whole storage, the tensor that it overwrites.
    * A copy that changes nothing (dropout of probability 0 leaves one) disappears, as it does in eager.
    * A batch norm's backward in training ignores the running statistics; they are no longer held for it.
    * A convolution's backward becomes the gradient of the weight, then that of the input, two kernels within aten's one:
      what it reads dies between them.
    """

    name: ClassVar[str] = "normalise"

    def apply(self, graph_module: fx.GraphModule) -> bool:
        """Returns whether the graph changed."""
        graph = graph_module.graph
        modified = False
        for node in list(graph.nodes):
            rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
            modified |= rewrite is not None and rewrite(graph, node)
        for node in list(graph.nodes):
            modified |= node.op == "call_function" and is_random(node) and _with_state(graph, node)
        if modified:
            graph.eliminate_dead_code()
            graph_module.recompile()
        return modified


def _split_dropout(graph: fx.Graph, node: fx.Node) -> bool:
    source, p, train = cast(tuple[fx.Node, float, bool], node.args)
    value = source.meta["val"]
    if value.device.type != "cpu" or not train or p == 0 or torch_compat.free_symbols(value):
        return False
    with graph.inserting_before(node):
        masked, kept = node.meta["val"]
        size, stride = list(masked.shape), list(masked.stride())
        mask = _call(graph, node, dropout_mask, (size, stride, 1.0 - p, value.device), kept)
        mask.meta[EAGER] = masked  # numbers to multiply with, of the operand's type
        out = _call(
            graph,
            node,
            aten.native_dropout_backward.default,
            (source, mask, 1.0 / (1.0 - p) if p < 1 else 0.0),
            masked,
            name="dropout",
        )
    for user in list(node.users):
        user.replace_all_uses_with(out if user.args[1] == 0 else mask)
        graph.erase_node(user)
    graph.erase_node(node)
    return True


def _drop_running_statistics(graph: fx.Graph, node: fx.Node) -> bool:
    train = node.args[7]
    if not train or node.args[3] is None:
        return False
    node.args = (*node.args[:3], None, None, *node.args[5:])
    return True


def _drop_copy(graph: fx.Graph, node: fx.Node) -> bool:
    """Only inside the graph: arguments and results keep a storage of their own."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"], node.meta["val"]
    if node.kwargs.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
        return False
    if before.stride() != after.stride() or before.untyped_storage().nbytes() != after.untyped_storage().nbytes():
        return False
    outside = {torch_compat.storage_key(t) for n in _border(graph) for t in _values(n)}
    if {torch_compat.storage_key(before), torch_compat.storage_key(after)} & outside:
        return False
    node.replace_all_uses_with(source)
    graph.erase_node(node)
    return True


def _split_convolution(graph: fx.Graph, node: fx.Node) -> bool:
    *rest, wanted = cast(tuple[Any, ...], node.args)
    values = node.meta["val"]
    if not wanted[0] or not any(wanted[1:]):
        return False
    gradient, source, *rest = rest
    with graph.inserting_before(node):
        of_weight = _call(
            graph, node, node.target, (gradient, source, *rest, [False, *wanted[1:]]), (None, *values[1:])
        )
        shape = _shaped_as(graph, node, gradient, source)
        of_input = _call(
            graph, node, node.target, (gradient, shape, *rest, [True, False, False]), (values[0], None, None)
        )
    for user in list(node.users):
        user.update_arg(0, of_weight if user.args[1] else of_input)
    graph.erase_node(node)
    return True


def _shaped_as(graph: fx.Graph, node: fx.Node, memory: fx.Node, source: fx.Node) -> fx.Node:
    """A view of ``memory`` that looks like ``source``, where it is large enough; else ``source`` itself.

    For kernels that ask a tensor for its shape alone: a convolution is linear, the gradient of its input no function of
    the input."""
    given, value = memory.meta["val"], source.meta["val"]
    mode = torch_compat.detect_fake_mode([given])
    if mode is None or torch_compat.free_symbols(given) or torch_compat.free_symbols(value):
        return source
    if not _is_dense(given) or not _is_dense(value) or given.storage_offset() != 0:
        return source
    if given.numel() < value.numel() or given.dtype != value.dtype:
        return source
    args = (list(value.shape), list(value.stride()), 0)
    with mode:
        view = given.as_strided(*args)
    return _call(graph, node, aten.as_strided.default, (memory, *args), view)


def _is_dense(value: torch.Tensor) -> bool:
    return value.is_contiguous() or (value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last))


def _copy_as_clone(graph: fx.Graph, node: fx.Node) -> bool:
    """For equal shapes and dtypes; ``new_empty_strided`` and the like are then read by nothing."""
    target, source = node.args[0], node.args[1]
    if not isinstance(target, fx.Node) or not isinstance(source, fx.Node):
        return False
    value, given = node.meta["val"], source.meta["val"]
    if torch_compat.free_symbols(value) or torch_compat.free_symbols(given):
        return False
    if (given.shape, given.dtype, given.device) != (value.shape, value.dtype, value.device):
        return False
    if not value.is_contiguous() or value.storage_offset() != 0:
        return False
    mode = torch_compat.detect_fake_mode([value])
    with mode if mode is not None else contextlib.nullcontext():
        fresh = torch.empty_like(value, memory_format=torch.contiguous_format)
    with graph.inserting_before(node):
        new = _call(graph, node, aten.clone.default, (source,), fresh)
    new.kwargs = {"memory_format": torch.contiguous_format}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


def _border(graph: fx.Graph) -> list[fx.Node]:
    """Nodes whose values the caller sees: placeholders, constants and results."""
    output = graph.output_node()
    return [*(n for n in graph.nodes if n.op in ("placeholder", "get_attr")), *output.all_input_nodes]


_REWRITES: dict[Any, Callable[[fx.Graph, fx.Node], bool]] = {
    aten.clone.default: _drop_copy,
    aten.copy.default: _copy_as_clone,
    aten.convolution_backward.default: _split_convolution,
    aten.native_dropout.default: _split_dropout,
    aten.native_batch_norm_backward.default: _drop_running_statistics,
}


def _with_state(graph: fx.Graph, node: fx.Node) -> bool:
    """Random op → ``draw(state, device, op, …)``, the state read just before."""
    mode = torch_compat.detect_fake_mode(_values(node))
    if mode is None:
        return False
    device = next(iter(_values(node))).device
    label = "cpu" if device.type == "cpu" else str(device)
    with mode:
        value = torch.empty(torch_compat.rng_state_bytes(device.type), dtype=torch.uint8)
    with graph.inserting_before(node):
        state = _call(graph, node, rng_state, (label,), value)
        drawn_by = cast(torch._ops.OpOverload, node.target)._schema.name.partition("::")[2]
        drawn = _call(graph, node, draw, (state, label, node.target, *node.args), node.meta["val"], name=drawn_by)
    drawn.kwargs = node.kwargs
    node.replace_all_uses_with(drawn)
    graph.erase_node(node)
    return True


def _values(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, torch.Tensor)]


def _call(
    graph: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...], value: Any, name: str | None = None
) -> fx.Node:
    """A call that stands where ``like`` stood, with its place in the user's source; ``name``: what reports call it."""
    new = graph.create_node("call_function", target, args, name=name)
    new.meta = copy.copy(like.meta) | {"val": value}
    return new

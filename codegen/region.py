"""The IR of a fused region: a small graph of functional aten ops that becomes one kernel launch.

A Region is immutable and canonical: dead nodes are gone, nodes stand in one deterministic order and bear no names, so two
layers that do the same to tensors of the same shape, stride and dtype have the same ``key`` and share one kernel.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from memplan.errors import UnsupportedError

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')


@dataclass(frozen=True)
class TensorType:
    """What a kernel knows of a tensor at compile time. Strides in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def numel(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def touched_bytes(self) -> int:
        """Bytes of the distinct elements: an expanded dimension (stride 0) counts once."""
        count = 1
        for extent, step in zip(self.shape, self.stride):
            count *= extent if step != 0 else min(extent, 1)
        return count * self.dtype.itemsize

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}{list(self.shape)}:{list(self.stride)}@{self.device}"

    @classmethod
    def of(cls, value: Any, where: str = "") -> TensorType:
        """Raises UnsupportedError for what a region cannot hold: symbolic sizes, subclasses' layouts, no tensor."""
        if not isinstance(value, torch.Tensor):
            raise UnsupportedError(f"{where or 'a value'} is {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized:
            raise UnsupportedError(f"{where or 'a tensor'} is not dense")
        shape, stride = tuple(value.shape), tuple(value.stride())
        if not all(type(extent) is int for extent in (*shape, *stride)):
            raise UnsupportedError(f"{where or 'a tensor'} has a symbolic size")
        return cls(shape, stride, value.dtype, value.device.type)


@dataclass(frozen=True)
class Region:
    """One fused region.

    ``graph_module``: placeholders are the inputs in order; the output is a flat tuple of tensors. Every node has its
    fake tensor in ``meta["val"]``. Build with :meth:`from_graph_module`.
    """

    graph_module: fx.GraphModule = field(compare=False, repr=False)
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    text: str = field(repr=False)  # the canonical form, one node a line

    @cached_property
    def key(self) -> str:
        """Content hash, 16 hexadecimal digits: equal keys, equal kernels."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """An identifier that says what the region does: its most telling ops, then its key."""
        ops = [short_name(n) for n in self.op_nodes]
        telling = list(dict.fromkeys(op for op in ops if op not in _PLAIN))
        words = [re.sub(r"\W", "", word) for word in telling or list(dict.fromkeys(ops))]
        return "_".join([*words[:4], self.key[:8]])

    @property
    def device(self) -> str:
        types = self.outputs or self.inputs
        return types[0].device

    @property
    def op_nodes(self) -> list[fx.Node]:
        """The nodes that compute, in order."""
        return [
            n for n in self.graph_module.graph.nodes if n.op == "call_function" and n.target is not operator.getitem
        ]

    @property
    def compulsory_bytes(self) -> int:
        """What any kernel for this region must move: each input read once, each output written once."""
        used = [t for t, n in zip(self.inputs, placeholders(self.graph_module)) if n.users]
        return sum(t.touched_bytes for t in used) + sum(t.touched_bytes for t in self.outputs)

    @classmethod
    def from_graph_module(cls, graph_module: fx.GraphModule) -> Region:
        """The canonical Region of a graph with fake tensors in every ``meta["val"]``.

        Raises UnsupportedError for a graph that is no legal region: an op that mutates, draws random numbers or leaves
        aten and prims; a symbolic size; an output that is no dense tensor; several devices.
        """
        graph = _canonical_order(graph_module)
        inputs = tuple(TensorType.of(n.meta["val"], n.name) for n in placeholders(graph))
        results = output_nodes(graph)
        outputs = tuple(TensorType.of(n.meta["val"], n.name) for n in results)
        for node in graph.graph.nodes:
            if node.op == "call_function":
                _check_op(node)
        # A CPU scalar (an optimizer's step, a loss scale) may ride along with accelerator tensors.
        devices = {t.device for t in (*inputs, *outputs) if t.device != "cpu" or t.numel > 1}
        if len(devices) > 1:
            raise UnsupportedError(f"a region lies on one device, not on {sorted(devices)}")
        _check_outputs(results)
        return cls(graph, inputs, outputs, _text(graph))

    def __str__(self) -> str:
        return self.text


# The names of ops that say little about a region when others are there.
_PLAIN = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "clone", "alias",
    "_to_copy", "convert_element_type", "add", "sub", "mul", "div", "neg", "full", "slice", "select", "full_like",
    "detach", "scalar_tensor",
}  # fmt: skip


def placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph_module.graph.nodes if n.op == "placeholder"]


def output_nodes(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The nodes a graph returns, flat. Raises UnsupportedError when it returns anything else."""
    returned: Any = graph_module.graph.output_node().args[0]
    flat = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    for value in flat:
        if not isinstance(value, fx.Node):
            raise UnsupportedError(f"a region returns tensors, not {value!r}")
    return flat


def short_name(node: fx.Node) -> str:
    """``add`` for aten.add.Tensor."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", str(target))


def source_of(node: fx.Node) -> str:
    """``file.py:12`` of the innermost frame that made the node, or ''."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    path, line = frames[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line}"


def _check_op(node: fx.Node) -> None:
    target = node.target
    if target is operator.getitem:
        return
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims", "memplan"):
        raise UnsupportedError(f"{node.name}: {target} is not an aten op")
    if target._schema.is_mutable:
        raise UnsupportedError(f"{node.name}: {target} changes its operand")
    if torch.Tag.nondeterministic_seeded in target.tags:
        raise UnsupportedError(f"{node.name}: {target} draws random numbers")


def _check_outputs(results: list[fx.Node]) -> None:
    """Every output is memory of its own: not expanded, no view of an input or of another output."""
    roots = [view_root(n) for n in results]
    for root, node in zip(roots, results):
        kind = TensorType.of(node.meta["val"], node.name)
        if kind.touched_bytes != kind.numel * kind.dtype.itemsize:
            raise UnsupportedError(f"output {node.name} is expanded; its elements share memory")
        if root.op == "placeholder" or roots.count(root) > 1:
            raise UnsupportedError(f"output {node.name} only views {root.name}")


def is_view(node: fx.Node) -> bool:
    """Whether the op only looks at its operand's memory: its schema aliases the result to the first argument."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or not target._schema.returns:
        return False
    alias = target._schema.returns[0].alias_info
    return (alias is not None and not alias.is_write) or target in _VIEWS_WITHOUT_ALIAS


# Functional in name, but the result shares the operand's memory wherever the strides allow.
_VIEWS_WITHOUT_ALIAS = {torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default}


def view_root(node: fx.Node) -> fx.Node:
    """The node whose memory a chain of views looks at; the node itself when it makes memory."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def _canonical_order(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy without dead nodes whose order is that of a depth-first walk from the outputs."""
    order: list[fx.Node] = []
    state: set[fx.Node] = set()
    stack: list[tuple[fx.Node, bool]] = [(n, False) for n in reversed(output_nodes(graph_module))]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in state and node.op != "placeholder":
            state.add(node)
            stack.append((node, True))
            stack.extend((operand, False) for operand in reversed(node.all_input_nodes))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for at, node in enumerate(placeholders(graph_module)):
        copies[node] = graph.placeholder(f"in{at}")
        copies[node].meta = dict(node.meta)
    for node in order:
        if node.op != "call_function":
            raise UnsupportedError(f"{node.name}: a region holds calls of ops, not {node.op}")
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in output_nodes(graph_module)))
    return fx.GraphModule(torch.nn.Module(), graph)


def _text(graph_module: fx.GraphModule) -> str:
    number = {n: at for at, n in enumerate(graph_module.graph.nodes)}

    def show(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{number[value]}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(show(v) for v in value) + "]"
        if isinstance(value, dict):
            return ", ".join(f"{k}={show(v)}" for k, v in sorted(value.items()))
        return repr(value)

    def lines() -> Iterator[str]:
        for node, at in number.items():
            if node.op == "placeholder":
                yield f"%{at} = input {TensorType.of(node.meta['val'])}"
            elif node.op == "output":
                yield f"return {show(node.args[0])}"
            else:
                name = "getitem" if node.target is operator.getitem else str(node.target)
                value = node.meta["val"]
                types = [
                    TensorType.of(v) for v in (value if isinstance(value, (list, tuple)) else [value]) if v is not None
                ]
                parts = [show(a) for a in node.args] + ([show(dict(node.kwargs))] if node.kwargs else [])
                yield f"%{at} = {name}({', '.join(parts)}) -> {', '.join(map(str, types))}"

    return "\n".join(lines())

"""Which nodes of a functional graph have the same value, and which values are known before it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memplan import torch_compat
from memplan.build_problem import view_source
from memplan.capture import input_nodes, is_getitem, is_random, tensors
from memplan.runtime.own import KERNELS


def value_numbers(graph: fx.Graph) -> dict[fx.Node, int]:
    """Nodes of one number have one value whatever the inputs are: the same op of aten, or of memplan, on operands of the
    same numbers.

    Random ops, ops with effects and readers of memory that the graph changes have numbers of their own.
    (Value numbering: Alpern, Wegman and Zadeck, "Detecting equality of variables in programs", POPL 1988.)
    """
    changed = _changed(graph)
    known: dict[Any, int] = {}
    numbers: dict[fx.Node, int] = {}
    for node in graph.nodes:
        key: Any = node
        if _is_pure(node) and changed.isdisjoint(input_nodes(node)):
            key = (node.target, _key(node.args, numbers), _key(node.kwargs, numbers))
        numbers[node] = known.setdefault(key, len(known))
    return numbers


class Constants:
    """Values of nodes that depend on no input, computed when asked for, each value once."""

    _LARGEST = 256 << 20  # bytes; a mask for 8,192 tokens in float32, computed in 0.2 s

    def __init__(self, graph: fx.Graph) -> None:
        self.numbers = value_numbers(graph)
        self._values: dict[int, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """The value; None where an input decides it, where it lies on no CPU, or where it is too large to look at."""
        waiting = [node]
        while waiting:
            top = waiting[-1]
            if self.numbers[top] in self._values:
                waiting.pop()
                continue
            missing = (
                [a for a in input_nodes(top) if self.numbers[a] not in self._values] if self._is_known(top) else []
            )
            if missing:
                waiting.extend(missing)
                continue
            waiting.pop()
            self._values[self.numbers[top]] = self._computed(top)
        return self._values[self.numbers[node]]

    def _computed(self, node: fx.Node) -> Any:
        if not self._is_known(node) or any(self._values[self.numbers[a]] is None for a in input_nodes(node)):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda a: self._values[self.numbers[a]])
        with torch_compat.disable_current_modes(), torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _is_known(self, node: fx.Node) -> bool:
        if not _is_pure(node) or torch_compat.free_symbols(node.meta.get("val")):
            return False
        if isinstance(node.target, torch._ops.OpOverload) and "empty" in node.target._opname:
            return False
        return all(
            t.device.type == "cpu" and t.numel() * t.element_size() <= self._LARGEST for t in tensors(node.meta["val"])
        )


def _is_pure(node: fx.Node) -> bool:
    """Whether equal operands always give equal values, and nothing else happens."""
    if node.op != "call_function":
        return False
    if is_getitem(node):
        return True
    target = node.target
    if target in KERNELS:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    return not target._schema.is_mutable and not is_random(node) and not node.is_impure()


def _changed(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that hold memory which the graph changes somewhere."""
    written = {
        torch_compat.storage_key(tensor)
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for operand in input_nodes(node)
        for tensor in tensors(operand.meta.get("val"))
    }
    found: set[fx.Node] = set()
    for node in graph.nodes:
        keys = {torch_compat.storage_key(tensor) for tensor in tensors(node.meta.get("val"))}
        if not written.isdisjoint(keys) or view_source(node) in found:
            found.add(node)
    return found


def _key(value: Any, numbers: dict[fx.Node, int]) -> Any:
    """A hashable that tells arguments apart as an op would: 1, 1.0 and True are three."""
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, (list, tuple)):
        return tuple(_key(item, numbers) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item, numbers)) for name, item in sorted(value.items()))
    return type(value), repr(value)

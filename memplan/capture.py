"""What memplan keeps of a captured graph: which node is an op, which only views, and what every value is to the user.

The graph is AOTAutograd's: functional aten ops with fake tensors in ``meta["val"]``; a joint graph's placeholders are
``primals`` then ``tangents``, its outputs the forward's outputs then the gradients.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx

from memplan.errors import UnsupportedError
from memplan.problem import Category

EAGER = "memplan_eager"  # node meta: a fake tensor of what eager keeps in place of the node's value

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')


class Input(NamedTuple):
    """What a placeholder is to the user."""

    category: Category = Category.INPUT
    name: str = ""  # path of a parameter or buffer in its model ("h.0.attn.weight"), name of an argument, '' if unknown
    home: str = ""  # the tier where it lies between steps ("disk"); '': the device

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0] if self.category != Category.INPUT else ""


@dataclass(frozen=True)
class Capture:
    """A captured graph. ``inputs``: what each placeholder that is no tangent is, by position."""

    graph_module: fx.GraphModule
    forward_outputs: int  # how many of the graph's outputs belong to the forward; all of them for inference
    inputs: Sequence[Input] = field(default=())
    training: bool = True

    @property
    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph_module.graph.nodes if n.op == "placeholder"]

    @property
    def device_type(self) -> str:
        """Where the graph computes: "cuda" if any tensor of it lives there, else "cpu"."""
        for node in self.graph_module.graph.nodes:
            for value in tensors(node.meta.get("val")):
                if value.device.type != "cpu":
                    return value.device.type
        return "cpu"

    @property
    def output_node(self) -> fx.Node:
        return self.graph_module.graph.output_node()

    @property
    def outputs(self) -> list[object]:
        """The graph's flat outputs: nodes, None or constants."""
        return list(self.output_node.args[0])  # type: ignore[arg-type]


def check_supported(graph_module: fx.GraphModule) -> None:
    """Raise UnsupportedError for what the planner cannot account for; the caller then runs the graph unplanned."""
    for node in graph_module.graph.nodes:
        where = f"{node.name} ({source_line(node) or module_path(node) or 'no source line'})"
        if node.op in ("call_module", "call_method"):
            raise UnsupportedError(f"{where}: a {node.op} node; only functional ops can be planned")
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            raise UnsupportedError(f"{where}: the higher-order operator {node.target}")
        for tensor in tensors(node.meta.get("val")):
            if tensor.layout != torch.strided:
                raise UnsupportedError(f"{where}: a tensor of layout {tensor.layout}")


def is_tangent(node: fx.Node) -> bool:
    return node.op == "placeholder" and "tangents" in str(node.target)


def tensors(value: object) -> Iterator[torch.Tensor]:
    """The tensors inside a ``meta["val"]``, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def input_nodes(node: fx.Node) -> tuple[fx.Node, ...]:
    return tuple(node.all_input_nodes)


def is_random(node: fx.Node) -> bool:
    """Draws from the default generator; attention that drops nothing does not, whatever its tag says."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    places = [k for k, argument in enumerate(target._schema.arguments) if argument.name == "dropout_p"]
    return not places or bool(node.args[places[0]] if places[0] < len(node.args) else node.kwargs.get("dropout_p"))


def module_path(node: fx.Node) -> str:
    """Path of the nn.Module whose call made the node (for a backward node: of its forward), '' if unknown."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"L\['[^']*'\]\.?|_modules\['([^']*)'\]", lambda m: m[1] or "", path)
    return re.sub(r"getattr\((.*), '([^']*)'\)", r"\1.\2", path).replace("[", ".").replace("]", "").replace("'", "")


def source_line(node: fx.Node) -> str:
    """``file:line`` of the innermost user frame that made the node, '' if unknown."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""

"""Cut a scheduled joint graph into the forward and backward modules that AOTAutograd asks for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memplan import torch_compat
from memplan.capture import is_tangent
from memplan.passes.schedule import Scheduled


@dataclass(frozen=True)
class Split:
    """Everything before the first backward run is the forward; what crosses is saved, whole storages only.

    Saved values follow AOTAutograd's convention: version-checked tensors, other tensors, then symbolic sizes; the
    backward takes sizes first, then tensors, then tangents.
    """

    name: ClassVar[str] = "split"
    num_forward_outputs: int

    def apply(self, scheduled: Scheduled, root: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
        *nodes, output = scheduled.graph_module.graph.nodes
        tangents = [n for n in nodes if is_tangent(n)]
        forward_nodes = [n for n in nodes[: scheduled.forward_nodes] if not is_tangent(n)]
        backward_nodes = nodes[scheduled.forward_nodes :]
        results = list(output.args[0])  # type: ignore[arg-type]
        descriptors = list(output.meta.get("desc") or [None] * len(results))
        count = self.num_forward_outputs
        constants, tensors, sizes = _crossing(forward_nodes, backward_nodes, results[count:], tangents)

        saved = [*tensors, *sizes]
        saved_descriptors = [torch_compat.saved_for_backward_descriptor(i) for i in range(len(saved))]
        forward = _graph([], forward_nodes, [*results[:count], *saved], descriptors[:count] + saved_descriptors, output)
        inputs = [*sizes, *tensors, *tangents]
        backward = _graph(inputs, [*constants, *backward_nodes], results[count:], descriptors[count:], output)
        return fx.GraphModule(root, forward), fx.GraphModule(root, backward)


def _crossing(
    forward: list[fx.Node], backward: list[fx.Node], gradients: list[Any], tangents: list[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
    """What the backward needs of the forward: constants to repeat there, tensors to save, sizes to save."""
    before = set(forward)
    needed: dict[fx.Node, None] = {}
    for node in backward:
        needed.update(dict.fromkeys(a for a in node.all_input_nodes if a in before))
    needed.update(dict.fromkeys(g for g in gradients if isinstance(g, fx.Node) and g in before))
    constants = [n for n in needed if n.op == "get_attr"]
    tensors = [n for n in needed if n.op != "get_attr" and isinstance(n.meta.get("val"), torch.Tensor)]
    tensors.sort(key=lambda n: bool(n.meta.get("saved_tensor_with_no_vc_check", False)))
    rest = [n for n in needed if n.op != "get_attr" and n not in set(tensors)]
    return constants, tensors, _sizes(forward, rest, [*tensors, *tangents])


def _sizes(forward: list[fx.Node], wanted: list[fx.Node], shaped: list[fx.Node]) -> list[fx.Node]:
    """Symbolic sizes the backward reads, and those that the shapes of its inputs are written in; bindings first."""
    bindings = {s: n for n in forward if (s := torch_compat.is_symbol_binding_fx_node(n)) is not None}
    binding = [n for n in wanted if torch_compat.is_symbol_binding_fx_node(n) is not None]
    derived = [n for n in wanted if n not in set(binding)]
    known = {torch_compat.is_symbol_binding_fx_node(n) for n in binding}
    for node in (*derived, *shaped):
        for symbol in sorted(torch_compat.free_symbols(node.meta["val"]) - known, key=lambda s: s.name):
            if symbol in bindings:
                binding.append(bindings[symbol])
            known.add(symbol)
    return [*binding, *derived]


def _graph(
    inputs: list[fx.Node], body: list[fx.Node], results: list[Any], descriptors: list[Any], output: fx.Node
) -> fx.Graph:
    """A graph of its own from ``body``; ``inputs`` become placeholders."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = copy.copy(node.meta)
    for node in body:
        env[node] = graph.node_copy(node, lambda a: env[a])
    out = graph.output([env[r] if isinstance(r, fx.Node) else r for r in results])
    out.meta = copy.copy(output.meta) | {"desc": descriptors}
    return graph

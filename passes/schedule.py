"""Rewrite a captured graph so that its nodes stand in the plan's order, recomputed ops as often as the plan runs them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from memplan.build_problem import RECOMPUTE, STATISTICS_ONLY, TANGENTS, TRAINING_ARG, BuiltProblem
from memplan.capture import input_nodes
from memplan.passes.copying import resolve
from memplan.problem import Phase
from memplan.runtime.norms import without_statistics
from memplan.runtime.random import draw, replay


@dataclass(frozen=True)
class Scheduled:
    """A graph whose order is the plan's. ``forward_nodes``: how many of its nodes come before the backward."""

    graph_module: fx.GraphModule
    forward_nodes: int


@dataclass(frozen=True)
class Schedule:
    """Order and recomputation as ``sequence`` says. Views are emitted beside their first reader in each phase."""

    name: ClassVar[str] = "schedule"
    sequence: Sequence[int]

    def apply(self, built: BuiltProblem) -> Scheduled:
        writer = _Writer(built)
        forward_nodes = -1
        for op in self.sequence:
            if forward_nodes < 0 and built.problem.ops[op].phase != Phase.FORWARD:
                forward_nodes = writer.begin_backward()
            writer.run(op)
        module = writer.finish()
        return Scheduled(module, forward_nodes if forward_nodes >= 0 else len(module.graph.nodes) - 1)


class _Writer:
    """Copies nodes one run at a time, keeping for each original node the copy in force."""

    def __init__(self, built: BuiltProblem) -> None:
        self.built = built
        self.graph = fx.Graph()
        self.now: dict[fx.Node, fx.Node] = {}  # original -> copy in force
        self.ran: set[int] = set()
        self.forward_results: list[Any] | None = None
        self.derived = _derived(built)
        self.sizes = [n for n in built.capture.graph_module.graph.nodes if _is_size(n)]
        for node in built.capture.placeholders:
            self.now[node] = self.graph.node_copy(node)
        self._sizes()

    def run(self, op: int) -> None:
        if self.built.problem.ops[op].name == TANGENTS:
            return
        kernel, *getitems = self.built.nodes[op]
        again = op in self.ran
        self.ran.add(op)
        for node in self.derived[op]:  # views of the copy that this run replaces
            self.now.pop(node, None)
        for source in input_nodes(kernel):
            self._resolve(source)
        new = self._copy(kernel)
        new.meta[RECOMPUTE] = again
        if again and not self._owes_statistics(op):
            _as_second_run(new, [k for k, a in enumerate(kernel.args) if self._is_resident(a)])
        for item in getitems:
            self._copy(item)
        if not again:
            self._sizes()

    def _owes_statistics(self, op: int) -> bool:
        """Whether the statistics that a norm makes are still to be read for the first time: by what keeps them, or by the
        norm that goes on from them and owes its own. Nothing has changed the norm's operands until then."""
        kernel, *getitems = self.built.nodes[op]
        at = STATISTICS_ONLY.get(kernel.target, ())
        made = {b for item in getitems if item.args[1] in at for b in self.built.buffer_of[item]}
        readers = {reader for b in made for reader in self.built.problem.readers[b]}
        return any(reader not in self.ran or self._owes_statistics(reader) for reader in readers)

    def _is_resident(self, argument: object) -> bool:
        """Whether an argument looks at what is there throughout: no op makes it."""
        writer = self.built.problem.writer
        return isinstance(argument, fx.Node) and all(writer[b] < 0 for b in self.built.buffer_of[argument])

    def begin_backward(self) -> int:
        """Fix the forward's results, and make the backward emit its own views: only whole storages cross.

        Returns the number of nodes so far.
        """
        self._results()
        free = [n for n in self.now if n.op == "call_function" and n not in self.built.op_of and not _is_size(n)]
        for node in free:
            del self.now[node]
        return len(self.graph.nodes)

    def finish(self) -> fx.GraphModule:
        capture = self.built.capture
        self._results()
        assert self.forward_results is not None
        later = [self._resolved(n) for n in capture.outputs[capture.forward_outputs :]]
        out = self.graph.output([*self.forward_results, *later])
        out.meta = copy.copy(capture.output_node.meta)
        return fx.GraphModule(capture.graph_module, self.graph)

    def _results(self) -> None:
        if self.forward_results is None:
            capture = self.built.capture
            self.forward_results = [self._resolved(n) for n in capture.outputs[: capture.forward_outputs]]

    def _resolved(self, value: object) -> Any:
        return self._resolve(value) if isinstance(value, fx.Node) else value

    def _resolve(self, node: fx.Node) -> fx.Node:
        return resolve(node, self.now, self._copy)

    def _copy(self, node: fx.Node) -> fx.Node:
        new = self.graph.node_copy(node, lambda n: self.now[n])
        self.now[node] = new
        return new

    def _sizes(self) -> None:
        """Sizes are read as soon as their tensor exists, so that no size keeps a storage alive."""
        rest = []
        for node in self.sizes:
            if all(a in self.now for a in input_nodes(node)):
                self._copy(node)
            else:
                rest.append(node)
        self.sizes = rest


def _as_second_run(node: fx.Node, resident: Sequence[int]) -> None:
    """Call what a second run does otherwise than the first. Of the arguments that it does not look at it is given those
    that an op makes, for the plan holds them until then; the ``resident`` ones would only be saved for the backward."""
    if node.target is draw:
        node.target = replay
    elif node.target in STATISTICS_ONLY and node.args[TRAINING_ARG]:
        left_out = set(STATISTICS_ONLY[node.target]) & set(resident)
        node.args = tuple(None if k in left_out else argument for k, argument in enumerate(node.args))
        node.target = without_statistics


def _is_size(node: fx.Node) -> bool:
    """A call that yields a symbolic number."""
    value = node.meta.get("val")
    return node.op == "call_function" and value is not None and hasattr(value, "node") and not hasattr(value, "shape")


def _derived(built: BuiltProblem) -> list[list[fx.Node]]:
    """For each op the free nodes reachable from its results through free nodes."""
    found: list[list[fx.Node]] = [[] for _ in built.nodes]
    for op, nodes in enumerate(built.nodes):
        if built.problem.ops[op].name == TANGENTS:
            continue
        seen: set[fx.Node] = set()
        stack = list(nodes)
        while stack:
            for user in stack.pop().users:
                if user.op == "call_function" and user not in built.op_of and not _is_size(user) and user not in seen:
                    seen.add(user)
                    found[op].append(user)
                    stack.append(user)
    return found

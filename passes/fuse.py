"""Contract runs of a scheduled graph into regions: each becomes one call that looks like one functional op.

Runs after recomputation is decided, so that a cheap recomputation melts into the backward kernel that reads it.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from memplan import torch_compat
from memplan.build_problem import BUFFER, OP, RECOMPUTE, BuiltProblem
from memplan.capture import input_nodes, tensors
from memplan.codegen.lowering import FusedRegion, default_lowering
from memplan.codegen.ops import is_fusible, is_pointwise, mixes_dtypes
from memplan.codegen.region import Region
from memplan.errors import UnsupportedError
from memplan.passes.copying import resolve
from memplan.passes.reuse import overwriting
from memplan.passes.runs import RunGraph
from memplan.passes.schedule import Scheduled
from memplan.problem import Op, Phase, Problem
from memplan.runtime.norms import NO_STATISTICS, without_statistics
from memplan.solvers.fusion import FusionPlan, FusionProblem, solve_fusion

log = logging.getLogger("memplan")

REGION = "memplan.region"  # Op.target of a region
_ATTEMPTS = 4  # each halves the regions whose workspace broke the limit; the last leaves them unfused


@dataclass(frozen=True)
class Fused:
    """The fused graph; ``problem`` is the one given plus one op a region, which ``meta[OP]`` of its node names."""

    scheduled: Scheduled
    problem: Problem
    plan: FusionPlan
    calls: tuple[FusedRegion, ...]  # one a fused call; repeated layers share one

    def __str__(self) -> str:
        runs = sum(len(unit) for unit in self.plan.regions)
        before, after = self.plan.moved_before, self.plan.moved_after
        return f"{len(self.calls)} regions ({len(set(self.calls))} distinct) of {runs} runs, {before} -> {after} bytes moved"


@dataclass(frozen=True)
class Fuse:
    """``limit``: bytes the fused sequence may load; None for the peak as given. No load above it rises.

    ``lowering``: see memplan.codegen.lowering. ``measured``: compile now and count the kernels' own workspace.
    """

    name: ClassVar[str] = "fuse"
    limit: int | None = None
    lowering: str | None = None
    measured: bool = True
    launch_bytes: int = 32768  # an op's dispatch, about 3 us, at one core's 10 GB/s

    def apply(self, scheduled: Scheduled, problem: Problem) -> Fused:
        """Never raises the peak: a region whose workspace would is made smaller, and in the end not fused."""
        graph = RunGraph(scheduled, problem, _may_join, self.launch_bytes)
        kernels: dict[str, FusedRegion] = {}
        caps: dict[int, int] = {}
        for attempt in range(_ATTEMPTS + 1):
            plan = solve_fusion(graph.problem, self.limit, caps)
            writer = _Writer(graph, plan, self.lowering, kernels, self.measured, caps)
            fused = writer.write()
            broken = self._broken(graph.problem, plan, writer.calls)
            if not broken and not writer.refused:
                break
            for unit in (*broken, *writer.refused):
                cap = len(unit) // 2 if attempt < _ATTEMPTS - 1 and unit in broken else 0
                caps |= {run: min(cap, caps.get(run, cap)) for run in unit}
        log.info("fused %s", fused)
        return fused

    def _broken(
        self, problem: FusionProblem, plan: FusionPlan, calls: dict[tuple[int, ...], FusedRegion]
    ) -> list[tuple[int, ...]]:
        """Regions whose own workspace lifts the load over the limit; that of their largest run is in the load."""
        limit = max(plan.peak_before if self.limit is None else self.limit, plan.peak_after)
        loads = dict(zip(plan.units, plan.loads))

        def more(unit: tuple[int, ...]) -> int:
            return max(0, calls[unit].compiled.workspace - max(problem.runs[run].workspace for run in unit))

        return [unit for unit in calls if self.measured and loads[unit] + more(unit) > limit]


def joining(built: BuiltProblem) -> tuple[frozenset[int], frozenset[int]]:
    """Ops that may share a region with others of their phase, and those of them that a region repeats at no cost."""
    kernels = [nodes[0] if nodes else None for nodes in built.nodes]
    fusible = {
        i
        for i, (op, node) in enumerate(zip(built.problem.ops, kernels, strict=True))
        if node is not None and not op.once and not op.mutates and _may_join(node)
    }
    return frozenset(fusible), frozenset(i for i in fusible if is_pointwise(kernels[i]))


class _Writer:
    """Writes the graph anew, unit by unit; free nodes (views) follow where they are first read."""

    def __init__(
        self,
        graph: RunGraph,
        plan: FusionPlan,
        lowering: str | None,
        kernels: dict[str, FusedRegion],
        measured: bool,
        caps: Mapping[int, int],
    ) -> None:
        self.caps = caps
        self.overwriting = overwriting(graph.scheduled)
        self.graph, self.plan, self.lowering, self.kernels, self.measured = graph, plan, lowering, kernels, measured
        self.new = fx.Graph()
        self.now: dict[fx.Node, fx.Node] = {}
        self.calls: dict[tuple[int, ...], FusedRegion] = {}
        self.refused: list[tuple[int, ...]] = []  # units that are no legal region after all
        self.ops: list[Op] = list(graph.base.ops)
        self.sizes = [n for n in graph.nodes if _is_size(n)]

    def write(self) -> Fused:
        graph, boundary = self.graph, self.graph.scheduled.forward_nodes
        for node in graph.nodes:
            if node.op == "placeholder":
                self._copy(node)
        forward_nodes = None
        for unit in self.plan.units:
            if forward_nodes is None and graph.place(unit[0]) >= boundary:
                self._rest_of_forward(boundary)
                forward_nodes = len(self.new.nodes)
            self._unit(unit)
            self._read_sizes()
        out = self.new.output(fx.node.map_arg(graph.output.args[0], self._resolve))
        out.meta = copy.copy(graph.output.meta)
        if forward_nodes is None:
            forward_nodes = len(self.new.nodes) - 1
        module = fx.GraphModule(graph.scheduled.graph_module, self.new)
        problem = replace(graph.base, ops=tuple(self.ops))
        return Fused(Scheduled(module, forward_nodes), problem, self.plan, tuple(self.calls.values()))

    def _unit(self, unit: tuple[int, ...]) -> None:
        if len(unit) > 1 or self._is_better_alone(unit[0]):
            try:
                self._region(unit)
                return
            except UnsupportedError as error:
                log.debug("left unfused: %s", error)
                self.refused.append(unit)
        for run in unit:
            for node in self.graph.members[run]:
                for operand in input_nodes(node):
                    self._resolve(operand)
                self._copy(node)

    def _is_better_alone(self, run: int) -> bool:
        """Whether a region of this run alone takes its kernel's place, and was not found to need too much memory.

        On the CPU its call is shorter, its loops are for just these sizes and strides, and some sums are more exact. What makes constants stays as it is, and so does what may write over an operand.
        """
        fusible = self.graph.problem.runs[run].domain >= 0 and self.caps.get(run, 1) > 0
        if not self.overwriting.isdisjoint(self.graph.members[run]):
            return False
        operands = [n for member in self.graph.members[run] for n in input_nodes(member)]
        return fusible and any((self.lowering or _default(operand)) == "inductor" for operand in operands)

    def _rest_of_forward(self, boundary: int) -> None:
        """Forward nodes that the graph's results or the backward read must stand before the boundary."""
        for node in self.graph.nodes[:boundary]:
            free = node.op == "call_function" and node not in self.graph.run_of
            if free and any(self.graph.position.get(u, boundary) >= boundary for u in node.users):
                self._resolve(node)

    def _read_sizes(self) -> None:
        """Sizes are read as soon as their tensor exists, so that no size keeps a storage alive."""
        for node in [n for n in self.sizes if all(a in self.now for a in input_nodes(n))]:
            self._resolve(node)
            self.sizes.remove(node)

    def _resolve(self, node: fx.Node) -> fx.Node:
        return resolve(node, self.now, self._copy)

    def _copy(self, node: fx.Node) -> None:
        self.now[node] = self.new.node_copy(node, lambda n: self.now[n])

    def _region(self, unit: tuple[int, ...]) -> None:
        results = self._results(unit)
        if not results:  # recomputations that only others inside would have read
            return
        # What an op makes is the same however often it runs, and the plan holds it once: its runs in a region share it.
        firsts = {r.meta[BUFFER]: r for r in reversed(results)}
        twice = [r for r in results if firsts[r.meta[BUFFER]] is not r]
        results = [r for r in results if firsts[r.meta[BUFFER]] is r]
        graph_module, outer = _subgraph([n for run in unit for n in self.graph.members[run]], results)
        region = Region.from_graph_module(graph_module)
        call = self.calls[unit] = self.kernels.setdefault(region.key, FusedRegion(region, self.lowering))
        node = self.new.call_function(call, tuple(self._resolve(n) for n in outer))
        values = _apart([r.meta["val"] for r in results], outer)
        node.meta = self._meta(unit, results) | {
            "val": values[0] if len(values) == 1 else tuple(values),
            OP: len(self.ops),
        }
        self.ops.append(self._op(unit, results, call))
        if len(results) == 1:
            self.now[results[0]] = node
        else:
            for place, (result, value) in enumerate(zip(results, values)):
                self.now[result] = self.new.call_function(operator.getitem, (node, place))
                self.now[result].meta = copy.copy(result.meta) | {"val": value, OP: node.meta[OP]}
        for result in twice:
            self.now[result] = self.now[firsts[result.meta[BUFFER]]]

    def _results(self, unit: tuple[int, ...]) -> list[fx.Node]:
        """The nodes whose storages others read, or that are kept."""
        problem, members = self.graph.problem, set(unit)
        return [
            self.graph.holder(run, made)
            for run in unit
            for made in problem.runs[run].writes
            if made in problem.kept or not members.issuperset(problem.readers.get(made, ()))
        ]

    def _meta(self, unit: tuple[int, ...], results: list[fx.Node]) -> dict[str, Any]:
        kernels = [self.graph.members[run][0] for run in unit]
        again = all(k.meta.get(RECOMPUTE) for k in kernels)
        return copy.copy(kernels[-1].meta) | {RECOMPUTE: again, BUFFER: results[0].meta[BUFFER]}

    def _op(self, unit: tuple[int, ...], results: list[fx.Node], call: FusedRegion) -> Op:
        """The region as an op of the problem: its time is its members', by the share of bytes that still move."""
        problem = self.graph.problem
        members = [self.graph.base.ops[self.graph.members[run][0].meta[OP]] for run in unit]
        made = {b for op in members for b in op.writes}
        moved = sum(problem.sizes[b] for i in unit for b in (*problem.runs[i].reads, *problem.runs[i].writes))
        share = min(1.0, call.region.compulsory_bytes / moved) if moved else 1.0
        return Op(
            name=call.__name__,
            target=REGION,
            reads=tuple(dict.fromkeys(b for op in members for b in op.reads if b not in made)),
            writes=tuple(r.meta[BUFFER] for r in results),
            time=share * sum(op.time for op in members),
            workspace=max(call.compiled.workspace if self.measured else 0, *(op.workspace for op in members)),
            phase=Phase.BACKWARD if problem.runs[unit[0]].domain else Phase.FORWARD,
            module=members[0].module,
            source=members[0].source,
        )


def _subgraph(members: Sequence[fx.Node], results: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The members as a graph of their own, and the outside nodes that its placeholders stand for, in order.

    Views between members are copied in; views of what comes from outside stay outside.
    """
    inside = set(members)
    body: dict[fx.Node, None] = {}
    outer: dict[fx.Node, None] = {}
    for member in members:
        stack = [member]
        while stack:
            top = stack[-1]
            waiting = [a for a in input_nodes(top) if a not in body and a not in outer]
            for operand in waiting:
                if operand in inside or _derives_from(operand, inside):
                    stack.append(operand)
                else:
                    outer[operand] = None
            if stack[-1] is top:
                body[stack.pop()] = None
    graph = fx.Graph()
    env = {}
    for node in outer:
        env[node] = graph.placeholder(node.name)
        env[node].meta = copy.copy(node.meta)
    for node in body:
        env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].target, env[node].args = _in_region(env[node])
    graph.output(tuple(env[n] for n in results))
    return fx.GraphModule(torch.nn.Module(), graph), list(outer)


def _default(node: fx.Node) -> str:
    return default_lowering(next(iter(tensors(node.meta["val"]))).device.type)


def _may_join(node: fx.Node) -> bool:
    return (node.target is without_statistics and not mixes_dtypes(node)) or is_fusible(node)


def _in_region(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """Target and arguments of a node as a region has it: a norm that runs again by its plain op."""
    if node.target is not without_statistics:
        return node.target, node.args
    x, weight, bias, _, _, *rest = node.args
    return NO_STATISTICS, (x, weight, bias, *rest)


def _derives_from(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a free node looks at what a member makes."""
    while node.op == "call_function" and OP not in node.meta and node not in inside and input_nodes(node):
        node = input_nodes(node)[0]
    return node in inside


def _apart(values: list[torch.Tensor], operands: list[fx.Node]) -> list[torch.Tensor]:
    """Fake results on storages that no operand has: a recomputed copy carries its original's fake tensor."""
    taken = {torch_compat.storage_key(t) for n in operands for t in tensors(n.meta["val"])}
    if not any(torch_compat.storage_key(v) in taken for v in values):
        return values
    return [v.new_empty_strided(v.shape, v.stride()) for v in values]


def _is_size(node: fx.Node) -> bool:
    """A call that yields a symbolic number."""
    value = node.meta.get("val")
    return node.op == "call_function" and value is not None and hasattr(value, "node") and not hasattr(value, "shape")

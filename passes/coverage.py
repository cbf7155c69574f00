"""How much of a step's memory traffic fused regions take over: bytes read and written by ops other than products."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from memplan.build_problem import TANGENTS
from memplan.codegen.ops import is_fusible
from memplan.cost.workspace import ONEDNN_LINEAR
from memplan.passes.fuse import Fuse
from memplan.passes.reuse import REUSE
from memplan.passes.runs import RunGraph
from memplan.passes.schedule import Scheduled
from memplan.problem import Problem
from memplan.runtime.random import draw, replay
from memplan.solvers.fusion import FusionPlan, FusionProblem, solve_fusion


@dataclass(frozen=True)
class Coverage:
    """Bytes are what unfused kernels of ops other than products, convolutions and attention read and write."""

    regions: int  # fused kernels of several ops
    total: int  # bytes
    fused: int  # bytes, of ops inside regions
    single: Mapping[str, int]  # bytes by op, of those that share no tensor with another op that a region may hold
    apart: Mapping[str, int]  # bytes by op, of those that do, where the solver found no region that may be formed
    left_out: Mapping[str, int]  # bytes by op, of those that no region may hold

    @property
    def fused_share(self) -> float:
        """Of the bytes, those of ops inside regions: what fusion can save on."""
        return self.fused / self.total if self.total else 1.0

    @property
    def share(self) -> float:
        """Of the bytes, those that no further fusion could reduce: in regions, or of ops that stand between two products
        and read and write each of their tensors once already."""
        return (self.fused + sum(self.single.values())) / self.total if self.total else 1.0

    def __str__(self) -> str:
        return (
            f"{self.regions} fused regions can take over {self.fused_share:.1%} of the bytes that ops other than products "
            f"move; {self.share:.1%} with single ops between products, which have nothing to fuse with"
        )


def coverage(scheduled: Scheduled, problem: Problem, limit: int | None = None) -> Coverage:
    """Of the regions that the fusion solver chooses for a scheduled graph, whose load may reach ``limit`` bytes."""
    graph = RunGraph(scheduled, problem, _may_fuse, Fuse.launch_bytes)
    return measure(graph, solve_fusion(graph.problem, limit))


def _may_fuse(node: fx.Node) -> bool:
    """What writes over its operand could as well be in a region."""
    return REUSE in node.meta or is_fusible(node)


def measure(graph: RunGraph, plan: FusionPlan) -> Coverage:
    """Every run counts what it reads and writes, as if it ran alone."""
    inside = {run for unit in plan.regions for run in unit}
    companions = _with_companions(graph.problem)
    fused = 0
    single: Counter[str] = Counter()
    apart: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for index, run in enumerate(graph.problem.runs):
        if run.name == TANGENTS:
            continue
        op = _op(graph.members[index][0])
        if is_product(op):
            continue
        moved = sum(graph.problem.sizes[b] for b in {*run.reads, *run.writes})
        if index in inside:
            fused += moved
        else:
            kind = left_out if run.domain < 0 else apart if index in companions else single
            kind[str(op) if isinstance(op, torch._ops.OpOverload) else op.__name__] += moved
    total = fused + single.total() + apart.total() + left_out.total()
    ranked = (dict(kind.most_common()) for kind in (single, apart, left_out))
    return Coverage(len(plan.regions), total, fused, *ranked)


def _with_companions(problem: FusionProblem) -> set[int]:
    """Runs that share a buffer with another run of their domain: what a region could be made of."""
    found: set[int] = set()
    for buffer, readers in problem.readers.items():
        made = (problem.writer[buffer],) if buffer in problem.writer else ()
        by_domain: dict[int, list[int]] = defaultdict(list)
        for run in (*made, *readers):
            by_domain[problem.runs[run].domain].append(run)
        found.update(run for domain, runs in by_domain.items() if domain >= 0 and len(runs) > 1 for run in runs)
    return found


def _op(node: fx.Node) -> Any:
    """What a node runs; a drawn op is the op under it."""
    return node.args[2] if node.target in (draw, replay) else node.target


def is_product(target: object) -> bool:
    """Matrix products, convolutions and fused attention: what torch's flop counter counts, on every device."""
    packet = getattr(target, "overloadpacket", None)
    if packet in flop_registry or "_scaled_dot_product" in str(packet) or packet in _VECTOR_PRODUCTS:
        return True
    return str(packet).replace(".", "::") == ONEDNN_LINEAR


_VECTOR_PRODUCTS = {torch.ops.aten.mv, torch.ops.aten.dot, torch.ops.aten.vdot, torch.ops.aten.addmv}

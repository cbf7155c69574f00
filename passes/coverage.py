"""How much of a step's memory traffic fused regions take over: bytes read and written by ops other than products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from memplan.build_problem import TANGENTS
from memplan.codegen.ops import is_fusible
from memplan.passes.fuse import Fuse
from memplan.passes.runs import RunGraph
from memplan.passes.schedule import Scheduled
from memplan.problem import Problem
from memplan.runtime.random import draw, replay
from memplan.solvers.fusion import FusionPlan, solve_fusion


@dataclass(frozen=True)
class Coverage:
    """Bytes are what unfused kernels of ops other than products, convolutions and attention read and write."""

    regions: int  # fused kernels of several ops
    total: int  # bytes
    covered: int  # bytes, of ops inside regions
    alone: Mapping[str, int]  # bytes by op, of those that a region may hold, but that found no neighbour, most first
    left_out: Mapping[str, int]  # bytes by op, of those that no region may hold, most first

    @property
    def share(self) -> float:
        """Of the bytes, those of ops inside regions."""
        return self.covered / self.total if self.total else 1.0

    @property
    def emittable(self) -> float:
        """Of the bytes, those of ops for which a kernel can be emitted: inside regions, or alone between two products."""
        return (self.covered + sum(self.alone.values())) / self.total if self.total else 1.0

    def __str__(self) -> str:
        return (
            f"{self.regions} fused regions can take over {self.share:.1%} of the bytes that ops other than products move; "
            f"with ops that stand alone, {self.emittable:.1%}"
        )


def coverage(scheduled: Scheduled, problem: Problem, limit: int | None = None) -> Coverage:
    """Of the regions that the fusion solver chooses for a scheduled graph, whose load may reach ``limit`` bytes."""
    graph = RunGraph(scheduled, problem, is_fusible, Fuse.launch_bytes)
    return measure(graph, solve_fusion(graph.problem, limit))


def measure(graph: RunGraph, plan: FusionPlan) -> Coverage:
    """Every run counts what it reads and writes, as if it ran alone."""
    inside = {run for unit in plan.regions for run in unit}
    covered = 0
    alone: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for index, run in enumerate(graph.problem.runs):
        if run.name == TANGENTS:
            continue
        op = _op(graph.members[index][0])
        if is_product(op):
            continue
        moved = sum(graph.problem.sizes[b] for b in {*run.reads, *run.writes})
        if index in inside:
            covered += moved
        elif run.domain >= 0:
            alone[str(op)] += moved
        else:
            left_out[str(op)] += moved
    total = covered + alone.total() + left_out.total()
    return Coverage(len(plan.regions), total, covered, dict(alone.most_common()), dict(left_out.most_common()))


def _op(node: fx.Node) -> Any:
    """What a node runs; a drawn op is the op under it."""
    return node.args[2] if node.target in (draw, replay) else node.target


def is_product(target: object) -> bool:
    """Matrix products, convolutions and fused attention: what torch's flop counter counts, on every device."""
    packet = getattr(target, "overloadpacket", None)
    return packet in flop_registry or "_scaled_dot_product" in str(packet) or packet in _VECTOR_PRODUCTS


_VECTOR_PRODUCTS = {torch.ops.aten.mv, torch.ops.aten.dot, torch.ops.aten.vdot, torch.ops.aten.addmv}

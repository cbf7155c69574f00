"""What a plan means: the graph rewritten as it says, its regions, results over operands, and the Program of all that."""

from __future__ import annotations

from dataclasses import dataclass, replace

from memplan import torch_compat
from memplan.build_problem import BuiltProblem
from memplan.lower import Lowered, lower
from memplan.options import Options
from memplan.passes.fuse import Fuse, Fused
from memplan.passes.offload import Offload, stores
from memplan.passes.reuse import Reuse
from memplan.passes.schedule import Schedule, Scheduled
from memplan.place import Layout
from memplan.plans import Plan
from memplan.problem import Problem
from memplan.program import StepKind
from memplan.runtime.tiers import Store
from memplan.simulate import Timeline, simulate
from memplan.solving import stored_plan


@dataclass(frozen=True)
class Planned:
    """A captured graph, its plan, and the joint Program that the plan means."""

    built: BuiltProblem
    plan: Plan
    scheduled: Scheduled
    lowered: Lowered
    timeline: Timeline
    layout: Layout | None = None  # offsets in an arena; None where torch allocates
    budget: int | None = None  # bytes
    fused: Fused | None = None  # the regions, where fusion is on
    counted: int = (
        0  # bytes that the solver counted with: more than the Program holds where that spares what it was not told
    )

    @property
    def problem(self) -> Problem:
        return self.built.problem

    @property
    def lowered_problem(self) -> Problem:
        """The problem whose ops the scheduled graph's nodes name: a region is an op of its own."""
        return self.problem if self.fused is None else self.fused.problem

    @property
    def stores(self) -> dict[str, Store]:
        """What the compiled function keeps on slower tiers, and what it moved there and back; by tier."""
        return stores(self.scheduled.graph_module)

    @property
    def held(self) -> int:
        """Bytes held at most: the Program's peak, or with an arena that is held throughout."""
        return self.timeline.peak if self.layout is None else self.layout.held(self.lowered.program)


def realise(built: BuiltProblem, plan: Plan, options: Options) -> Planned:
    """The graph rewritten as the plan says, lowered and replayed."""
    scheduled = Schedule(plan.sequence).apply(built)
    if plan.offloads:
        offload = Offload(plan.sequence, plan.offloads, options.swap_directory, options.tier_limits)
        scheduled = offload.apply(built, scheduled)
    lowered = lower(scheduled.graph_module, built.problem, scheduled.forward_nodes)
    return Planned(built, plan, scheduled, lowered, simulate(lowered.program))


def unplanned(built: BuiltProblem, options: Options) -> Lowered:
    """The step as it runs without memplan."""
    eager = built.as_eager
    return realise(eager, stored_plan(eager.problem), options).lowered


def finished(planned: Planned, options: Options, fuse: Fuse) -> Planned:
    """A plan that was just realised, with its regions, and with kernels that write over operands which die there."""
    if options.fusion_enabled and not planned.plan.offloads:
        planned = contracted(planned, fuse)
    return reused(planned) if reuses(planned, options) else planned


def reuses(planned: Planned, options: Options) -> bool:
    return options.reuse_enabled and not planned.plan.offloads and not has_symbolic_sizes(planned.built)


def contracted(planned: Planned, fuse: Fuse) -> Planned:
    fused = fuse.apply(planned.scheduled, planned.problem)
    lowered = lower(fused.scheduled.graph_module, fused.problem, fused.scheduled.forward_nodes)
    return replace(planned, scheduled=fused.scheduled, lowered=lowered, timeline=simulate(lowered.program), fused=fused)


def reused(planned: Planned) -> Planned:
    """The plan with kernels that write over operands which die there, where the peak falls by it."""
    steps = zip(planned.lowered.program.steps, planned.lowered.bindings, planned.timeline.loads, strict=True)
    loads = [(binding.node, load) for step, binding, load in steps if step.kind != StepKind.FREE]
    scheduled = planned.scheduled
    if not Reuse(loads).apply(scheduled, planned.lowered_problem):
        return planned
    lowered = lower(scheduled.graph_module, planned.lowered_problem, scheduled.forward_nodes)
    return replace(planned, lowered=lowered, timeline=simulate(lowered.program))


def has_symbolic_sizes(built: BuiltProblem) -> bool:
    """Whether the graph was captured for sizes that are not known."""
    return any(torch_compat.free_symbols(node.meta.get("val")) for node in built.capture.placeholders)

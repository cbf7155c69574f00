"""Which solvers run, in which order; from a captured graph to a validated plan and the Program it means."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from memplan import torch_compat
from memplan.build_problem import BuiltProblem, build_problem
from memplan.capture import Capture
from memplan.cost import CostModel
from memplan.cost.links import slower_tiers
from memplan.cost.signature import signature
from memplan.cost.workspace import unseen
from memplan.errors import BudgetInfeasibleError, LiveBuffer, PlanError
from memplan.lower import Lowered, lower
from memplan.options import Options
from memplan.outcome import Limits, Status
from memplan.passes.fuse import Fuse, Fused
from memplan.passes.offload import Offload, stores
from memplan.passes.reuse import Reuse, largest_over_operands
from memplan.passes.schedule import Schedule, Scheduled
from memplan.place import Layout, place
from memplan.plans import Plan
from memplan.problem import Phase, Problem
from memplan.program import StepKind
from memplan.runtime.tiers import Store
from memplan.simulate import Timeline, simulate
from memplan.trace import SILENT, Trace
from memplan.validate import check_sequence, validate

log = logging.getLogger("memplan")

_ATTEMPTS = 3  # times that bytes which regions or reuse free go back to the planner
_QUICKLY_SOLVED = 1000  # ops: the plans of larger graphs are made once
_SHARES = (0.5, 0.65)  # of the unplanned peak, tried without a budget: what GPT-2 and Llama recompute there is free
_AS_FAST = 1.01  # of the time: closer than estimates are to what is measured
_WORTH_SOLVING = 0.01  # of the bytes that a plan has to free
_ARENA_ATTEMPTS = 3  # placements tried before the arena is given up
_ARENA_MAY_COST = 1.01  # slowdown of the plan that an arena may cost; it saves 5-9 % on a ResNet in page faults


@dataclass(frozen=True)
class Elsewhere:
    """What the rest of a model holds beside one of its graphs, in bytes: ``held`` throughout, ``meanwhile`` more
    between its forward and its backward."""

    held: int = 0
    meanwhile: int = 0


NOTHING = Elsewhere()
Solved = dict[tuple[Problem, int | None], Plan]  # by problem and budget


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


def plan_capture(
    capture: Capture,
    options: Options,
    cost: CostModel,
    granularity: int,
    elsewhere: Elsewhere = NOTHING,
    progress: Callable[[str], None] | None = None,
    trace: Trace = SILENT,
    solved: Solved | None = None,
    estimated: bool = False,
) -> Planned:
    """Plan one captured graph. ``elsewhere``: what other graphs of the same model hold; ``trace``: told every stage;
    ``solved``: plans made before under the same options, and where this one is added; ``estimated``: compile no kernel,
    refine nothing: what rewrites are compared by.

    Raises BudgetInfeasibleError when no plan fits, PlanError when a solver's plan breaks a rule (a bug).
    """
    limited = options.memory_budget is not None or options.objective == "peak"
    homes = {given.home for given in capture.inputs if given.home}
    tiers = slower_tiers(options, capture.device_type, homes) if limited else ()
    built = build_problem(capture, cost, granularity, elsewhere.meanwhile, tiers)
    problem = built.problem
    trace.data("problem", problem)
    stored = tuple(range(len(problem.ops)))
    unplanned_peak, unplanned_time = check_sequence(problem, stored)
    budget = options.budget(unplanned_peak + elsewhere.held)
    limits = Limits(options.solver_work, options.solver_time_limit_s, options.solver_seed, progress)
    wanted = None if budget is None else budget - elsewhere.held
    solved = {} if solved is None else solved
    plan = solved.get((problem, wanted)) or solve(problem, wanted, options, limits)
    plan = solved[problem, wanted] = replace(plan, unplanned_peak=unplanned_peak, unplanned_time=unplanned_time)
    trace.data("solved", plan)
    planned = realise(built, plan, options)
    trace.graph("scheduled", planned.scheduled.graph_module)
    if options.verify:
        validate(problem, plan)
    # A copy that the forward could already bring back comes with the backward: the peak may then lie below the plan's.
    if planned.timeline.peak > plan.peak or (planned.timeline.peak != plan.peak and not plan.offloads):
        raise PlanError(f"the Program's peak is {planned.timeline.peak} bytes, its plan's {plan.peak}")
    if options.fusion_enabled and plan.offloads:
        log.warning("no fusion: regions do not yet move with the transfers of a plan that offloads")
    planned = _spared(planned, wanted, options, limits, estimated)
    if options.fusion_enabled:
        trace.graph("fused", planned.scheduled.graph_module)
    trace.data("program", planned.lowered.program)
    planned = replace(planned, plan=replace(planned.plan, peak_bound=_peak_bound(planned, options)))
    if wanted is not None and planned.timeline.peak > wanted:
        raise _infeasible(planned, wanted, elsewhere.held)
    if options.placement_enabled and not estimated and not _has_symbolic_sizes(capture):
        planned = _placed(planned, wanted, options, limits)
    peak = planned.timeline.peak
    plan = replace(planned.plan, budget=wanted, peak=peak, spared=planned.plan.peak - peak)
    trace.data("plan", plan)
    if wanted is not None and plan.status not in (Status.OPTIMAL, Status.FEASIBLE):
        # The least plan is over the budget by what fusion or reuse then spared: the Program keeps it.
        plan = replace(plan, status=Status.FEASIBLE)
    planned = replace(planned, plan=plan)
    log.info(
        "planned %d ops: peak %d of %d bytes, time %.4g of %.4g us, %d recomputations, gap %.2f%%",
        len(problem.ops),
        planned.held,
        unplanned_peak,
        plan.time,
        unplanned_time,
        plan.recomputed,
        100 * plan.gap,
    )
    if plan.offloads:
        waited = planned.timeline.waited
        log.info("%d stays on slower tiers, for which the step waits %.4g us", len(plan.offloads), waited)
    return planned


def _placed(planned: Planned, budget: int | None, options: Options, limits: Limits) -> Planned:
    """The plan with an arena, if that keeps the budget; a little slower a plan where that buys the arena.

    An arena is held at its full height while the caller's values stand beside it, so it may need more than the
    Program's peak; the excess is taken off the budget and the plan made again.
    """
    tightened = budget
    candidate = planned
    for _ in range(_ARENA_ATTEMPTS):
        candidate = replace(candidate, layout=_layout(candidate.lowered), budget=budget)
        if budget is None or tightened is None or candidate.held <= budget:
            return candidate
        if not options.recompute_enabled:
            break
        tightened -= candidate.held - budget
        plan = solve(planned.problem, tightened, options, limits)
        if plan.peak > tightened or plan.time > _ARENA_MAY_COST * planned.plan.time:
            break
        if options.verify:
            validate(planned.problem, plan)
        peak, time = planned.plan.unplanned_peak, planned.plan.unplanned_time
        plan = replace(plan, budget=budget, unplanned_peak=peak, unplanned_time=time)
        candidate = _finished(realise(planned.built, plan, options), options, Fuse(budget, options.lowering))
    log.info("no arena: beside what the caller holds it would not fit the budget")
    return replace(planned, budget=budget)


def _spared(planned: Planned, budget: int | None, options: Options, limits: Limits, estimated: bool) -> Planned:
    """The plan with its regions and with results over operands. Where they leave bytes of the budget free, those go back
    to the planner: less is recomputed as long as the Program keeps the budget and gets faster."""
    trial = Fuse(budget, options.lowering, measured=False)
    if budget is None:
        limit = None
        if options.fusion_enabled and options.objective == "time" and not estimated:
            planned, limit = _free_of_time(planned, options, limits)
            planned = realise(planned.built, planned.plan, options)
        return _finished(planned, options, replace(trial, limit=limit, measured=not estimated))
    best = _finished(planned, options, trial)
    if estimated or best.timeline.peak > budget:
        return best  # refused: no kernel's workspace would help
    best = _loosened(best, budget, options, limits, trial)
    if not options.fusion_enabled:
        return best
    for plan in (best.plan, planned.plan):
        found = _finished(realise(planned.built, plan, options), options, replace(trial, measured=True))
        if found.timeline.peak <= budget:
            return found
    return found


def _loosened(best: Planned, budget: int, options: Options, limits: Limits, trial: Fuse) -> Planned:
    """The fastest of the plans for budgets that exceed this one by what their Programs spare."""
    peak, time = best.plan.unplanned_peak, best.plan.unplanned_time
    spare = budget - best.timeline.peak
    for _ in range(_ATTEMPTS):
        if not best.plan.recomputed or not options.recompute_enabled or len(best.problem.ops) > _QUICKLY_SOLVED:
            break
        if spare < _WORTH_SOLVING * (peak - budget):
            break
        loosened = best.plan.peak + spare
        plan = solve(best.problem, loosened, options, limits)
        if plan.peak > loosened or plan.peak <= best.plan.peak:
            break
        if options.verify:
            validate(best.problem, plan)
        plan = replace(plan, unplanned_peak=peak, unplanned_time=time)
        candidate = _finished(realise(best.built, plan, options), options, trial)
        if candidate.timeline.peak > budget:
            spare //= 2
        elif candidate.timeline.time >= best.timeline.time:
            break
        else:
            best, spare = candidate, budget - candidate.timeline.peak
    return best


def _finished(planned: Planned, options: Options, fuse: Fuse) -> Planned:
    """A plan that was just realised, with its regions, and with kernels that write over operands which die there."""
    if options.fusion_enabled and not planned.plan.offloads:
        planned = _contracted(planned, fuse)
    return _reused(planned) if _reuses(planned, options) else planned


def _reuses(planned: Planned, options: Options) -> bool:
    return options.reuse_enabled and not planned.plan.offloads and not _has_symbolic_sizes(planned.built.capture)


def _free_of_time(planned: Planned, options: Options, limits: Limits) -> tuple[Planned, int | None]:
    """Without a budget: a plan that holds less, where what it recomputes melts into the backward's regions and so costs
    no time; and the bytes that its regions may hold."""
    if not options.recompute_enabled or all(op.phase == Phase.FORWARD for op in planned.problem.ops):
        return planned, None
    peak, time = planned.plan.unplanned_peak, planned.plan.unplanned_time
    longest = _AS_FAST * _contracted(planned, Fuse(None, options.lowering, measured=False)).timeline.time
    for share in _SHARES:
        limit = int(share * peak)
        plan = solve(planned.problem, limit, options, limits)
        if plan.peak > limit:
            continue
        if options.verify:
            validate(planned.problem, plan)
        plan = replace(plan, budget=None, unplanned_peak=peak, unplanned_time=time)
        candidate = realise(planned.built, plan, options)
        if _contracted(candidate, Fuse(limit, options.lowering, measured=False)).timeline.time <= longest:
            return candidate, limit
    return planned, None


def _contracted(planned: Planned, fuse: Fuse) -> Planned:
    fused = fuse.apply(planned.scheduled, planned.problem)
    lowered = lower(fused.scheduled.graph_module, fused.problem, fused.scheduled.forward_nodes)
    return replace(planned, scheduled=fused.scheduled, lowered=lowered, timeline=simulate(lowered.program), fused=fused)


def _reused(planned: Planned) -> Planned:
    """The plan with kernels that write over operands which die there, where the peak falls by it."""
    steps = zip(planned.lowered.program.steps, planned.lowered.bindings, planned.timeline.loads, strict=True)
    loads = [(binding.node, load) for step, binding, load in steps if step.kind != StepKind.FREE]
    scheduled = planned.scheduled
    if not Reuse(loads).apply(scheduled, planned.lowered_problem):
        return planned
    lowered = lower(scheduled.graph_module, planned.lowered_problem, scheduled.forward_nodes)
    return replace(planned, lowered=lowered, timeline=simulate(lowered.program))


def _layout(lowered: Lowered) -> Layout:
    """An arena for what torch's allocator hands out; what kernels take past it stays beside."""
    workspaces: dict[int, int] = {}
    most = 0
    for at, (step, binding) in enumerate(zip(lowered.program.steps, lowered.bindings, strict=True)):
        workspaces[at], node = step.workspace, binding.node
        if node is not None and isinstance(node.target, torch._ops.OpOverload):
            past = unseen(signature(node), torch.get_num_threads())
            workspaces[at] = max(0, step.workspace - past)
            most = max(most, past)
    return place(lowered.program, workspaces, most)


def _has_symbolic_sizes(capture: Capture) -> bool:
    return any(torch_compat.free_symbols(node.meta.get("val")) for node in capture.placeholders)


def solve(problem: Problem, budget: int | None, options: Options, limits: Limits) -> Plan:
    """The plan for a budget in bytes; without one, the plan that costs no time. Over budget only when none fits."""
    from memplan.solvers.offload import solve_offload
    from memplan.solvers.order import solve_order
    from memplan.solvers.recompute import minimise_peak, solve_recompute

    if problem.homed:
        return _streaming_plan(problem, budget, options, limits)
    if options.objective == "peak":
        return (
            minimise_peak(problem, limits=limits) if options.recompute_enabled else solve_order(problem, limits=limits)
        )
    stored = stored_plan(problem, budget)
    if budget is not None and stored.peak <= budget:
        return stored
    ordered = replace(solve_order(problem, goal=budget or 0, limits=limits), budget=budget)
    if budget is None:
        return ordered if ordered.peak < stored.peak else stored
    if ordered.peak <= budget:
        return replace(ordered, status=Status.OPTIMAL)
    recompute = options.recompute_enabled
    if not problem.tiers or not options.swap_enabled:
        if not recompute:
            return replace(ordered, budget=None)
        # Refused, it returns the plan of the least peak, whose bytes are then named as the smallest feasible budget.
        return solve_recompute(problem, budget, limits=limits, start=ordered.sequence)
    plan = solve_offload(problem, budget, limits=limits, start=ordered.sequence, recompute=recompute)
    if plan.peak <= budget or not recompute:
        return plan
    lowest = minimise_peak(problem, limits=limits, start=ordered.sequence)
    if lowest.peak <= budget:
        return replace(lowest, budget=budget)
    return plan if plan.offloads and plan.peak < lowest.peak else lowest


def _streaming_plan(problem: Problem, budget: int | None, options: Options, limits: Limits) -> Plan:
    """The plan of a problem with homes: what lies on a tier between steps needs its transfers under any budget."""
    from memplan.solvers.offload import offload_peak_bound, solve_offload, streamed
    from memplan.solvers.order import solve_order

    goal = budget
    if options.objective == "peak":
        goal = offload_peak_bound(problem)
    elif goal is None:
        goal = stored_plan(problem).peak
    ordered = solve_order(streamed(problem), goal=goal, limits=limits)
    plan = solve_offload(problem, goal, limits=limits, start=ordered.sequence, recompute=options.recompute_enabled)
    return plan if goal == budget else replace(plan, budget=None)


def stored_plan(problem: Problem, budget: int | None = None) -> Plan:
    """Every op once, in stored order."""
    sequence = tuple(range(len(problem.ops)))
    peak, time = check_sequence(problem, sequence)
    return Plan(sequence, budget, peak, time, bound=problem.total_time, status=Status.OPTIMAL, solver="stored order")


def realise(built: BuiltProblem, plan: Plan, options: Options) -> Planned:
    """The graph rewritten as the plan says, lowered and replayed."""
    scheduled = Schedule(plan.sequence).apply(built)
    if plan.offloads:
        offload = Offload(plan.sequence, plan.offloads, options.swap_directory, options.tier_limits)
        scheduled = offload.apply(built, scheduled)
    lowered = lower(scheduled.graph_module, built.problem, scheduled.forward_nodes)
    return Planned(built, plan, scheduled, lowered, simulate(lowered.program))


def _peak_bound(planned: Planned, options: Options) -> int:
    """A bound on the peak of any Program: regions never make their inner buffers, and a result may lie over an operand."""
    bound = planned.plan.peak_bound
    if planned.fused is not None:
        bound = 0
    elif _reuses(planned, options):
        bound -= largest_over_operands(planned.problem)
    return min(planned.timeline.peak, max(planned.problem.resident_bytes, bound))


def _infeasible(planned: Planned, budget: int, elsewhere: int) -> BudgetInfeasibleError:
    timeline, program = planned.timeline, planned.timeline.program
    at = timeline.peak_step
    alive = tuple(
        LiveBuffer(s.name, s.size, s.category, s.module, s.source)
        for s in (program.storages[i] for i in timeline.alive(at))
    )
    return BudgetInfeasibleError(
        budget + elsewhere,
        timeline.peak + elsewhere,
        elsewhere + planned.plan.peak_bound,
        program.steps[at].name if program.steps else "",
        alive,
    )

"""From a captured graph to a validated plan and the Program it means."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from memplan.arrange import Arranger
from memplan.build_problem import build_problem
from memplan.capture import Capture
from memplan.cost import CostModel
from memplan.cost.links import slower_tiers
from memplan.errors import BudgetInfeasibleError, LiveBuffer
from memplan.options import Options
from memplan.outcome import Limits, Status
from memplan.passes.fuse import Fuse
from memplan.passes.reuse import any_overlays, overlaid
from memplan.plans import Plan
from memplan.realise import Planned, finished, has_symbolic_sizes, reuses
from memplan.seek import Seek, Solved
from memplan.spare import spared
from memplan.trace import SILENT, Trace
from memplan.validate import validate

log = logging.getLogger("memplan")

_ARENA_ATTEMPTS = 4  # placements tried before the arena is given up
_ARENA_MAY_COST = 1.01  # slowdown of the plan that an arena may cost; it saves 5-9 % on a ResNet in page faults


@dataclass(frozen=True)
class Elsewhere:
    """What the rest of a model holds beside one of its graphs, in bytes: ``held`` throughout, ``meanwhile`` more
    between its forward and its backward."""

    held: int = 0
    meanwhile: int = 0


NOTHING = Elsewhere()


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
    limits = Limits(options.solver_work, options.solver_time_limit_s, options.solver_seed, progress)
    seek = Seek(built, options, limits, {} if solved is None else solved)
    budget = options.budget(seek.stored.peak + elsewhere.held)
    wanted = None if budget is None else budget - elsewhere.held
    planned = seek.plan(wanted)
    trace.data("solved", planned.plan)
    trace.graph("scheduled", planned.scheduled.graph_module)
    if options.fusion_enabled and planned.plan.offloads and not estimated:
        log.warning("no fusion: regions do not yet move with the transfers of a plan that offloads")
    planned = spared(planned, wanted, seek, estimated)
    if options.fusion_enabled:
        trace.graph("fused", planned.scheduled.graph_module)
    trace.data("program", planned.lowered.program)
    planned = replace(planned, plan=replace(planned.plan, peak_bound=_peak_bound(planned, options)))
    if wanted is not None and planned.timeline.peak > wanted:
        raise _infeasible(planned, wanted, elsewhere.held)
    if options.placement_enabled and not estimated and not has_symbolic_sizes(built):
        planned = _placed(planned, wanted, seek, Arranger(cost))
    peak = planned.timeline.peak
    plan = replace(planned.plan, budget=wanted, peak=peak, spared=planned.plan.peak - peak)
    if wanted is not None and plan.status not in (Status.OPTIMAL, Status.FEASIBLE):
        # The least plan is over the budget by what fusion or reuse then spared: the Program keeps it.
        plan = replace(plan, status=Status.FEASIBLE)
    if options.verify:
        validate(problem, plan)
    trace.data("plan", plan)
    planned = replace(planned, plan=plan)
    log.info(
        "planned %d ops: peak %d of %d bytes, time %.4g of %.4g us, %d recomputations, gap %.2f%%",
        len(problem.ops),
        planned.held,
        plan.unplanned_peak,
        plan.time,
        plan.unplanned_time,
        plan.recomputed,
        100 * plan.gap,
    )
    if plan.offloads:
        waited = planned.timeline.waited
        log.info("%d stays on slower tiers, for which the step waits %.4g us", len(plan.offloads), waited)
    return planned


def plan_frontier(
    main: Planned, options: Options, points: int, floor: int, progress: Callable[[str], None] | None = None
) -> list[Plan]:
    """Plans of a planned graph, as a compiled step would run them, for ``points`` budgets in ascending order: from the
    least that is found up to the unplanned peak, which makes a plan of its own no more. Peaks are the Programs'.

    ``floor``: bytes below which a plan would gain nothing.
    """
    limits = Limits(options.solver_work, options.solver_time_limit_s, options.solver_seed, progress)
    options = replace(options, memory_budget=None)
    seek = Seek(main.built, options, limits, {})
    highest = seek.stored.peak
    if floor >= highest:
        return []
    lowest = max(floor, finished(seek.least(), options, Fuse(None, options.lowering)).timeline.peak)
    plans = []
    for k in range(points - 1):
        budget = lowest + (highest - lowest) * k // (points - 1)
        planned = finished(seek.plan(budget), options, Fuse(budget, options.lowering))
        peak, plan = planned.timeline.peak, planned.plan
        if peak <= budget:
            plans.append(replace(plan, budget=budget, peak=peak, peak_bound=_peak_bound(planned, options)))
    return plans


def _placed(planned: Planned, budget: int | None, seek: Seek, arranger: Arranger) -> Planned:
    """The plan with an arena, if that keeps the budget; a little slower a plan where that buys the arena.

    An arena is held at its full height while the caller's values stand beside it, so it may need more than the
    Program's peak; the excess is taken off the budget and the plan made again.
    """
    tightened, options = budget, seek.options
    candidate = planned
    for _ in range(_ARENA_ATTEMPTS):
        candidate = replace(candidate, layout=arranger.layout(candidate.lowered), budget=budget)
        if budget is None or tightened is None or candidate.held <= budget:
            return candidate
        if not options.recompute_enabled:
            break
        tightened = min(tightened, candidate.timeline.peak) - (candidate.held - budget)
        candidate = finished(seek.plan(tightened), options, Fuse(budget, options.lowering))
        if candidate.timeline.peak > tightened or candidate.timeline.time > _ARENA_MAY_COST * planned.timeline.time:
            break
    log.info("no arena: beside what the caller holds it would not fit the budget")
    return replace(planned, budget=budget)


def _peak_bound(planned: Planned, options: Options) -> int:
    """A bound on the peak of any Program: regions never make their inner buffers, and a result may lie over an operand."""
    from memplan.solvers.recompute import peak_bound

    problem = planned.problem
    bound = planned.plan.peak_bound
    if planned.fused is not None:
        bound = 0
    elif reuses(planned, options):
        least = any_overlays(problem)
        bound = max(peak_bound(overlaid(problem, least)), bound - max(least.values(), default=0))
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

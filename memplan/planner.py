"""From a captured graph to a validated plan and the Program it means."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from memplan.arrange import Arranger
from memplan.build_problem import OP, BuiltProblem, build_problem
from memplan.capture import Capture
from memplan.cost import CostModel
from memplan.cost.links import slower_tiers
from memplan.errors import BudgetInfeasibleError, LiveBuffer, PlanError
from memplan.options import Options
from memplan.outcome import Limits, Status
from memplan.passes.fuse import Fuse, joining
from memplan.passes.reuse import Overlays, any_overlays, overlaid, overlays, overwritten
from memplan.plans import Plan
from memplan.problem import Phase, Problem
from memplan.realise import Planned, contracted, finished, has_symbolic_sizes, realise, reused, reuses
from memplan.solving import solve, stored_plan
from memplan.trace import SILENT, Trace
from memplan.validate import check_sequence, validate

log = logging.getLogger("memplan")

_ATTEMPTS = 3  # times that bytes which regions or reuse free go back to the planner
_QUICKLY_SOLVED = 1000  # ops: the plans of larger graphs are made once
# Of the unplanned peak, tried without a budget until one costs time: what GPT-2, Llama and T5 recompute is free.
_SHARES = (0.9, 0.8, 0.65, 0.5)
_AS_FAST = 1.02  # of the time: as close as estimates are to what is measured
_WORTH = 0.2  # without a budget: one percent of the time has to buy five of the peak
_WORTH_SOLVING = 0.01  # of the bytes that a plan has to free
_ARENA_ATTEMPTS = 4  # placements tried before the arena is given up
_ARENA_MAY_COST = 1.01  # slowdown of the plan that an arena may cost; it saves 5-9 % on a ResNet in page faults


@dataclass(frozen=True)
class Elsewhere:
    """What the rest of a model holds beside one of its graphs, in bytes: ``held`` throughout, ``meanwhile`` more
    between its forward and its backward."""

    held: int = 0
    meanwhile: int = 0


NOTHING = Elsewhere()
Solved = dict[tuple[Problem, int | None, str], Plan]  # by problem, budget and objective


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
    seek = _Seek(built, options, limits, {} if solved is None else solved)
    budget = options.budget(seek.stored.peak + elsewhere.held)
    wanted = None if budget is None else budget - elsewhere.held
    planned = seek.plan(wanted)
    trace.data("solved", planned.plan)
    trace.graph("scheduled", planned.scheduled.graph_module)
    if options.fusion_enabled and planned.plan.offloads and not estimated:
        log.warning("no fusion: regions do not yet move with the transfers of a plan that offloads")
    planned = _spared(planned, wanted, seek, estimated)
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
    seek = _Seek(main.built, options, limits, {})
    highest = seek.stored.peak
    if floor >= highest:
        return []
    lowest = max(floor, _least(seek).timeline.peak)
    plans = []
    for k in range(points - 1):
        budget = lowest + (highest - lowest) * k // (points - 1)
        planned = _spared(seek.plan(budget), budget, seek, estimated=True)
        peak, plan = planned.timeline.peak, planned.plan
        if peak <= budget:
            plans.append(replace(plan, budget=budget, peak=peak, peak_bound=_peak_bound(planned, options)))
    return plans


class _Seek:
    """Plans of one graph, for one budget or another, and the Programs they mean."""

    def __init__(self, built: BuiltProblem, options: Options, limits: Limits, solved: Solved) -> None:
        self.built, self.options, self.limits, self.solved = built, options, limits, solved
        self.stored = stored_plan(built.problem)
        self.attempts = _ATTEMPTS if len(built.problem.ops) <= _QUICKLY_SOLVED else 1

    def plan(self, budget: int | None) -> Planned:
        """The plan for so many bytes, all of this graph's; the least one where none is found.

        Where kernels may write over operands, the solver is told of those that may in the stored order; of fewer, should
        the Program of its plan not bear that out.
        """
        if budget is None and self.options.objective == "peak":
            return self.least()
        told = overlays = self._overlays()
        for _ in range(self.attempts):
            if not overlays:
                break
            planned = self._ask(overlays, budget, self.options)
            if budget is not None and planned.counted > budget:
                return self.least()
            limit = planned.counted if budget is None else budget
            if planned.timeline.peak <= limit:
                return planned
            overlays = _borne_out(planned, overlays, limit)
        planned = self._ask({}, budget, self.options)
        return self.least() if told and budget is not None and planned.counted > budget else planned

    def least(self) -> Planned:
        """The plan whose Program holds least, the same for every budget that is refused."""
        aim = replace(self.options, memory_budget=None, objective="peak")
        overlays = self._overlays()
        for _ in range(self.attempts):
            if not overlays:
                break
            planned = self._ask(overlays, None, aim)
            if planned.timeline.peak <= planned.counted:
                return planned
            overlays = _borne_out(planned, overlays, planned.counted)
        return self._ask({}, None, aim)

    def melted(self, plan: Plan) -> Planned | None:
        """The plan with recomputations that its regions take in; None where there are none.

        What it would hold without regions is no measure of it, and so no solver's bound is one of its time.
        """
        from memplan.solvers.recompute import melted

        options = self.options
        if not options.fusion_enabled or not options.recompute_enabled or self.built.problem.tiers:
            return None
        fusible, pointwise = self._joining
        sequence = melted(self.built.problem, plan.sequence, pointwise, fusible)
        if sequence is None:
            return None
        peak, time = check_sequence(self.built.problem, sequence)
        solver = f"{plan.solver}, minimum cut"
        free = Plan(
            sequence, None, peak, time, self.stored.time, bound_scope="any order", solver=solver,
            unplanned_peak=self.stored.peak, unplanned_time=self.stored.time,
        )  # fmt: skip
        return replace(realise(self.built, free, options), counted=peak)

    @cached_property
    def _joining(self) -> tuple[frozenset[int], frozenset[int]]:
        return joining(self.built)

    def _overlays(self) -> Overlays:
        problem, options = self.built.problem, self.options
        if not options.reuse_enabled or options.fusion_enabled or problem.tiers or has_symbolic_sizes(self.built):
            return {}
        return overlays(realise(self.built, self.stored, options).scheduled, problem)

    def _ask(self, overlays: Overlays, budget: int | None, options: Options) -> Planned:
        """A solver's plan with its Program."""
        problem = self.built.problem
        asked = overlaid(problem, overlays)
        key = (asked, budget, options.objective)
        plan = self.solved[key] = self.solved.get(key) or solve(asked, budget, options, self.limits)
        counted = plan.peak
        if options.verify:
            validate(asked, plan)
        if overlays:
            plan = replace(plan, budget=None, peak=check_sequence(problem, plan.sequence)[0])
        peak, time = self.stored.peak, self.stored.time
        planned = realise(self.built, replace(plan, unplanned_peak=peak, unplanned_time=time), options)
        # A copy that the forward could already bring back comes with the backward: the peak may then lie below the plan's.
        found, stated = planned.timeline.peak, planned.plan.peak
        if found > stated or (found != stated and not plan.offloads):
            raise PlanError(f"the Program's peak is {found} bytes, its plan's {stated}")
        planned = replace(planned, counted=counted)
        return reused(planned) if overlays else planned


def _borne_out(planned: Planned, overlays: Overlays, limit: int) -> Overlays:
    """Without the results that made memory of their own where more than ``limit`` bytes are held; none if that does not
    explain it."""
    steps = zip(planned.lowered.bindings, planned.timeline.loads, strict=True)
    over = [binding.node for binding, load in steps if load > limit and binding.node is not None]
    failed = {node.meta[OP] for node in over if OP in node.meta and overwritten(node) is None} & overlays.keys()
    return {op: size for op, size in overlays.items() if op not in failed} if failed else {}


def _placed(planned: Planned, budget: int | None, seek: _Seek, arranger: Arranger) -> Planned:
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
        if candidate.timeline.peak > tightened or candidate.plan.time > _ARENA_MAY_COST * planned.plan.time:
            break
    log.info("no arena: beside what the caller holds it would not fit the budget")
    return replace(planned, budget=budget)


def _spared(planned: Planned, budget: int | None, seek: _Seek, estimated: bool) -> Planned:
    """The plan with its regions and with results over operands. Where they leave bytes of the budget free, those go back
    to the planner: less is recomputed as long as the Program keeps the budget and gets faster."""
    options = seek.options
    trial = Fuse(budget, options.lowering, measured=False)
    if budget is None:
        limit = None
        if options.fusion_enabled and options.objective == "time" and not estimated:
            planned, limit = _free_of_time(planned, seek)
            planned = realise(planned.built, planned.plan, options)
        return finished(planned, options, replace(trial, limit=limit, measured=not estimated))
    best = finished(planned, options, trial)
    if best.timeline.peak <= budget and not estimated:
        best = _loosened(best, budget, seek, trial)
    best = _melted(best, budget, seek, trial)
    if estimated or not options.fusion_enabled:
        return best
    for plan in (best.plan, planned.plan) if best.timeline.peak <= budget else ():
        found = finished(realise(planned.built, plan, options), options, replace(trial, measured=True))
        if found.timeline.peak <= budget:
            return found
    return _least(seek)


def _loosened(best: Planned, budget: int, seek: _Seek, trial: Fuse) -> Planned:
    """The fastest of the plans for budgets that exceed this one by what their Programs spare."""
    asked, spare = budget, best.counted - best.timeline.peak
    for _ in range(seek.attempts):
        if not best.plan.recomputed or not seek.options.recompute_enabled:
            break
        if spare < _WORTH_SOLVING * (seek.stored.peak - budget):
            break
        candidate = finished(seek.plan(asked + spare), seek.options, trial)
        if candidate.timeline.peak > budget:
            spare //= 2
        elif candidate.timeline.time >= best.timeline.time:
            break
        else:
            asked, best = asked + spare, candidate
            spare = best.counted - best.timeline.peak - (asked - budget)
    return best


def _melted(best: Planned, budget: int, seek: _Seek, trial: Fuse) -> Planned:
    """The fastest within the budget of a plan, and of it and the stored order with recomputations that regions take in:
    the solver counts with every result on its own, and does not see how little those hold."""
    for plan in (seek.stored, best.plan):
        melted = seek.melted(plan)
        found = None if melted is None else finished(melted, seek.options, trial)
        if found is None or found.timeline.peak > budget:
            continue
        if best.timeline.peak > budget or found.timeline.time < best.timeline.time:
            return found
    return best


def _least(seek: _Seek) -> Planned:
    """What holds least, finished: what a refusal names must be kept when it is asked for, so it depends on no budget."""
    plan, options = seek.least(), seek.options
    trial = Fuse(None, options.lowering, measured=False)
    melted = seek.melted(plan.plan)
    if melted is not None:
        plan = min(plan, melted, key=lambda p: finished(p, options, trial).timeline.peak)
    return finished(realise(seek.built, plan.plan, options), options, replace(trial, measured=True))


def _free_of_time(planned: Planned, seek: _Seek) -> tuple[Planned, int | None]:
    """Without a budget: a plan that holds less, where what it recomputes melts into the backward's regions and so costs
    no time; and the bytes that its regions may hold."""
    options = seek.options
    if not options.recompute_enabled or all(op.phase == Phase.FORWARD for op in planned.problem.ops):
        return planned, None

    def variants(candidate: Planned, limit: int | None) -> list[tuple[Planned, int | None]]:
        fuse = Fuse(limit, options.lowering, measured=False)
        melted = seek.melted(candidate.plan)
        return [(contracted(plan, fuse), limit) for plan in (candidate, melted) if plan is not None]

    found = variants(planned, None)
    most = found[0][0].timeline
    for share in _SHARES:
        limit = int(share * seek.stored.peak)
        candidate = seek.plan(limit)
        if candidate.timeline.peak > limit:
            break
        fast = [v for v in variants(candidate, limit) if v[0].timeline.time <= _AS_FAST * most.time]
        if not fast:  # nor is what holds even less
            break
        found += fast
    best = [v for v in found if v[0].timeline.peak <= most.peak]
    return min(best, key=lambda v: v[0].timeline.time * v[0].timeline.peak ** _WORTH)


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

"""Which solvers run, in which order; from a captured graph to a validated plan and the Program it means."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from memplan.build_problem import BuiltProblem, build_problem
from memplan.capture import Capture
from memplan.cost import CostModel
from memplan.errors import BudgetInfeasibleError, LiveBuffer, PlanError
from memplan.lower import Lowered, lower
from memplan.options import Options
from memplan.outcome import Limits, Status
from memplan.passes.schedule import Schedule, Scheduled
from memplan.plan import Plan
from memplan.problem import Problem
from memplan.simulate import Timeline, simulate
from memplan.validate import check_sequence, validate

log = logging.getLogger("memplan")


@dataclass(frozen=True)
class Planned:
    """A captured graph, its plan, and the joint Program that the plan means."""

    built: BuiltProblem
    plan: Plan
    scheduled: Scheduled
    lowered: Lowered
    timeline: Timeline

    @property
    def problem(self) -> Problem:
        return self.built.problem


def plan_capture(
    capture: Capture,
    options: Options,
    cost: CostModel,
    granularity: int,
    held_elsewhere: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Planned:
    """Plan one captured graph. ``held_elsewhere``: bytes that other graphs of the same model hold meanwhile.

    Raises BudgetInfeasibleError when no plan fits, PlanError when a solver's plan breaks a rule (a bug).
    """
    built = build_problem(capture, cost, granularity)
    problem = built.problem
    stored = tuple(range(len(problem.ops)))
    unplanned_peak, unplanned_time = check_sequence(problem, stored)
    budget = options.budget(unplanned_peak)
    limits = Limits(options.solver_work, options.solver_time_limit_s, options.solver_seed, progress)
    wanted = None if budget is None else budget - held_elsewhere
    plan = solve(problem, wanted, options, limits)
    plan = replace(plan, unplanned_peak=unplanned_peak, unplanned_time=unplanned_time)
    planned = _realise(built, plan)
    if wanted is not None and plan.peak > wanted:
        raise _infeasible(planned, wanted)
    if options.verify:
        validate(problem, plan)
    if planned.timeline.peak != plan.peak:
        raise PlanError(f"the Program's peak is {planned.timeline.peak} bytes, its plan's {plan.peak}")
    log.info(
        "planned %d ops: peak %d of %d bytes, time %.4g of %.4g us, %d recomputations, gap %.2f%%",
        len(problem.ops),
        plan.peak,
        unplanned_peak,
        plan.time,
        unplanned_time,
        plan.recomputed,
        100 * plan.gap,
    )
    return planned


def solve(problem: Problem, budget: int | None, options: Options, limits: Limits) -> Plan:
    """The plan for a budget in bytes; without one, the plan that costs no time. Over budget only when none fits."""
    from memplan.solvers.order import solve_order
    from memplan.solvers.recompute import minimise_peak, solve_recompute

    if options.objective == "peak":
        return (
            minimise_peak(problem, limits=limits) if options.recompute_enabled else solve_order(problem, limits=limits)
        )
    stored = stored_plan(problem, budget)
    if budget is not None and stored.peak <= budget:
        return stored
    ordered = replace(solve_order(problem, limits=limits), budget=budget)
    if budget is None:
        return ordered if ordered.peak < stored.peak else stored
    if ordered.peak <= budget or not options.recompute_enabled:
        return replace(ordered, status=Status.OPTIMAL) if ordered.peak <= budget else ordered
    plan = solve_recompute(problem, budget, limits=limits, start=ordered.sequence)
    return plan if plan.peak <= budget else minimise_peak(problem, limits=limits, start=plan.sequence)


def stored_plan(problem: Problem, budget: int | None = None) -> Plan:
    """Every op once, in stored order."""
    sequence = tuple(range(len(problem.ops)))
    peak, time = check_sequence(problem, sequence)
    return Plan(sequence, budget, peak, time, bound=problem.total_time, status=Status.OPTIMAL, solver="stored order")


def _realise(built: BuiltProblem, plan: Plan) -> Planned:
    scheduled = Schedule(plan.sequence).apply(built)
    lowered = lower(scheduled.graph_module, built.problem, scheduled.forward_nodes)
    return Planned(built, plan, scheduled, lowered, simulate(lowered.program))


def _infeasible(planned: Planned, budget: int) -> BudgetInfeasibleError:
    timeline, program = planned.timeline, planned.timeline.program
    at = timeline.peak_step
    alive = tuple(
        LiveBuffer(s.name, s.size, s.category, s.module, s.source)
        for s in (program.storages[i] for i in timeline.alive(at))
    )
    return BudgetInfeasibleError(
        budget,
        planned.plan.peak,
        min(planned.plan.peak, max(planned.plan.peak_bound, planned.problem.resident_bytes)),
        program.steps[at].name if program.steps else "",
        alive,
    )

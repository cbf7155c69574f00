"""Which solvers run for a problem, in which order."""

from __future__ import annotations

from dataclasses import replace

from memplan.options import Options
from memplan.outcome import Limits, Status
from memplan.plans import Plan
from memplan.problem import Problem
from memplan.validate import check_sequence


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

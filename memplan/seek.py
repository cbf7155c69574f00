"""Plans of one graph, for one budget or another, and the Programs they mean."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from memplan.build_problem import OP, BuiltProblem
from memplan.errors import PlanError
from memplan.options import Options
from memplan.outcome import Limits
from memplan.passes.fuse import joining
from memplan.passes.reuse import Overlays, overlaid, overlays, overwritten
from memplan.plans import Plan
from memplan.problem import Problem
from memplan.realise import Planned, has_symbolic_sizes, realise, reused
from memplan.solving import solve, stored_plan
from memplan.validate import check_sequence, validate

Solved = dict[tuple[Problem, int | None, str], Plan]  # by problem, budget and objective

_ATTEMPTS = 3  # times that bytes which regions or reuse free go back to the planner
_QUICKLY_SOLVED = 1000  # ops: the plans of larger graphs are made once


class Seek:
    """Asks the solvers about one graph; what was asked before is answered from ``solved``."""

    def __init__(self, built: BuiltProblem, options: Options, limits: Limits, solved: Solved) -> None:
        self.built, self.options, self.limits, self.solved = built, options, limits, solved
        stored = stored_plan(built.problem)
        self.stored = replace(stored, unplanned_peak=stored.peak, unplanned_time=stored.time)
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

    def within(self, limit: int) -> Planned:
        """The solver's fastest plan for so many bytes, whatever is aimed at; the least one where none is found."""
        return self._ask({}, limit, replace(self.options, objective="time"))

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

    @property
    def may_melt(self) -> bool:
        """Whether plans have regions, and may recompute; of what lies on slower tiers a cut knows nothing."""
        options = self.options
        return options.fusion_enabled and options.recompute_enabled and not self.built.problem.tiers

    def melted(self, plan: Plan) -> Planned | None:
        """The plan with recomputations that its regions take in; None where there are none.

        What it would hold without regions is no measure of it, and so no solver's bound is one of its time.
        """
        from memplan.solvers.recompute import melted

        if not self.may_melt:
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
        return replace(realise(self.built, free, self.options), counted=peak)

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

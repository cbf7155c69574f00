"""An independent check of a plan against its problem. Shares no code with any solver or with the simulator.

Written from the rules in memplan/problem.py, one copy at a time, in the most literal way.
"""

from __future__ import annotations

from memplan.errors import PlanError
from memplan.plans import Plan
from memplan.problem import Phase, Problem


def validate(problem: Problem, plan: Plan) -> None:
    """Raise PlanError when the plan breaks a rule of the problem, its budget, or states a wrong peak or time."""
    peak, time = check_sequence(problem, plan.sequence)
    if plan.offloads:
        raise PlanError("this validator knows no offload decisions")
    if peak != plan.peak:
        raise PlanError(f"the plan states a peak of {plan.peak} bytes; it is {peak}")
    if abs(time - plan.time) > 1e-6 * max(1.0, time):
        raise PlanError(f"the plan states a time of {plan.time}; it is {time}")
    if plan.budget is not None and peak > plan.budget:
        raise PlanError(f"the plan's peak of {peak} bytes is over its budget of {plan.budget}")


def check_sequence(problem: Problem, sequence: tuple[int, ...]) -> tuple[int, float]:
    """(peak bytes, time) of a sequence; raises PlanError at the first rule it breaks."""
    ops, buffers = problem.ops, problem.buffers
    made_by_an_op = {b for op in ops for b in op.writes}
    newest: dict[int, int] = {}  # buffer -> position of the run that made the copy in force
    held_until: dict[tuple[int, int], int] = {}  # (buffer, made at) -> last position that holds the copy
    kept: set[tuple[int, int]] = set()  # forward outputs: the copies that the caller holds
    ran: set[int] = set()
    backward_began = False
    time = 0.0
    for at, i in enumerate(sequence):
        if not 0 <= i < len(ops):
            raise PlanError(f"position {at}: there is no op {i}")
        op = ops[i]
        if op.phase != Phase.FORWARD and not backward_began:
            backward_began = True
            for b in problem.forward_outputs:
                if b in made_by_an_op and b not in newest:
                    raise PlanError(f"position {at}: backward begins before forward output {buffers[b].name} exists")
                if b in made_by_an_op:
                    kept.add((b, newest[b]))
        if op.once and i in ran:
            raise PlanError(f"position {at}: {op.name} must run once and runs again")
        if op.once and op.phase == Phase.FORWARD and backward_began:
            raise PlanError(f"position {at}: {op.name} belongs to the forward and runs after backward began")
        for j in op.after:
            if j not in ran:
                raise PlanError(f"position {at}: {op.name} runs before {ops[j].name}, which it must follow")
        for b in op.reads:
            if b not in made_by_an_op:
                continue
            if b not in newest:
                raise PlanError(f"position {at}: {op.name} reads {buffers[b].name}, which does not exist")
            held_until[b, newest[b]] = at
        for b in op.writes:
            newest[b] = at
            held_until[b, at] = at
        ran.add(i)
        time += op.time
    if len(ran) != len(ops):
        missing = next(i for i in range(len(ops)) if i not in ran)
        raise PlanError(f"{ops[missing].name} never runs")
    end = len(sequence)
    for b in problem.outputs:
        forward = backward_began and b in problem.forward_outputs
        if b in made_by_an_op and not forward:
            kept.add((b, newest[b]))
    for copy in kept:
        held_until[copy] = end
    change = [0] * (end + 2)
    for (b, made), until in held_until.items():
        change[made] += buffers[b].size
        change[until + 1] -= buffers[b].size
    live = sum(b.size for k, b in enumerate(buffers) if k not in made_by_an_op)
    peak = live
    for at in range(end):
        live += change[at]
        peak = max(peak, live + ops[sequence[at]].workspace)
    return peak, time

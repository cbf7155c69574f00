"""Plans with stays on a tier by a rule of thumb, for tests of what runs them."""

from __future__ import annotations

from dataclasses import replace

from memplan.plans import Offload, Plan
from memplan.problem import Phase, Problem


def with_stays(problem: Problem, plan: Plan, tier: str = "disk", least: int = 4096, ahead: int = 3) -> Plan:
    """Every saved activation of at least ``least`` bytes leaves after its last reader of the forward and comes back
    before its first of the backward; ``ahead``: positions that each transfer is given. For sequences without
    recomputation."""
    start = next(p for p, i in enumerate(plan.sequence) if problem.ops[i].phase != Phase.FORWARD)
    position = {i: p for p, i in enumerate(plan.sequence)}
    stays = []
    for b, readers in enumerate(problem.readers):
        made = problem.writer[b]
        used = sorted(position[i] for i in (*readers, made) if made >= 0)
        before, after = [p for p in used if p < start], [p for p in used if p >= start]
        if not before or not after or b in problem.outputs or problem.buffers[b].size < least:
            continue
        away, back = before[-1] + 1, after[0]
        until, again = min(away + ahead, start), max(back - ahead, start)
        if until <= again:
            stays.append(Offload(b, position[made], away, until, again, back, tier))
    return replace(plan, offloads=tuple(stays))

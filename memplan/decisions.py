"""A plan in the terms of its model: which families of ops are treated how, what that frees and what it costs."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from memplan.plans import Plan
from memplan.problem import Problem

_LAYER = re.compile(r"(?<=[.])\d+(?=$|[.])")


@dataclass(frozen=True)
class Decision:
    """What a plan does to one family of like ops (the same op in every layer is one family)."""

    kind: str  # "recompute" or "offload"
    what: str  # family of ops, e.g. "softmax"
    module: str  # path with layer numbers replaced by *
    source: str  # file:line of one of them
    count: int  # distinct ops
    runs: int  # extra runs, or copies away
    freed: int  # bytes of theirs that stand at the unplanned peak
    time: float  # added, in the problem's unit; copies are hidden under compute and counted in the plan's time alone


def family(name: str) -> str:
    """The name without the number that tells like ones apart: 'softmax_3' → 'softmax', 'h.3.attn' → 'h.*.attn'."""
    return _LAYER.sub("*", name) if "." in name else re.sub(r"(_\d+)+$", "", name)


def decisions_of(problem: Problem, plan: Plan) -> tuple[Decision, ...]:
    """What the plan does that running every op once in stored order does not; what frees most first."""
    standing = alive_at_peak(problem)
    treated: dict[tuple[str, str, str], Counter[int]] = defaultdict(Counter)  # (kind, op family, module) -> op -> runs
    for i, runs in Counter(plan.sequence).items():
        if runs > 1:
            treated["recompute", family(problem.ops[i].name), family(problem.ops[i].module)][i] = runs - 1
    for stay in plan.offloads:
        i = problem.writer[stay.buffer]
        name, module = (
            (problem.ops[i].name, problem.ops[i].module) if i >= 0 else (problem.buffers[stay.buffer].name, "")
        )
        treated["offload", family(name), family(module)][i] += 1
    found = []
    for (kind, what, module), runs_of in treated.items():
        ops = [i for i in runs_of if i >= 0]
        freed = sum(problem.buffers[b].size for i in ops for b in problem.ops[i].writes if b in standing)
        time = sum(problem.ops[i].time * runs_of[i] for i in ops) if kind == "recompute" else 0.0
        source = next((problem.ops[i].source for i in ops), "")
        found.append(Decision(kind, what, module, source, len(runs_of), runs_of.total(), freed, time))
    return tuple(sorted(found, key=lambda d: (-d.freed, d.kind, d.what, d.module)))


def alive_at_peak(problem: Problem) -> set[int]:
    """The buffers that stand at the peak of the stored order."""
    end = len(problem.ops)
    last = [end] * len(problem.buffers)
    for b, maker in enumerate(problem.writer):
        if maker >= 0 and b not in problem.outputs:
            last[b] = max((maker, *problem.readers[b]))
    change = [0] * (end + 2)
    for b, maker in enumerate(problem.writer):
        change[max(0, maker)] += problem.buffers[b].size
        change[last[b] + 1] -= problem.buffers[b].size
    live, load = 0, []
    for at, op in enumerate(problem.ops):
        live += change[at]
        load.append(live + op.workspace)
    peak = load.index(max(load)) if load else 0
    return {b for b, maker in enumerate(problem.writer) if maker <= peak <= last[b]}

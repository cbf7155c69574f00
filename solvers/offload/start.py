"""From the program's solution to a sequence with offloads, each transfer as early or as late as its engine allows."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from memplan.plans import Offload
from memplan.problem import Problem
from memplan.solvers.offload.program import Decision

NOTHING = Decision(0.0, (), ())


@dataclass
class _Absence:
    tier: int
    first: int  # the first position at which the copy must be away
    last: int  # the last one


def realise(
    problem: Problem, at: Sequence[int] = (), decision: Decision = NOTHING
) -> tuple[tuple[int, ...], tuple[Offload, ...]]:
    """First runs in stored order; what is lost at a position runs again, with what it lacks, before its next use, and
    what is away returns for it. The peak may be over the budget, and a transfer too short of time is waited for.

    Without a decision: every op once, and what has its home on a tier comes for each use and goes after it.
    """
    assert decision.present is not None
    ops, writer, home = problem.ops, problem.writer, [buffer.home for buffer in problem.buffers]
    tiers = [tier.name for tier in problem.tiers]
    here: set[int] = set()
    away = {b: _Absence(tiers.index(home[b]), 0, -1) for b in problem.homed}
    made: dict[int, int] = {}
    used: dict[int, int] = {}
    sequence: list[int] = []
    stays: list[tuple[Offload, _Absence]] = []
    stops = {t: k for k, t in enumerate(at)}

    def use(b: int) -> None:
        where = away.pop(b, None)
        if where is not None:
            since = used.get(b, -1) + 1
            stay = Offload(b, made.get(b, -1), since, since, len(sequence), len(sequence), tiers[where.tier])
            stays.append((stay, where))
        used[b] = len(sequence)
        if home[b] and not at:
            away[b] = _Absence(tiers.index(home[b]), len(ops), used[b])
        else:
            here.add(b)

    for t in range(len(ops) + 1):
        goal = tuple(b for b in problem.outputs if writer[b] >= 0) if t == len(ops) else problem.operands[t]
        wanted = [t]
        while wanted:  # an op waits on the stack until its operands are at hand
            i = wanted[-1]
            operands = goal if i == t else problem.operands[i]
            lost = [b for b in operands if b not in here and b not in away and not ops[writer[b]].once]
            if lost:
                wanted.append(writer[lost[0]])
                continue
            wanted.pop()
            for b in (*operands, *(b for b in (ops[i].reads if i < len(ops) else ()) if home[b])):
                use(b)
            if i < len(ops) and (i == t or not set(ops[i].writes) <= here):
                for b in ops[i].writes:
                    away.pop(b, None)
                    here.add(b)
                    made[b] = used[b] = len(sequence)
                sequence.append(i)
        if t in stops:
            k, position = stops[t], len(sequence) - 1
            here = {b for b in here if b in decision.present[k] or (writer[b] >= 0 and ops[writer[b]].once)}
            back = {b: where for b, where in away.items() if b in decision.present[k]}  # or on the way
            away = back | {
                b: _Absence(j, away[b].first if b in away else position, position)
                for b, j in decision.away[k].items()
                if b not in here and (b in made or home[b])
            }
    for b in {b for op in ops for b in op.mutates if home[b]}:
        end = len(sequence)
        stay = Offload(b, -1, used[b] + 1, used[b] + 1, end, end, home[b])
        stays.append((stay, _Absence(tiers.index(home[b]), end, end - 1)))
    return tuple(sequence), _timed(problem, sequence, stays)


def comes_and_goes(problem: Problem, sequence: Sequence[int]) -> tuple[Offload, ...]:
    """Offloads of any sequence by which what has its home on a tier comes for each use, the step waiting."""
    last = dict.fromkeys(problem.homed, -1)
    stays = []
    for p, i in enumerate(sequence):
        for b in dict.fromkeys(problem.ops[i].reads):
            if b in last:
                stays.append(Offload(b, -1, last[b] + 1, last[b] + 1, p, p, problem.buffers[b].home))
                last[b] = p
    return tuple(stays)


def _timed(problem: Problem, sequence: list[int], stays: list[tuple[Offload, _Absence]]) -> tuple[Offload, ...]:
    """Copies out one after the other from the last use on, copies in so that each ends where the next must start."""
    times = [problem.ops[i].time for i in sequence]
    starts = [0.0, *accumulate(times)]
    links = {tier.name: tier for tier in problem.tiers}
    free = dict.fromkeys(links, 0.0)
    changed = {b for op in problem.ops for b in op.mutates}
    timed = {n: stay for n, (stay, _) in enumerate(stays)}
    for n in sorted(range(len(stays)), key=lambda n: stays[n][0].out_from):
        stay, must = stays[n]
        if stay.made_at < 0 and (stay.buffer not in changed or stay.out_from == 0):
            continue  # its home has it
        link, size = links[stay.tier], problem.buffers[stay.buffer].size
        free[stay.tier] = max(free[stay.tier], starts[stay.out_from]) + link.latency + size / link.write
        gone = min(bisect_left(starts, free[stay.tier]), must.first, stay.in_until)
        timed[n] = replace(stay, out_until=max(gone, stay.out_from))
    busy = dict.fromkeys(links, float("inf"))
    for n in sorted(range(len(stays)), key=lambda n: -stays[n][0].in_until):
        stay, must = timed[n], stays[n][1]
        link, size = links[stay.tier], problem.buffers[stay.buffer].size
        busy[stay.tier] = min(busy[stay.tier], starts[stay.in_until]) - link.latency - size / link.read
        back = max(bisect_right(starts, busy[stay.tier]) - 1, must.last + 1, stay.out_until)
        timed[n] = replace(stay, in_from=min(back, stay.in_until))
    return tuple(timed[n] for n in sorted(timed))

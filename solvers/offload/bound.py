"""Lower bounds where copies may be sent away: on the peak of any plan, and on the time of a plan under a budget."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from memplan.problem import Problem
from memplan.solvers.recompute.bound import peak_bound


def streamed(problem: Problem) -> Problem:
    """The problem as recomputation alone sees it: each op brings what it reads from its home, and sends it back.

    No tiers and no homes; an op's homed operands count as its workspace. A sequence of this problem within a budget is
    one of the problem's, with every transfer waited for.
    """
    homed = set(problem.homed)
    if not homed:
        return replace(problem, tiers=())
    size = [0 if b in homed else buffer.size for b, buffer in enumerate(problem.buffers)]
    ops = tuple(
        replace(op, workspace=op.workspace + sum(problem.buffers[b].size for b in set(op.reads) & homed))
        for op in problem.ops
    )
    buffers = tuple(replace(buffer, size=size[b], home="") for b, buffer in enumerate(problem.buffers))
    return replace(problem, ops=ops, buffers=buffers, tiers=())


def offload_peak_bound(problem: Problem) -> int:
    """Bytes that no plan can go below, whatever it sends away: what one op needs, or the outputs."""
    return peak_bound(streamed(problem))


def least_time(problem: Problem) -> float:
    """Time that no plan in any order can go below: that of every op once, or of what must come from its home."""
    times = [problem.total_time]
    for tier in problem.tiers:
        back = [b for b in problem.homed if problem.buffers[b].home == tier.name and problem.readers[b]]
        times.append(sum(tier.latency + problem.buffers[b].size / tier.read for b in back))
    return max(times)


def tightest(problem: Problem, budget: int, count: int) -> list[int]:
    """The positions over the budget in ``count`` runs of equal length, of each run the one with the largest load.

    Loads of the stored order, with what has its home on a tier there only for the ops that read it.
    """
    plain = streamed(problem)
    n = len(plain.ops)
    change = [0] * (n + 2)
    for b, w in enumerate(plain.writer):
        if w >= 0:
            last = n if b in plain.outputs else max((w, *plain.readers[b]))
            change[w] += plain.buffers[b].size
            change[last + 1] -= plain.buffers[b].size
    held = accumulate(change[:n])
    loads = [bytes_held + op.workspace for bytes_held, op in zip(held, plain.ops, strict=True)]
    over = [t for t in range(n) if loads[t] + plain.resident_bytes > budget]
    parts = [over[len(over) * k // count : len(over) * (k + 1) // count] for k in range(count)]
    return [max(part, key=lambda t: loads[t]) for part in parts if part]


def home_bound(problem: Problem) -> float:
    """Time that no plan with first runs in stored order can go below, whatever its budget.

    What has its home on a tier crosses before its first use: all that is used first by op t or earlier, then t and
    every op after it.
    """
    first: dict[int, int] = {}
    for t, op in enumerate(problem.ops):
        for b in op.reads:
            first.setdefault(b, t)
    crossed = dict.fromkeys((tier.name for tier in problem.tiers), 0.0)
    links = {tier.name: tier for tier in problem.tiers}
    needs: list[list[int]] = [[] for _ in problem.ops]
    for b in problem.homed:
        if b in first:
            needs[first[b]].append(b)
    rest = most = problem.total_time
    for t, op in enumerate(problem.ops):
        for b in needs[t]:
            tier = links[problem.buffers[b].home]
            crossed[tier.name] += tier.latency + problem.buffers[b].size / tier.read
        if needs[t]:
            most = max(most, max(crossed.values()) + rest)
        rest -= op.time
    return most

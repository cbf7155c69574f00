"""Bring what lies on a slower tier no earlier than it must come, so that little of it is on the device at one instant."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from memplan.errors import PlanError
from memplan.plans import Offload
from memplan.problem import Problem
from memplan.validate import check_plan

SLACK = (
    2.0  # transfers are given so many times what they should take: disks reached half of their measured rate at worst
)
SHARE = 0.06  # of what changes at home, the most on the device at one instant: 6.2 % of GPT-2's AdamW state with what stays there
MAY_COST = 1.01  # slowdown of the plan that keeping the share may cost


def fetched_late(
    problem: Problem, sequence: Sequence[int], offloads: tuple[Offload, ...], budget: int
) -> tuple[Offload, ...]:
    """The offloads with every copy-in of a buffer that some op changes at home (optimizer state) started as late as its
    engine allows, and later still where more than SHARE of their bytes would be on the device at once.

    The first of both that keeps the budget, and the plan's time to MAY_COST; else the offloads as they are.
    """
    changed = {b for op in problem.ops for b in op.mutates if problem.buffers[b].home}
    if not changed:
        return offloads
    _, time = check_plan(problem, tuple(sequence), offloads)
    late = _as_late_as_can_be(problem, sequence, offloads, changed)
    for candidate in (_within_share(problem, len(sequence), late, changed), late):
        try:
            peak, taken = check_plan(problem, tuple(sequence), candidate)
        except PlanError:  # a reader's other tier has no room at the new times
            continue
        if peak <= budget and taken <= MAY_COST * time:
            return candidate
    return offloads


def _as_late_as_can_be(
    problem: Problem, sequence: Sequence[int], offloads: tuple[Offload, ...], changed: set[int]
) -> tuple[Offload, ...]:
    """From the last to the first, each ends when it is waited for and before the next one begins, given SLACK."""
    starts = [0.0]
    for i in sequence:
        starts.append(starts[-1] + problem.ops[i].time)
    links = {tier.name: tier for tier in problem.tiers}
    busy = dict.fromkeys(links, float("inf"))
    moved = list(offloads)
    for n in sorted(range(len(offloads)), key=lambda n: -offloads[n].in_until):
        stay = offloads[n]
        if stay.in_from == len(sequence):
            continue  # it stays at home
        link, size = links[stay.tier], problem.buffers[stay.buffer].size
        busy[stay.tier] = min(busy[stay.tier], starts[stay.in_until]) - SLACK * (link.latency + size / link.read)
        if stay.buffer in changed:
            latest = max(bisect_right(starts, busy[stay.tier]) - 1, 0)
            moved[n] = replace(stay, in_from=min(max(stay.in_from, latest), stay.in_until))
    return tuple(moved)


def _within_share(problem: Problem, end: int, offloads: tuple[Offload, ...], changed: set[int]) -> tuple[Offload, ...]:
    """Copies come in order of use, each once those on the device leave it room."""
    size = [buffer.size for buffer in problem.buffers]
    room = SHARE * sum(size[b] for b in changed)
    live = [0.0] * (end + 2)
    ordered = sorted(
        (n for n, stay in enumerate(offloads) if stay.buffer in changed), key=lambda n: offloads[n].in_until
    )
    leaves: dict[tuple[int, int], int] = {}  # (buffer, position it is back) -> position from which it is away again
    last: dict[int, int] = {}
    for n in sorted(ordered, key=lambda n: offloads[n].out_from):
        stay = offloads[n]
        if stay.buffer in last:
            leaves[stay.buffer, last[stay.buffer]] = stay.out_until
        last[stay.buffer] = stay.in_until
    moved = list(offloads)
    for n in ordered:
        stay = offloads[n]
        if stay.in_from == end:
            continue
        b, until = stay.buffer, leaves.get((stay.buffer, stay.in_until), end + 1)
        since = stay.in_until
        while since > stay.in_from and live[since - 1] + size[b] <= room:
            since -= 1
        moved[n] = replace(stay, in_from=since)
        for position in range(since, until):
            live[position] += size[b]
    return tuple(moved)

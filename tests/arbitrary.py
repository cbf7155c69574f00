"""Arbitrary valid plans: what the solvers would choose once in a thousand graphs, the runtime must get right always."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from memplan import seek
from memplan.plans import Plan
from memplan.problem import Phase, Problem
from memplan.validate import check_sequence

LONGEST = 4  # runs an op, on average


def arbitrary_plan(problem: Problem, chance: random.Random, again: float = 0.5) -> Plan:
    """A valid plan in a random order; each operand of a backward op is made again first with probability ``again``."""
    sequence: list[int] = []
    for i in _order(problem, chance):
        if problem.ops[i].phase != Phase.FORWARD and sequence:
            _again(problem, i, chance, again, sequence)
        sequence.append(i)
    peak, time = check_sequence(problem, tuple(sequence))
    return Plan(tuple(sequence), None, peak, time, bound=problem.total_time, solver="arbitrary")


def _order(problem: Problem, chance: random.Random) -> list[int]:
    """A random order of first runs: the forward's ops, of which those that may run late sometimes do, then the others."""
    waits = [{problem.writer[b] for b in problem.operands[i]} | set(op.after) for i, op in enumerate(problem.ops)]
    needed = {problem.writer[b] for b in problem.forward_outputs}
    needed |= {i for i, op in enumerate(problem.ops) if op.once and op.phase == Phase.FORWARD}
    for i in reversed(range(len(problem.ops))):
        if i in needed:
            needed |= waits[i]
    late = [
        op.phase != Phase.FORWARD or (i not in needed and chance.random() < 0.5) for i, op in enumerate(problem.ops)
    ]
    for i in range(len(problem.ops)):
        late[i] = late[i] or any(late[j] for j in waits[i])
    order: list[int] = []
    for part in (False, True):
        left = [i for i in range(len(problem.ops)) if late[i] == part]
        while left:
            ready = [i for i in left if waits[i] <= set(order)]
            backward = [i for i in ready if problem.ops[i].phase != Phase.FORWARD]
            begun = part and (not order or late[order[-1]])
            i = chance.choice(ready if begun or not backward else backward)
            order.append(i)
            left.remove(i)
    return order


def _again(problem: Problem, i: int, chance: random.Random, again: float, sequence: list[int]) -> None:
    """Append the recomputations that precede a run of op ``i``, operands first."""
    for b in problem.operands[i]:
        maker = problem.writer[b]
        room = len(sequence) < LONGEST * len(problem.ops)
        if room and maker in sequence and not problem.ops[maker].once and chance.random() < again:
            _again(problem, maker, chance, again, sequence)
            sequence.append(maker)


@contextmanager
def arbitrary_plans(seed: int, again: float = 0.5) -> Iterator[None]:
    """Every graph compiled inside runs by an arbitrary plan instead of a solver's."""
    chance = random.Random(seed)

    def choose(problem: Problem, *_: Any) -> Plan:
        return arbitrary_plan(problem, chance, again)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seek, "solve", choose)
        yield

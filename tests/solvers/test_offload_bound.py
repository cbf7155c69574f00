"""Bounds of the joint program against every plan of tiny problems."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from memplan.errors import PlanError
from memplan.outcome import Limits, Status
from memplan.plans import Offload
from memplan.problem import Buffer, Op, Phase, Problem, Tier
from memplan.solvers.offload import offload_peak_bound, solve_offload
from memplan.solvers.offload.bound import home_bound, least_time, tightest
from memplan.solvers.offload.program import decide
from memplan.validate import check_plan, check_sequence, validate

MOST = 3000  # choices of offloads that a sequence may have; the rest of its plans is left out


def tiny_problem(seed: int, n: int = 6) -> Problem:
    """A chain with long reads back, half of it backward, one disk, at times a weight that lives there."""
    rng = random.Random(seed)
    homed = rng.random() < 0.3
    buffers = [Buffer("weight", rng.randint(5, 20), home="disk")] if homed else []
    ops: list[Op] = []
    for i in range(n):
        reads = {len(buffers) - 1} if i else set()
        if i >= n // 2:
            reads.add(rng.randrange(int(homed), len(buffers)))
        if homed and i in (1, n - 2):
            reads.add(0)
        phase = Phase.FORWARD if i < n // 2 else Phase.BACKWARD
        time = float(rng.randint(1, 10))
        once = rng.random() < 0.2
        ops.append(Op(f"op{i}", reads=tuple(sorted(reads)), writes=(len(buffers),), time=time, phase=phase, once=once))
        buffers.append(Buffer(f"b{i}", rng.randint(5, 20)))
    rate = rng.choice((0.5, 2.0, 5.0))
    tier = Tier("disk", 1000, rate, rate * rng.choice((0.5, 1.0, 2.0)), rng.choice((0.0, 1.0)))
    problem = Problem(tuple(ops), tuple(buffers), (len(buffers) - 1,), tiers=(tier,))
    problem.check()
    return problem


def sequences(problem: Problem) -> Iterator[tuple[int, ...]]:
    """First runs in stored order, and two runs again at most."""
    n = len(problem.ops)
    again = [i for i in range(n) if not problem.ops[i].once]
    yield tuple(range(n))
    for i in again:
        for at in range(i + 1, n):
            once = (*range(at), i, *range(at, n))
            yield once
            for j in again:
                for to in range(max(once.index(j) + 1, at + 1), n + 1):
                    yield (*once[:to], j, *once[to:])


def choices(problem: Problem, sequence: tuple[int, ...]) -> list[list[tuple[Offload, ...]]]:
    """For each gap between two uses of a copy, what may happen over it."""
    end = len(sequence)
    last: dict[int, tuple[int, int]] = {b: (-1, -1) for b in problem.homed}
    found: list[list[tuple[Offload, ...]]] = []
    for p, i in enumerate(sequence):
        for b in problem.ops[i].reads:
            made, u = last[b]
            last[b] = (made, p)
            home = made < 0
            outs = (u + 1,) if home else range(u + 1, p)
            stays = [
                (Offload(b, made, u + 1, a, c, p, "disk"),) for a in outs for c in range(a, p + 1) if c > a or home
            ]
            found.append(stays if home and u < 0 else [(), *stays])
        for b in problem.ops[i].writes:
            last[b] = (p, p)
    found += [[(Offload(b, -1, last[b][1] + 1, last[b][1] + 1, end, end, "disk"),)] for b in problem.homed]
    return found


def fastest(problem: Problem, budget: int) -> float:
    """Time of the fastest plan among those; infinity where none fits."""
    best = float("inf")
    for sequence in sequences(problem):
        if sum(problem.ops[i].time for i in sequence) >= best:
            continue
        options = choices(problem, sequence)
        count = 1
        for option in options:
            count *= len(option)
        if count > MOST:
            continue
        for stays in itertools.product(*options):
            try:
                peak, time = check_plan(problem, sequence, tuple(itertools.chain(*stays)))
            except PlanError:  # a copy that comes back for a read that another copy serves
                continue
            if peak <= budget:
                best = min(best, time)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_no_bound_exceeds_the_fastest_plan(seed: int) -> None:
    problem = tiny_problem(seed)
    stored = check_sequence(problem, tuple(range(len(problem.ops))))[0]
    floor = offload_peak_bound(problem)
    budget = floor + (stored - floor) * (seed % 3) // 4
    optimum = fastest(problem, budget)
    assert home_bound(problem) <= optimum * (1 + 1e-9) and least_time(problem) <= optimum * (1 + 1e-9)
    for count in (1, 2, 6):
        decision = decide(problem, budget, tightest(problem, budget, count))
        assert decision.bound <= optimum * (1 + 1e-9)
    plan = solve_offload(problem, budget, limits=Limits(work=0.05))
    validate(problem, plan)
    assert plan.bound <= optimum * (1 + 1e-9)
    if optimum < float("inf"):
        assert plan.status in (Status.OPTIMAL, Status.FEASIBLE) and plan.time <= 1.02 * optimum

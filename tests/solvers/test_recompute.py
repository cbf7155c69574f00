"""The recomputation search: valid plans, honest statuses, the same plan for the same limits."""

from __future__ import annotations

import random

import pytest
from memplan.solvers.recompute import minimise_peak, peak_bound, solve_recompute

from memplan.outcome import Limits, Status
from memplan.problem import Buffer, Op, Phase, Problem
from memplan.validate import check_sequence, validate

SHORT = Limits(work=0.05)


def training_chain(layers: int) -> Problem:
    """A forward chain and its backward chain, every activation read again in backward."""
    ops, buffers = [], []
    for i in range(layers):
        ops.append(Op(f"f{i}", reads=(i - 1,) if i else (), writes=(i,), time=10.0))
        buffers.append(Buffer(f"a{i}", 100))
    for i in reversed(range(layers)):
        reads = (i,) if i == layers - 1 else (i, len(buffers) - 1)
        ops.append(Op(f"b{i}", reads=reads, writes=(len(buffers),), time=20.0, phase=Phase.BACKWARD))
        buffers.append(Buffer(f"g{i}", 100))
    return Problem(tuple(ops), tuple(buffers), outputs=(len(buffers) - 1,))


def random_problem(seed: int, n: int = 20, once: float = 0.1) -> Problem:
    """A random layered forward and backward graph with several results an op, ``once`` ops and forward outputs."""
    rng = random.Random(seed)
    ops: list[Op] = []
    buffers: list[Buffer] = []
    for i in range(n):
        forward = i < n // 2
        made = tuple(range(len(buffers), len(buffers) + rng.choice((1, 1, 1, 2))))
        reads = tuple({rng.randrange(max(0, len(buffers) - 8), len(buffers)) for _ in range(2)}) if buffers else ()
        if not forward and buffers:
            reads = tuple({*reads, rng.randrange(len(buffers))})
        buffers += [Buffer(f"b{b}", rng.randint(1, 50)) for b in made]
        ops.append(
            Op(
                f"op{i}",
                reads=reads,
                writes=made,
                time=float(rng.randint(0, 30)),
                workspace=rng.choice((0, 0, 10)),
                phase=Phase.FORWARD if forward else Phase.BACKWARD,
                once=rng.random() < once,
            )
        )
    forward_made = [b for op in ops if op.phase == Phase.FORWARD for b in op.writes]
    held = tuple(rng.sample(forward_made, 1))
    problem = Problem(tuple(ops), tuple(buffers), (*held, len(buffers) - 1), held)
    problem.check()
    return problem


def test_a_chain_fits_half_its_memory() -> None:
    problem = training_chain(16)
    peak, _ = check_sequence(problem, tuple(range(len(problem.ops))))
    plan = solve_recompute(problem, peak // 2, limits=SHORT)
    validate(problem, plan)
    assert plan.status == Status.FEASIBLE and plan.recomputed > 0


@pytest.mark.parametrize("seed", range(20))
def test_every_plan_is_valid_and_keeps_the_budget(seed: int) -> None:
    problem = random_problem(seed)
    peak, _ = check_sequence(problem, tuple(range(len(problem.ops))))
    for share in (0.9, 0.7, 0.5):
        plan = solve_recompute(problem, int(peak * share), limits=SHORT)
        validate(problem, plan)
        assert plan.peak >= plan.peak_bound
        if plan.status == Status.INFEASIBLE:
            assert int(peak * share) < peak_bound(problem)


def test_equal_limits_give_equal_plans() -> None:
    problem = random_problem(3)
    peak, _ = check_sequence(problem, tuple(range(len(problem.ops))))
    budget = int(peak * 0.8)
    assert solve_recompute(problem, budget, limits=SHORT) == solve_recompute(problem, budget, limits=SHORT)


def test_smallest_peak_is_no_larger_than_the_stored_order() -> None:
    problem = training_chain(12)
    plan = minimise_peak(problem, limits=SHORT)
    validate(problem, plan)
    assert peak_bound(problem) <= plan.peak < plan.unplanned_peak

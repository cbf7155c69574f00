"""The rule ``after_all``: an update follows every run of what reads the old value, in every solver's plan."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import PlanError
from memplan.outcome import Limits
from memplan.problem import Buffer, Category, Op, Phase, Problem, Tier
from memplan.solvers.offload import offload_peak_bound, solve_offload
from memplan.solvers.order import polish_order, solve_order
from memplan.solvers.recompute import minimise_peak, solve_recompute
from memplan.validate import check_sequence, validate

WORK = Limits(work=0.02)


def chain(sizes: list[int], home: str = "") -> Problem:
    """A chain of layers, each with a weight that its backward updates: forward k reads weight k, update k changes it and
    a state, which has its home on a disk if asked."""
    n = len(sizes)
    buffers = [Buffer(f"w{k}", 8, Category.PARAMETER) for k in range(n)] + [Buffer("x", 4, Category.INPUT)]
    ops: list[Op] = []
    made = [n]
    for k, size in enumerate(sizes):
        buffers.append(Buffer(f"h{k}", size))
        ops.append(Op(f"forward{k}", reads=(made[-1], k), writes=(len(buffers) - 1,), time=1.0 + size))
        made.append(len(buffers) - 1)
    upstream = made[-1]
    for k in reversed(range(n)):
        buffers += [Buffer(f"g{k}", 8), Buffer(f"d{k}", sizes[k])]
        gradient, down = len(buffers) - 2, len(buffers) - 1
        reads = tuple(dict.fromkeys((upstream, made[k], k)))
        ops.append(Op(f"backward{k}", reads=reads, writes=(gradient, down), time=2.0, phase=Phase.BACKWARD))
        buffers.append(Buffer(f"state{k}", 16, Category.OPTIMIZER, home=home))
        state, readers = len(buffers) - 1, (k, len(ops) - 1)
        reads, changes = (gradient, k, state), (k, state)
        ops.append(Op(f"update{k}", "", reads, (), changes, (), readers, phase=Phase.OPTIMIZER, once=True))
        upstream = down
    disk = Tier("disk", 10_000, write=8.0, read=16.0, latency=0.5)
    return Problem(tuple(ops), tuple(buffers), outputs=(upstream,), tiers=(disk,) if home else ())


def test_the_validator_knows_the_rule() -> None:
    problem = chain([4, 4])
    forward0, forward1, backward1, update1, backward0, update0 = range(6)
    check_sequence(problem, (forward0, forward1, forward0, backward1, update1, forward0, backward0, update0))
    with pytest.raises(PlanError, match="forward1 runs after update1"):
        check_sequence(problem, (forward0, forward1, backward1, update1, forward1, backward0, update0))
    with pytest.raises(PlanError, match="update1 runs before backward1"):
        check_sequence(problem, (forward0, forward1, update1, backward1, backward0, update0))


@settings(max_examples=12)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=9), st.floats(0.5, 0.95))
def test_every_solver_keeps_it(sizes: list[int], share: float) -> None:
    problem = chain(sizes)
    peak, _ = check_sequence(problem, tuple(range(len(problem.ops))))
    lowest = minimise_peak(problem, limits=WORK)
    validate(problem, lowest)
    validate(problem, solve_recompute(problem, max(lowest.peak, int(share * peak)), limits=WORK))
    validate(problem, solve_order(problem, limits=WORK))
    check_sequence(problem, polish_order(problem, lowest.sequence, limits=WORK))


@settings(max_examples=8)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=8), st.floats(0.5, 0.95))
def test_beside_states_on_disk(sizes: list[int], share: float) -> None:
    problem = chain(sizes, home="disk")
    peak, _ = check_sequence(problem, tuple(range(len(problem.ops))))
    n = len(sizes)
    late = (*range(n), *range(n, 3 * n, 2), *range(n + 1, 3 * n, 2))  # another order: all updates at the end
    plan = solve_offload(problem, max(offload_peak_bound(problem), int(share * peak)), limits=WORK, start=late)
    validate(problem, plan)
    assert {stay.buffer for stay in plan.offloads} >= set(problem.homed)


def test_states_come_no_earlier_than_they_must() -> None:
    """However much the budget leaves free."""
    disk = Tier("disk", 10_000, write=64.0, read=64.0, latency=0.1)
    problem = replace(chain([4] * 24, home="disk"), tiers=(disk,))
    plan = solve_offload(problem, 10_000, limits=WORK)
    validate(problem, plan)
    assert plan.time <= 1.02 * problem.total_time
    change = [0] * (len(plan.sequence) + 1)
    for stay in plan.offloads:
        change[stay.out_until] -= 1
        change[stay.in_from] += stay.in_from < len(plan.sequence)
    assert max(accumulate(change[1:], initial=24 + change[0])) <= 3

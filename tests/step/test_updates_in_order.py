"""The rule ``after_all``: an update follows every run of what reads the old value, in every solver's plan."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import PlanError
from memplan.outcome import Limits
from memplan.problem import Buffer, Category, Op, Phase, Problem
from memplan.solvers.order import polish_order, solve_order
from memplan.solvers.recompute import minimise_peak, solve_recompute
from memplan.validate import check_sequence, validate

WORK = Limits(work=0.02)


def chain(sizes: list[int]) -> Problem:
    """A chain of layers, each with a weight that its backward updates: forward k reads weight k, update k changes it."""
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
        readers = (k, len(ops) - 1)
        ops.append(
            Op(f"update{k}", reads=(gradient, k), mutates=(k,), after_all=readers, phase=Phase.OPTIMIZER, once=True)
        )
        upstream = down
    return Problem(tuple(ops), tuple(buffers), outputs=(upstream,))


def test_the_validator_knows_the_rule() -> None:
    problem = chain([4, 4])
    forward0, forward1, backward1, update1, backward0, update0 = range(6)
    check_sequence(problem, (forward0, forward1, forward0, backward1, update1, forward0, backward0, update0))
    with pytest.raises(PlanError, match="forward1 runs after update1"):
        check_sequence(problem, (forward0, forward1, backward1, update1, forward1, backward0, update0))
    with pytest.raises(PlanError, match="update1 runs before backward1"):
        check_sequence(problem, (forward0, forward1, update1, backward1, backward0, update0))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=9), st.floats(0.5, 0.95))
def test_every_solver_keeps_it(sizes: list[int], share: float) -> None:
    problem = chain(sizes)
    peak, _ = check_sequence(problem, tuple(range(len(problem.ops))))
    lowest = minimise_peak(problem, limits=WORK)
    validate(problem, lowest)
    validate(problem, solve_recompute(problem, max(lowest.peak, int(share * peak)), limits=WORK))
    validate(problem, solve_order(problem, limits=WORK))
    check_sequence(problem, polish_order(problem, lowest.sequence, limits=WORK))

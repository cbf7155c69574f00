"""The recomputation search: valid plans, honest statuses, true bounds, the same plan for the same limits."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import PlanError, UnsupportedError
from memplan.graph_files import load_graph
from memplan.outcome import Limits, Status
from memplan.problem import Buffer, Op, Phase, Problem
from memplan.solvers.recompute import frontier, minimise_peak, peak_bound, recompute_bound, solve_recompute
from memplan.solvers.recompute.arrays import pack
from memplan.solvers.recompute.evict import RULES, Rule, evicting
from memplan.solvers.recompute.exact import LARGEST, solve_exact
from memplan.solvers.recompute.orderless import any_order_bound
from memplan.solvers.recompute.presence import presence, refine, tightest
from memplan.solvers.recompute.reach import proves_infeasible, reach_bound
from memplan.solvers.recompute.search import Search
from memplan.solvers.recompute.state import LENGTH, LOAD, OP, OVER, RUN, N
from memplan.validate import check_sequence, validate
from tests.uncompiled import compiled_and_plain

SHORT = Limits(work=0.02)
FOUND = (Status.OPTIMAL, Status.FEASIBLE)


def stored_peak(problem: Problem) -> int:
    return check_sequence(problem, tuple(range(len(problem.ops))))[0]


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
    """A random forward and backward graph: several results an op, ``once`` ops, ``after``, residents, a held output."""
    rng = random.Random(seed)
    buffers = [Buffer("parameter", rng.randint(1, 50))]
    ops: list[Op] = []
    for i in range(n):
        forward = i < n // 2
        made = tuple(range(len(buffers), len(buffers) + rng.choice((1, 1, 1, 2))))
        reads = {rng.randrange(max(0, len(buffers) - 8), len(buffers)) for _ in range(2)}
        if not forward:
            reads.add(rng.randrange(len(buffers)))
        buffers += [Buffer(f"b{b}", rng.randint(1, 50)) for b in made]
        ops.append(
            Op(
                f"op{i}",
                reads=tuple(sorted(reads)),
                writes=made,
                after=(rng.randrange(i),) if i and rng.random() < 0.1 else (),
                time=float(rng.randint(0, 30)),
                workspace=rng.choice((0, 0, 10)),
                phase=Phase.FORWARD if forward else Phase.BACKWARD,
                once=rng.random() < once,
            )
        )
    single = [op.writes[0] for op in ops if op.phase == Phase.FORWARD and len(op.writes) == 1]
    held = tuple(rng.sample(single, 1)) if single else ()
    problem = Problem(tuple(ops), tuple(buffers), (*held, len(buffers) - 1), held)
    problem.check()
    return problem


def tight_budget(problem: Problem, share: float) -> int:
    """Between the smallest peak that a short search finds and the stored order's."""
    low = minimise_peak(problem, limits=SHORT).peak
    return int(low + share * (stored_peak(problem) - low))


def test_a_chain_fits_half_its_memory() -> None:
    problem = training_chain(16)
    plan = solve_recompute(problem, stored_peak(problem) // 2, limits=SHORT)
    validate(problem, plan)
    assert plan.status == Status.OPTIMAL and plan.recomputed > 0
    assert plan.gap < 1e-6 and plan.bound_scope == "any order"


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), share=st.sampled_from((0.0, 0.3, 0.7)))
def test_every_plan_is_valid_and_keeps_the_budget(seed: int, share: float) -> None:
    problem = random_problem(seed)
    budget = tight_budget(problem, share)
    plan = solve_recompute(problem, budget, limits=SHORT)
    validate(problem, plan)
    assert plan.peak >= plan.peak_bound and plan.time >= plan.bound
    assert plan.status != Status.INFEASIBLE, "a plan with this peak is known"


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 400))
def test_the_incremental_state_is_what_the_sequence_says(seed: int, steps: int) -> None:
    """After any moves, the loads kept edit by edit equal those of the sequence from scratch, and the validator's peak."""
    problem = random_problem(seed)
    search = Search(problem, Limits(seed=seed))
    room = int(0.7 * stored_peak(problem)) - problem.resident_bytes
    search.load(range(len(problem.ops)), room)
    search.anneal(steps, 100.0, 50.0, search.first_price())
    length = search.state[N, LENGTH]
    sequence = [int(i) for i in search.state[OP, search.state[RUN, :length]]]
    loads, over, time = search.state[LOAD, :length].copy(), search.state[N, OVER], search.time
    peak, true_time = check_sequence(problem, tuple(sequence))
    assert peak == problem.resident_bytes + loads.max() and abs(time - true_time) < 1e-6 * max(1.0, time)
    search.load(sequence, room)
    assert np.array_equal(loads, search.state[LOAD, :length]) and over == search.state[N, OVER]


@pytest.mark.parametrize("seed", range(5))
def test_not_slower_than_the_exact_reference(seed: int) -> None:
    problem = random_problem(seed, n=11 + seed)
    budget = tight_budget(problem, 0.4)
    exact = solve_exact(problem, budget, limits=Limits(seconds=20))
    plan = solve_recompute(problem, budget, limits=Limits(work=0.1))
    validate(problem, plan)
    if exact.status == Status.OPTIMAL:
        validate(problem, exact)
        assert plan.time <= exact.time * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(20, 25))
def test_bounds_never_exceed_the_exact_optimum(seed: int) -> None:
    problem = random_problem(seed, n=14)
    budget = int(0.85 * stored_peak(problem))
    exact = solve_exact(problem, budget, limits=Limits(seconds=20))
    if exact.status != Status.OPTIMAL:
        return
    search = Search(problem, SHORT)
    bounds = [presence(problem, budget, tightest(problem, budget, count)).bound for count in (1, 3, 14)]
    for bound in (recompute_bound(problem, budget), refine(problem, budget, search.loads).bound, *bounds):
        assert bound <= exact.time * (1 + 1e-9)
    assert peak_bound(problem) <= exact.peak
    assert not proves_infeasible(problem, exact.peak)


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), share=st.sampled_from((0.2, 0.5, 0.8)))
def test_the_bound_for_any_order_never_exceeds_a_plan(seed: int, share: float) -> None:
    """No plan in any order is faster: neither the exact one in stored order nor one found in another order."""
    problem = random_problem(seed, n=12)
    budget = tight_budget(problem, share)
    bound = any_order_bound(problem, budget, float("inf"))
    plan = solve_recompute(problem, budget, limits=Limits(work=0.05))
    exact = solve_exact(problem, budget, limits=Limits(seconds=5))
    assert bound <= plan.time * (1 + 1e-9)
    assert exact.status != Status.OPTIMAL or bound <= exact.time * (1 + 1e-9)


def test_the_exact_reference_refuses_large_graphs() -> None:
    with pytest.raises(UnsupportedError, match="at most"):
        solve_exact(training_chain(LARGEST), 1000)


def test_equal_limits_give_equal_plans() -> None:
    problem = random_problem(3)
    budget = tight_budget(problem, 0.3)
    assert solve_recompute(problem, budget, limits=SHORT) == solve_recompute(problem, budget, limits=SHORT)


def test_plain_python_gives_the_same_plan() -> None:
    """The kernels run uncompiled to the same sequence."""
    code = (
        "import test_recompute as t; from memplan.outcome import Limits;"
        "p = t.random_problem(5, n=10); s = t.Search(p, Limits()); s.load(range(10), int(.7 * t.stored_peak(p)));"
        "s.anneal(5000, 100.0, 1.0, s.first_price()); print(s.lowest(), s.fastest(), s.random)"
    )
    out = compiled_and_plain(code, Path(__file__).parent)
    assert out[0] == out[1] and "(" in out[0]


def test_a_budget_below_one_op_is_infeasible() -> None:
    problem = training_chain(4)
    plan = solve_recompute(problem, peak_bound(problem) - 1, limits=SHORT)
    assert plan.status == Status.INFEASIBLE and plan.budget is None


def test_a_budget_that_no_order_keeps_is_proven_infeasible() -> None:
    """Two chains meet: one result must wait while the other chain runs, so no op alone shows the smallest peak."""
    ops = (
        Op("a", writes=(0,), time=1.0),
        Op("a2", reads=(0,), writes=(1,), time=1.0),
        Op("b", writes=(2,), time=1.0),
        Op("b2", reads=(2,), writes=(3,), time=1.0),
        Op("join", reads=(1, 3), writes=(4,), time=1.0),
    )
    problem = Problem(ops, tuple(Buffer(str(b), size) for b, size in enumerate((10, 10, 10, 10, 1))))
    assert peak_bound(problem) == 21
    assert proves_infeasible(problem, 29) and not proves_infeasible(problem, 30)
    assert minimise_peak(problem, limits=SHORT).status == Status.OPTIMAL
    plan = solve_recompute(problem, 29, limits=SHORT)
    assert plan.status == Status.INFEASIBLE and plan.peak_bound == 30
    assert reach_bound(problem, 21, 40) == 30


def test_the_start_is_kept_where_nothing_better_is_found() -> None:
    problem = random_problem(7)
    low = minimise_peak(problem, limits=SHORT)
    plan = solve_recompute(problem, low.peak, limits=Limits(work=0.0), start=low.sequence)
    validate(problem, plan)
    assert plan.status in FOUND and plan.time <= low.time
    with pytest.raises(PlanError):
        solve_recompute(problem, low.peak, limits=SHORT, start=low.sequence[:-1])


def test_smallest_peak_is_no_larger_than_the_stored_order() -> None:
    problem = training_chain(12)
    plan = minimise_peak(problem, limits=SHORT)
    validate(problem, plan)
    assert peak_bound(problem) <= plan.peak < plan.unplanned_peak


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), below=st.integers(1, 30))
def test_no_budget_below_the_smallest_peak_is_kept(seed: int, below: int) -> None:
    """What a refusal names as the smallest is what can be kept, for every budget that is asked."""
    problem = random_problem(seed)
    low = minimise_peak(problem, limits=SHORT)
    validate(problem, low)
    refused = solve_recompute(problem, low.peak - below, limits=SHORT)
    assert refused.status not in FOUND and refused.peak == low.peak
    for budget in (low.peak, low.peak + below):
        plan = solve_recompute(problem, budget, limits=SHORT)
        validate(problem, plan)
        assert plan.status in FOUND


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.3, 1.0))
def test_eviction_keeps_the_room_it_was_given(seed: int, share: float) -> None:
    problem = random_problem(seed)
    rng = random.Random(seed)
    made = [b for op in problem.ops for b in op.writes]
    early = {b for op in problem.ops if op.phase == Phase.FORWARD for b in op.writes}
    outputs = tuple(sorted({*problem.outputs, *rng.sample(made, len(made) // 4)}))  # gradients of many weights
    problem = dataclasses.replace(problem, outputs=outputs, forward_outputs=tuple(b for b in outputs if b in early))
    room = int(share * stored_peak(problem)) - problem.resident_bytes
    for rule in RULES:
        sequence, _ = evicting(pack(problem), tuple(range(len(problem.ops))), room, rule)
        if sequence is not None:
            assert check_sequence(problem, sequence)[0] <= room + problem.resident_bytes, rule


def test_eviction_counts_a_forward_output_that_is_made_again_beside_the_one_the_caller_holds() -> None:
    problem = Problem(
        buffers=(Buffer("held", 4), Buffer("saved", 4), Buffer("wide", 1), Buffer("gradient", 1)),
        ops=(
            Op("forward", writes=(0, 1), time=1.0),
            Op("wide", reads=(0,), writes=(2,), time=1.0, workspace=8, phase=Phase.BACKWARD),
            Op("backward", reads=(1, 2), writes=(3,), time=1.0, phase=Phase.BACKWARD),
        ),
        outputs=(0, 3),
        forward_outputs=(0,),
    )
    again = (0, 1, 0, 2)
    assert check_sequence(problem, again)[0] == 13 and stored_peak(problem) == 17
    assert all(evicting(pack(problem), range(3), 12, rule)[0] is None for rule in RULES)
    assert evicting(pack(problem), range(3), 14, RULES[0])[0] == again  # the copy is counted to the end


@pytest.mark.parametrize("rule", RULES)
def test_eviction_keeps_a_chain_of_a_hundred_in_a_tenth_of_its_memory(rule: Rule) -> None:
    problem = training_chain(100)
    sequence, _ = evicting(pack(problem), tuple(range(200)), stored_peak(problem) // 10, rule)
    assert sequence is not None and len(sequence) < 400, "about one more forward"


def test_an_output_may_go_and_be_made_again_at_the_end() -> None:
    """A gradient that is made beside what the rest needs would otherwise stand in the way of the largest op."""
    problem = Problem(
        buffers=(Buffer("needed", 1), Buffer("gradient", 4), Buffer("loss", 1)),
        ops=(Op("split", writes=(0, 1), time=1.0), Op("wide", reads=(0,), writes=(2,), time=1.0, workspace=8)),
        outputs=(1, 2),
    )
    assert stored_peak(problem) == 14
    low = minimise_peak(problem, limits=SHORT)
    validate(problem, low)
    assert low.sequence == (0, 1, 0) and low.peak == low.peak_bound == 10


@pytest.mark.parametrize("seed", (1, 2, 4))
def test_frontiers_are_monotone(seed: int) -> None:
    problem = random_problem(seed)
    low, high = minimise_peak(problem, limits=SHORT).peak, stored_peak(problem)
    budgets = {low - 1} | {low + (high - low) * k // 4 for k in range(5)}
    plans = frontier(problem, budgets, limits=SHORT)
    found = [plan for plan in plans if plan.status in FOUND]
    assert len(found) >= len(budgets) - 1
    for plan in found:
        validate(problem, plan)
    for small, large in itertools.pairwise(found):
        assert small.peak <= large.peak and small.time >= large.time


def test_a_deadline_ends_the_search() -> None:
    problem = training_chain(30)
    plan = solve_recompute(problem, stored_peak(problem) // 2, limits=Limits(seconds=0.0))
    validate(problem, plan)


def test_an_interrupt_returns_the_best_so_far() -> None:
    problem = training_chain(12)

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    said: list[str] = []
    plan = solve_recompute(
        problem,
        stored_peak(problem) // 2,
        limits=Limits(
            work=0.05, progress=lambda text: interrupt(text) if not said.append(text) and len(said) == 1 else None
        ),
    )
    validate(problem, plan)
    assert plan.status in FOUND and "interrupted" in said[-1]


@pytest.mark.skipif("MEMPLAN_DATA" not in os.environ, reason="MEMPLAN_DATA names no folder with public instances")
@pytest.mark.parametrize(
    ("file", "share", "cost"),
    [("fcn8_vgg_train", 0.7, 0.9), ("resnet50_train", 0.5, 1.6), ("random_layered_n100", 0.7, 2.2)],
)
def test_public_graphs_at_least_as_cheap_as_published(file: str, share: float, cost: float) -> None:
    problem = load_graph(Path(os.environ["MEMPLAN_DATA"]) / "recompute" / f"{file}.json").problem
    plan = solve_recompute(problem, int(share * stored_peak(problem)), limits=Limits(work=0.5))
    validate(problem, plan)
    assert 100 * (plan.time / plan.unplanned_time - 1) <= cost


def test_a_problem_without_times_or_ops() -> None:
    untimed = dataclasses.replace(
        training_chain(6), ops=tuple(dataclasses.replace(op, time=0.0) for op in training_chain(6).ops)
    )
    plan = solve_recompute(untimed, stored_peak(untimed) - 100, limits=SHORT)
    validate(untimed, plan)
    empty = Problem((), ())
    assert solve_recompute(empty, 0).status == Status.OPTIMAL and minimise_peak(empty).peak == 0
    resident = Problem((), (Buffer("weight", 64),))
    assert solve_recompute(resident, 57).status == Status.INFEASIBLE

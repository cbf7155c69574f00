"""The joint search: valid plans, what the engines' replay says is what the validator finds, never worse than one alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import PlanError
from memplan.outcome import Limits, Status
from memplan.plans import Offload, Plan
from memplan.problem import Buffer, Op, Phase, Problem, Tier
from memplan.solvers.offload import offload_peak_bound, solve_offload
from memplan.solvers.offload.search import Search
from memplan.solvers.recompute import solve_recompute
from memplan.validate import check_plan, check_sequence, validate
from tests.uncompiled import compiled_and_plain

SHORT = Limits(work=0.05)
FOUND = (Status.OPTIMAL, Status.FEASIBLE)
DISK = Tier("disk", 10_000, 10.0, 20.0, 1.0)
HOST = Tier("host", 300, 50.0, 50.0, 0.5)


def random_problem(seed: int, n: int = 16, homes: bool = True, tiers: tuple[Tier, ...] = (DISK, HOST)) -> Problem:
    """A random forward and backward graph with tiers: homed buffers, some changed in place, ``once`` ops, outputs."""
    rng = random.Random(seed)
    buffers = [Buffer("parameter", rng.randint(1, 50))]
    if homes:
        buffers += [Buffer(f"weight{k}", rng.randint(1, 50), home=rng.choice(tiers).name) for k in range(3)]
    weights = range(1, len(buffers))
    ops: list[Op] = []
    for i in range(n):
        forward = i < n // 2
        made = tuple(range(len(buffers), len(buffers) + rng.choice((1, 1, 1, 2))))
        reads = {rng.randrange(max(0, len(buffers) - 8), len(buffers)) for _ in range(2)}
        if not forward:
            reads.add(rng.randrange(len(buffers)))
        changed = tuple(b for b in reads & set(weights) if rng.random() < 0.3)
        readers = {j for j, op in enumerate(ops) if set(op.reads) & set(changed)}
        ops = [replace(op, once=op.once or j in readers) for j, op in enumerate(ops)]
        earlier = {j for j, op in enumerate(ops) if set(op.mutates) & reads}
        buffers += [Buffer(f"b{b}", rng.randint(1, 50)) for b in made]
        ops.append(
            Op(
                f"op{i}",
                reads=tuple(sorted(reads)),
                writes=made,
                mutates=changed,
                after=tuple(sorted(readers | earlier)),
                time=float(rng.randint(0, 30)),
                workspace=rng.choice((0, 0, 10)),
                phase=Phase.FORWARD if forward else Phase.BACKWARD,
                once=bool(changed) or rng.random() < 0.1,
            )
        )
    held = tuple(rng.sample([op.writes[0] for op in ops[: n // 2]], 1))
    problem = Problem(tuple(ops), tuple(buffers), (*held, len(buffers) - 1), held, tiers)
    problem.check()
    return problem


def stored_peak(problem: Problem) -> int:
    return check_sequence(problem, tuple(range(len(problem.ops))))[0]


def between(problem: Problem, share: float) -> int:
    """A budget between what one op needs and the stored order's peak."""
    low = offload_peak_bound(problem)
    return int(low + share * (stored_peak(problem) - low))


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), share=st.sampled_from((0.0, 0.3, 0.7)), homes=st.booleans())
def test_every_plan_is_valid_and_keeps_the_budget(seed: int, share: float, homes: bool) -> None:
    problem = random_problem(seed, homes=homes)
    plan = solve_offload(problem, between(problem, share), limits=SHORT)
    validate(problem, plan)
    if plan.status in FOUND:
        assert plan.peak <= between(problem, share) and plan.time >= plan.bound
    else:
        assert plan.budget is None and plan.status == Status.TIMED_OUT


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 5))
def test_the_replay_is_what_the_validator_finds(seed: int, steps: int) -> None:
    """After any moves at high temperature, time and peak are those of the plan written out."""
    problem = random_problem(seed)
    search = Search(problem, Limits(seed=seed), float("inf"))
    search.load(range(len(problem.ops)), (), 10**9, mix=True)
    for _ in range(steps):
        search.best.time[0] = float("inf")
        search.anneal(1000, 100.0, 100.0, 0.0)
        if search.best.time[0] < float("inf"):
            peak, time = check_plan(problem, *search.found())
            assert peak == search.best.peak[0] + problem.resident_bytes
            assert abs(time - search.best.time[0]) < 1e-9 * max(1.0, time)


@pytest.mark.parametrize("seed", range(5))
def test_what_the_caller_gives_stays(seed: int) -> None:
    """The gradients that a backward starts from are outputs of an op without operands, which the caller holds."""
    problem = random_problem(seed, homes=False)
    at = len(problem.ops) // 2
    handover = replace(problem.ops[at], reads=(), mutates=(), once=True)
    given = handover.writes
    readers = [replace(op, reads=tuple({*op.reads, given[0]})) for op in problem.ops[at + 1 :]]
    ops = (*problem.ops[:at], handover, *readers[:2], *problem.ops[at + 3 : -1], readers[-1])
    problem = replace(problem, ops=ops, outputs=tuple(dict.fromkeys((*problem.outputs, *given))))
    assert problem.given == set(given)
    search = Search(problem, Limits(seed=seed), float("inf"))
    search.load(range(len(ops)), (), 10**9, mix=True)
    search.anneal(1000, 100.0, 100.0, 0.0)
    sequence, stays = search.found()
    assert check_plan(problem, sequence, stays)[0] == search.best.peak[0] + problem.resident_bytes
    for share in (0.1, 0.5):
        plan = solve_offload(problem, between(problem, share), limits=SHORT)
        validate(problem, plan)
        assert not {stay.buffer for stay in plan.offloads} & problem.given


@pytest.mark.parametrize("seed", range(5))
def test_not_slower_than_either_alone(seed: int) -> None:
    problem = random_problem(seed, homes=False)
    budget = between(problem, 0.4)
    both = solve_offload(problem, budget, limits=SHORT)
    offload = solve_offload(problem, budget, limits=SHORT, recompute=False)
    recompute = solve_recompute(replace(problem, tiers=()), budget, limits=SHORT)
    for alone in (offload, recompute):
        if alone.status in FOUND:
            assert both.status in FOUND and both.time <= alone.time * (1 + 1e-9)


def test_equal_limits_give_equal_plans() -> None:
    problem = random_problem(3)
    budget = between(problem, 0.2)
    assert solve_offload(problem, budget, limits=SHORT) == solve_offload(problem, budget, limits=SHORT)


def test_plain_python_gives_the_same_plan() -> None:
    """The kernels run uncompiled to the same sequence and offloads."""
    code = (
        "import test_offload as t; p = t.random_problem(5, n=10); s = t.Search(p, t.SHORT, float('inf'));"
        "s.load(range(10), (), t.between(p, 0.3), mix=True); s.anneal(3000, 0.5, 0.01, 0.0); print(s.found(), s.random)"
    )
    out = compiled_and_plain(code, Path(__file__).parent)
    assert out[0] == out[1] and "Offload" in out[0]


def test_without_time_there_is_still_an_answer() -> None:
    problem = random_problem(4)
    budget = between(problem, 0.5)
    plan = solve_offload(problem, budget, limits=Limits(seconds=0.0))
    validate(problem, plan)


def test_another_start_order_is_kept_and_its_bound_not_claimed() -> None:
    """Two independent chains, begun in the other order."""
    ops = (
        Op("a", writes=(0,), time=1.0),
        Op("b", writes=(1,), time=2.0),
        Op("join", reads=(0, 1), writes=(2,), time=3.0),
    )
    problem = Problem(ops, (Buffer("a", 5), Buffer("b", 7), Buffer("c", 1)), (2,), tiers=(DISK,))
    plan = solve_offload(problem, 13, limits=SHORT, start=(1, 0, 2))
    validate(problem, plan)
    assert plan.sequence == (1, 0, 2) and plan.bound_scope == "any order" and plan.status == Status.OPTIMAL


def test_a_loaded_plan_is_the_plan() -> None:
    problem = random_problem(11)
    budget = between(problem, 0.3)
    plan = solve_offload(problem, budget, limits=SHORT)
    search = Search(problem, SHORT, float("inf"))
    search.load(plan.sequence, plan.offloads, budget, mix=True)
    assert search.found() == (plan.sequence, plan.offloads) and abs(search.time - plan.time) < 1e-9


def test_streamed_weights_are_prefetched() -> None:
    """Eight layers whose weights cross in the time that a layer computes: only the first crossing shows."""
    ops = tuple(Op(f"layer{i}", reads=(i,) if i == 0 else (i, 7 + i), writes=(8 + i,), time=10.0) for i in range(8))
    weights = tuple(Buffer(f"w{i}", 100, home="disk") for i in range(8))
    problem = Problem(
        ops, (*weights, *(Buffer(f"a{i}", 1) for i in range(8))), (15,), (15,), (Tier("disk", 800, 10.0, 10.0, 0.0),)
    )
    plan = solve_offload(problem, 202, limits=SHORT)
    validate(problem, plan)
    assert plan.status == Status.OPTIMAL and plan.time == pytest.approx(90.0)
    below = solve_offload(problem, 102, limits=SHORT)
    validate(problem, below)
    assert below.time == pytest.approx(160.0)
    assert solve_offload(problem, 100, limits=SHORT).status == Status.INFEASIBLE


def test_what_the_last_op_changes_goes_home() -> None:
    ops = (Op("a", writes=(1,), time=1.0), Op("update", reads=(0, 1), mutates=(0,), time=2.0, once=True))
    problem = Problem(
        ops, (Buffer("state", 10, home="disk"), Buffer("g", 1)), tiers=(Tier("disk", 10, 5.0, 10.0, 0.0),)
    )
    plan = solve_offload(problem, 11, limits=SHORT)
    validate(problem, plan)
    assert plan.time == pytest.approx(1.0 + 2.0 + 2.0), (
        "the copy-in is hidden but for its first unit, the copy-out shows"
    )


def chain(tier: Tier) -> tuple[Problem, Plan]:
    """Four ops; a plan that sends the first's result away over the second and third."""
    ops = tuple(Op(f"op{i}", reads=(i - 1,) if i else (), writes=(i,), time=10.0) for i in range(3))
    last = Op("last", reads=(0, 2), writes=(3,), time=10.0)
    problem = Problem((*ops, last), tuple(Buffer(f"b{i}", 10 if i < 3 else 0) for i in range(4)), (3,), tiers=(tier,))
    return problem, Plan((0, 1, 2, 3), None, 20, 40.0, 40.0, offloads=(Offload(0, 0, 1, 2, 3, 3, tier.name),))


def test_the_validator_replays_the_engines() -> None:
    problem, plan = chain(Tier("disk", 10, 1.0, 1.0, 2.0))
    validate(problem, replace(plan, time=54.0))  # out 10-22, waited for at position 2; in 32-44, waited for at 3
    with pytest.raises(PlanError, match="time"):
        validate(problem, plan)


@pytest.mark.parametrize(
    ("stay", "match"),
    [
        (Offload(0, 0, 1, 1, 3, 3, "tape"), "no tier"),
        (Offload(1, 0, 1, 1, 3, 3, "disk"), "no copy"),
        (Offload(0, 0, 0, 2, 3, 3, "disk"), "not there"),
        (Offload(0, 0, 1, 2, 1, 3, "disk"), "ascend"),
        (Offload(0, 0, 1, 1, 2, 2, "disk"), "reads"),
        (Offload(0, 0, 2, 3, 3, 4, "disk"), "reads"),
        (Offload(0, 0, 4, 4, 4, 4, "disk"), "nothing"),
    ],
)
def test_the_validator_refuses(stay: Offload, match: str) -> None:
    problem, plan = chain(Tier("disk", 10, 1.0, 1.0, 2.0))
    with pytest.raises(PlanError, match=match):
        check_plan(problem, plan.sequence, (stay,))


def test_the_validator_keeps_what_the_caller_gives() -> None:
    problem, plan = chain(Tier("disk", 10, 1.0, 1.0, 2.0))
    given, *rest = problem.ops
    problem = replace(problem, ops=(replace(given, once=True), *rest), outputs=(0, 3))
    with pytest.raises(PlanError, match="the caller holds it"):
        check_plan(problem, plan.sequence, (Offload(0, 0, 2, 2, 3, 3, "disk"),))


def test_a_copy_crosses_once() -> None:
    """A copy that goes twice to one tier is sent there once."""
    ops = tuple(Op(f"op{i}", reads=(0,) if i in (3, 6) else (), writes=(i,), time=10.0) for i in range(7))
    problem = Problem(ops, tuple(Buffer(f"b{i}", 10) for i in range(7)), (6,), tiers=(Tier("disk", 10, 1.0, 1.0, 0.0),))
    first = Offload(0, 0, 1, 2, 2, 3, "disk")
    again = Offload(0, 0, 4, 4, 5, 6, "disk")
    assert check_plan(problem, tuple(range(7)), (first, again))[1] == 70.0, "out under op 1, in under ops 2 and 5"
    with pytest.raises(PlanError, match="has it"):
        check_plan(problem, tuple(range(7)), (first, Offload(0, 0, 4, 5, 5, 6, "disk")))


def test_a_tier_holds_no_more_than_it_can() -> None:
    problem, plan = chain(Tier("disk", 9, 1.0, 1.0, 2.0))
    with pytest.raises(PlanError, match="holds 10 bytes"):
        validate(problem, plan)
    assert solve_offload(problem, 20, limits=SHORT, recompute=False).status == Status.TIMED_OUT


def test_weights_and_states_of_a_training_step_stream() -> None:
    """All weights and states at home on the disk, a third of them fits: each update goes home, most of it hidden."""
    layers = 8
    weight, state, act, grad, back = (range(k * layers, (k + 1) * layers) for k in range(5))
    sizes = (100, 200, 20, 100, 20)
    buffers = [Buffer(f"{k}.{i}", sizes[k], home="disk" if k < 2 else "") for k in range(5) for i in range(layers)]
    ops = [Op(f"f{i}", reads=(weight[i], *act[i - 1 : i]), writes=(act[i],), time=10.0) for i in range(layers)]
    for i in reversed(range(layers)):
        reads = (weight[i], act[i], *back[i + 1 : i + 2])
        ops.append(Op(f"b{i}", reads=reads, writes=(grad[i], back[i]), time=20.0, phase=Phase.BACKWARD, once=True))
        changed = (weight[i], state[i])
        after = (i, len(ops) - 1)
        reads = (*changed, grad[i])
        ops.append(
            Op(
                f"u{i}",
                reads=reads,
                mutates=changed,
                after=after[1:],
                after_all=after[:1],
                time=2.0,
                phase=Phase.OPTIMIZER,
                once=True,
            )
        )
    rate = 2 * 300 * layers / (32.0 * layers)
    problem = Problem(tuple(ops), tuple(buffers), tiers=(Tier("disk", 300 * layers, rate, rate, 0.1),))
    problem.check()
    plan = solve_offload(problem, 300 * layers // 3, limits=SHORT)
    validate(problem, plan)
    assert plan.status in FOUND and plan.bound <= plan.time <= 1.5 * problem.total_time

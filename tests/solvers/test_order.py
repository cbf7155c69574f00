"""The order solver against brute force, the independent validator, and itself run again."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import InputError, PlanError
from memplan.graph_files import load_graph
from memplan.outcome import Limits, Status
from memplan.problem import Buffer, Op, Phase, Problem
from memplan.solvers.order import forced_live_bound, polish_order, solve_order
from memplan.solvers.order.anneal import Annealer
from memplan.solvers.order.bound import cut_at, forced_live
from memplan.solvers.order.exact import ExactSearch
from memplan.solvers.order.model import build_model
from memplan.solvers.order.sweep import KEYS, list_schedule, sweep
from memplan.validate import check_sequence, validate


def random_problem(rng: random.Random, n: int, *, backward: bool = True, density: float = 2.0) -> Problem:
    """A valid problem of n ops with every feature: several results, workspaces, order edges, once, outputs of both kinds."""
    buffers = [Buffer("weight", rng.randrange(4))]
    made: list[int] = []
    ops: list[Op] = []
    first_backward = rng.randrange(1, n + 1) if backward else n
    for i in range(n):
        reads = rng.sample(made, min(len(made), rng.randrange(int(2 * density)))) + rng.choice([[], [0]])
        writes = tuple(range(len(buffers), len(buffers) + rng.choice([0, 1, 1, 1, 2])))
        buffers += [Buffer(f"b{b}", rng.choice([0, 1, 2, 3, 5, 8, 13])) for b in writes]
        ops.append(
            Op(
                f"op{i}",
                reads=tuple(reads),
                writes=writes,
                after=tuple(rng.sample(range(i), 1)) if i and rng.random() < 0.1 else (),
                time=1.0,
                workspace=rng.choice([0, 0, 0, 6]),
                phase=Phase.FORWARD if i < first_backward else Phase.BACKWARD,
                once=rng.random() < 0.2,
            )
        )
        made += writes
    outputs = tuple(sorted(rng.sample(made, min(len(made), rng.randrange(3)))))
    forward = {b for op in ops[:first_backward] for b in op.writes}
    problem = Problem(tuple(ops), tuple(buffers), outputs, tuple(b for b in outputs if b in forward))
    problem.check()
    return problem


def with_repeats(rng: random.Random, problem: Problem) -> tuple[int, ...]:
    """The stored order with some recomputation: valid, as every operand was made before."""
    sequence = list(range(len(problem.ops)))
    again = [i for i, op in enumerate(problem.ops) if not op.once]
    for i in rng.choices(again, k=rng.randrange(4)) if again else []:
        sequence.insert(rng.randrange(sequence.index(i) + 1, len(sequence) + 1), i)
    return tuple(sequence)


def least_peak(problem: Problem) -> int:
    """By trying every order with the validator's own rules."""
    peaks = []
    for sequence in itertools.permutations(range(len(problem.ops))):
        try:
            peaks.append(check_sequence(problem, sequence)[0])
        except PlanError:
            continue
    return min(peaks)


seeds = st.integers(0, 2**32).map(random.Random)


@settings(max_examples=60)
@given(seeds, st.integers(1, 6))
def test_least_peak_on_small_graphs(rng: random.Random, n: int) -> None:
    problem = random_problem(rng, n)
    plan = solve_order(problem)
    validate(problem, plan)
    assert plan.peak == least_peak(problem)
    assert plan.status == Status.OPTIMAL


@settings(max_examples=100)
@given(seeds, st.integers(1, 30))
def test_plans_are_valid_and_bounds_hold(rng: random.Random, n: int) -> None:
    problem = random_problem(rng, n)
    plan = solve_order(problem)
    validate(problem, plan)
    assert sorted(plan.sequence) == list(range(n))
    assert forced_live_bound(problem) <= plan.peak_bound <= plan.peak <= plan.unplanned_peak
    assert (plan.status == Status.OPTIMAL) == (plan.peak == plan.peak_bound)


@settings(max_examples=100)
@given(seeds, st.integers(1, 25))
def test_cut_is_between_forced_live_and_the_load_of_any_order(rng: random.Random, n: int) -> None:
    problem = random_problem(rng, n)
    model = build_model(problem)
    forced = forced_live(model)
    for s in (sweep(model), sweep(model, backward=True)):
        for key in KEYS:
            order = list_schedule(s, key)
            validated = check_sequence(problem, model.sequence(order))[0]
            assert model.peak(order) == validated
            for v, load in zip(order, model.loads(order), strict=True):
                assert forced[v] <= cut_at(model, v) <= load


@settings(max_examples=100)
@given(seeds, st.integers(1, 20))
def test_polish_keeps_runs_and_never_raises_the_peak(rng: random.Random, n: int) -> None:
    problem = random_problem(rng, n)
    sequence = with_repeats(rng, problem)
    before, time = check_sequence(problem, sequence)
    polished = polish_order(problem, sequence)
    after, same_time = check_sequence(problem, polished)
    assert after <= before and same_time == time
    assert Counter(polished) == Counter(sequence)
    assert build_model(problem, sequence).peak(range(build_model(problem, sequence).n)) == before


def annealed(problem: Problem, rounds: int) -> list[int]:
    model = build_model(problem)
    annealer = Annealer(model, range(model.n), seed=3, moves=20)
    target = model.peak(range(model.n)) // 2
    for _ in range(rounds):
        order = annealer.round(target)
    return order


def searched(problem: Problem) -> list[tuple[list[int] | None, int, int]]:
    """Answers of exact search in both directions, at limits from too low to too high, cut short now and then."""
    model = build_model(problem)
    peak = model.peak(range(model.n))
    answers = []
    for backward in (False, True):
        search = ExactSearch(sweep(model, backward=backward))
        for share in (0.4, 0.6, 0.8, 1.0):
            answer = search.within(int(share * peak), 20_000)
            answers.append((answer.order, answer.bound, answer.work))
    return answers


def test_compiled_loops_and_plain_python_give_the_same() -> None:
    script = (
        "import json, random, test_order as t; problem = t.random_problem(random.Random(5), 60, density=1.2); "
        "print(json.dumps([t.annealed(problem, 3), t.searched(problem)]))"
    )
    plain = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    problem = random_problem(random.Random(5), 60, density=1.2)
    assert json.loads(plain.stdout) == json.loads(json.dumps([annealed(problem, 3), searched(problem)]))


@settings(max_examples=60)
@given(seeds, st.integers(1, 16))
def test_exact_search_decides(rng: random.Random, n: int) -> None:
    """Both directions agree, and a limit is feasible exactly from the least peak on."""
    problem = random_problem(rng, n, density=1.2)
    model = build_model(problem)
    least = solve_order(problem).peak
    for backward in (False, True):
        search = ExactSearch(sweep(model, backward=backward))
        found = search.within(least, 10**6).order
        assert found is not None and model.peak(found) == least
        assert check_sequence(problem, model.sequence(found))[0] == least
        below = search.within(least - 1, 10**6)
        assert below.order is None and below.bound == least


@settings(max_examples=30)
@given(seeds, st.integers(2, 60))
def test_annealed_orders_are_valid(rng: random.Random, n: int) -> None:
    problem = random_problem(rng, n)
    model = build_model(problem)
    order = annealed(problem, 2)
    assert model.peak(order) == check_sequence(problem, model.sequence(order))[0]


def test_equal_limits_give_equal_plans() -> None:
    problem = random_problem(random.Random(11), 150, density=1.5)
    assert solve_order(problem, limits=Limits(work=0.2)) == solve_order(problem, limits=Limits(work=0.2))


def test_a_large_graph_has_a_plan_at_once() -> None:
    problem = random_problem(random.Random(1), 10_000)
    plan = solve_order(problem, limits=Limits(seconds=0))
    validate(problem, plan)
    assert plan.peak_bound <= plan.peak


def test_a_goal_ends_the_search() -> None:
    problem = random_problem(random.Random(11), 150, density=1.5)
    least = solve_order(problem, limits=Limits(work=0.2))
    goal = (least.peak + least.unplanned_peak) // 2
    plan = solve_order(problem, goal=goal)
    validate(problem, plan)
    assert least.peak <= plan.peak <= goal


def test_interruption_leaves_the_best_order_so_far() -> None:
    problem = random_problem(random.Random(11), 150, density=1.5)

    def interrupt(line: str) -> None:
        if "list schedule" in line:
            raise KeyboardInterrupt

    plan = solve_order(problem, limits=Limits(progress=interrupt))
    validate(problem, plan)
    assert plan.peak < plan.unplanned_peak
    assert plan.status == Status.FEASIBLE


def test_a_malformed_problem_is_refused() -> None:
    with pytest.raises(InputError, match="before it is made"):
        solve_order(Problem((Op("reader", reads=(0,)), Op("maker", writes=(0,))), (Buffer("b", 1),)))


def test_edge_cases() -> None:
    assert solve_order(Problem((), (Buffer("input", 7),))).peak == 7
    lone = Problem((Op("op", writes=(0,), workspace=5),), (Buffer("b", 3),))
    assert solve_order(lone).peak == 8
    assert solve_order(lone).status == Status.OPTIMAL


def test_small_graphs_are_solved_to_proven_optimality() -> None:
    rng = random.Random(0)
    plans = [solve_order(random_problem(rng, rng.randrange(10, 31), density=1.2)) for _ in range(200)]
    assert all(plan.status == Status.OPTIMAL for plan in plans)
    assert any(plan.peak < plan.unplanned_peak for plan in plans)


@pytest.mark.skipif("MEMPLAN_DATA" not in os.environ, reason="MEMPLAN_DATA names no folder of public instances")
@pytest.mark.parametrize(
    ("name", "percent"),
    [("random_layered_n100", 79.43), ("random_layered_n250", 71.63), ("fcn8_vgg_train", 100), ("resnet50_train", 100)],
)
def test_public_graphs_are_solved_to_proven_optimality(name: str, percent: float) -> None:
    problem = load_graph(Path(os.environ["MEMPLAN_DATA"]) / "recompute" / f"{name}.json").problem
    plan = solve_order(problem)
    validate(problem, plan)
    assert plan.status == Status.OPTIMAL
    assert 100 * plan.peak <= percent * plan.unplanned_peak

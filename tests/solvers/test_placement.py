"""Placement: valid and honest answers, the optimum where it can be enumerated, the published instances."""

from __future__ import annotations

import itertools
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import InputError, PlanError
from memplan.outcome import Limits, Status
from memplan.solvers.placement import (
    Placement,
    PlacementProblem,
    check_placement,
    read_csv,
    solve_placement,
    write_csv,
)
from memplan.solvers.placement.component import reduce_problem, sections_of
from memplan.solvers.placement.portfolio import luby
from tests.uncompiled import compiled_and_plain

SHORT = Limits(work=0.05)


def random_problem(seed: int, n: int, most: int = 40, span: int = 30, alignment: int = 1) -> PlacementProblem:
    """Independent random lifetimes and sizes; some buffers take no room."""
    rng = random.Random(seed)
    lower = [rng.randrange(span) for _ in range(n)]
    upper = [lo + rng.randint(0 if rng.random() < 0.05 else 1, max(1, span // 2)) for lo in lower]
    size = [rng.randint(0 if rng.random() < 0.05 else 1, most) for _ in range(n)]
    return PlacementProblem(tuple(lower), tuple(upper), tuple(size), alignment)


def tiling(seed: int, n: int, height: int = 1024, span: int = 1000) -> PlacementProblem:
    """A rectangle cut into n buffers: a placement without any waste exists."""
    rng = random.Random(seed)
    tiles = [(0, span, 0, height)]
    while len(tiles) < n:
        i = max(rng.sample(range(len(tiles)), min(4, len(tiles))), key=lambda i: _area(tiles[i]))
        a, b, c, d = tiles[i]
        if rng.random() < 0.5 and b - a > 1:
            cut = rng.randint(a + 1, b - 1)
            tiles[i : i + 1] = [(a, cut, c, d), (cut, b, c, d)]
        elif d - c > 1:
            cut = rng.randint(c + 1, d - 1)
            tiles[i : i + 1] = [(a, b, c, cut), (a, b, cut, d)]
    rng.shuffle(tiles)
    return PlacementProblem(*map(tuple, zip(*((a, b, d - c) for a, b, c, d in tiles), strict=True)))


def _area(tile: tuple[int, int, int, int]) -> int:
    a, b, c, d = tile
    return (b - a) * (d - c)


def optimum(problem: PlacementProblem) -> int:
    """The lowest height: some order makes first fit reproduce a lowest left-justified placement."""
    n, a = len(problem), problem.alignment
    taking = [i for i in range(n) if problem.size[i] > 0 and problem.upper[i] > problem.lower[i]]
    least = sum(-(-s // a) * a for s in problem.size)
    for order in itertools.permutations(taking):
        off: dict[int, int] = {}
        for i in order:
            spot = 0
            for k in sorted(off, key=lambda k: off[k]):
                if problem.lower[k] < problem.upper[i] and problem.lower[i] < problem.upper[k]:
                    if off[k] - spot >= problem.size[i]:
                        break
                    spot = max(spot, -(-(off[k] + problem.size[k]) // a) * a)
            off[i] = spot
        least = min(least, max((off[i] + problem.size[i] for i in off), default=0))
    return max(least, max(problem.size, default=0))


@given(st.integers(0, 10**9), st.integers(0, 6), st.sampled_from([1, 1, 4]))
@settings(max_examples=120)
def test_small_problems_are_solved_exactly(seed: int, n: int, alignment: int) -> None:
    problem = random_problem(seed, n, most=24, span=6, alignment=alignment)
    best = optimum(problem)
    placement = solve_placement(problem, limits=SHORT)
    check_placement(problem, placement)
    assert placement.bound <= best <= placement.height
    if alignment == 1:
        assert placement.status == Status.OPTIMAL
        assert placement.height == best
    for capacity in range(max(0, best - 2), best + 3):
        within = solve_placement(problem, capacity=capacity, limits=SHORT)
        assert (within.status == Status.INFEASIBLE) == (capacity < best)
        if capacity < best:
            assert within.bound > capacity
        else:
            check_placement(problem, within)
            assert within.height <= capacity
            assert within.status in {Status.OPTIMAL, Status.FEASIBLE}


@given(st.integers(0, 10**9), st.integers(1, 60), st.sampled_from([1, 8, 64]))
@settings(max_examples=60)
def test_any_placement_is_valid_and_between_its_bound_and_the_stack(seed: int, n: int, alignment: int) -> None:
    problem = random_problem(seed, n, most=500, alignment=alignment)
    placement = solve_placement(problem, limits=Limits(work=0.01))
    check_placement(problem, placement)
    assert placement.height <= sum(-(-s // alignment) * alignment for s in problem.size)
    assert (placement.height == placement.bound) == (placement.status == Status.OPTIMAL)
    assert placement.gap == pytest.approx(1 - placement.bound / placement.height if placement.height else 0)


@given(st.integers(0, 10**9), st.integers(1, 30))
@settings(max_examples=60)
def test_buffers_meet_exactly_when_their_sections_do(seed: int, n: int) -> None:
    problem = random_problem(seed, n)
    taking = [i for i in range(n) if problem.upper[i] > problem.lower[i]]
    if not taking:
        return
    lower, upper = (np.array([column[i] for i in taking], np.int64) for column in (problem.lower, problem.upper))
    lo, hi = sections_of(lower, upper)
    meet = (lower[:, None] < upper) & (lower < upper[:, None])
    assert (meet == ((lo[:, None] < hi) & (lo < hi[:, None]))).all()
    assert hi.max() <= len(taking)


@pytest.mark.parametrize(("seed", "n"), [(1, 60), (2, 60), (3, 120), (4, 120), (5, 250)])
def test_tilings_are_placed_without_waste(seed: int, n: int) -> None:
    problem = tiling(seed, n)
    placement = solve_placement(problem, limits=SHORT)
    check_placement(problem, placement)
    assert (placement.status, placement.height) == (Status.OPTIMAL, 1024)


def test_equal_limits_give_equal_plans() -> None:
    problem = random_problem(7, 150, most=900, span=80)
    limits = Limits(work=0.05, seed=3)
    assert solve_placement(problem, limits=limits) == solve_placement(problem, limits=limits)


def test_components_are_placed_on_their_own() -> None:
    one = random_problem(11, 30)
    shifted = [(lo + 1000, up + 1000) for lo, up in zip(one.lower, one.upper, strict=True)]
    lower, upper = zip(*shifted, strict=True)
    both = PlacementProblem(one.lower + lower, one.upper + upper, one.size * 2)
    assert len(reduce_problem(both).components) == 2 * len(reduce_problem(one).components)
    assert solve_placement(both, limits=SHORT).height == solve_placement(one, limits=SHORT).height


def test_the_arena_may_end_inside_the_alignment() -> None:
    problem = PlacementProblem((0, 0, 0), (9, 9, 9), (33, 64, 10), alignment=64)
    placement = solve_placement(problem, capacity=138)
    check_placement(problem, placement)
    assert (placement.status, placement.height) == (Status.OPTIMAL, 138)
    assert solve_placement(problem, capacity=137).status == Status.INFEASIBLE


def test_nothing_to_place() -> None:
    assert solve_placement(PlacementProblem((), (), ())) == Placement((), 0, 0, Status.OPTIMAL)
    lifeless = PlacementProblem((3, 5), (3, 5), (8, 4))
    placement = solve_placement(lifeless)
    check_placement(lifeless, placement)
    assert (placement.height, placement.status) == (8, Status.OPTIMAL)


def test_a_first_placement_comes_without_any_effort() -> None:
    problem = tiling(9, 400)
    for limits in (Limits(work=0), Limits(seconds=0)):
        placement = solve_placement(problem, limits=limits)
        check_placement(problem, placement)
        assert placement.status == Status.FEASIBLE
    missed = solve_placement(problem, capacity=1024, limits=Limits(work=0))
    assert missed.status == Status.TIMED_OUT
    check_placement(problem, missed)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_small_buffers_do_not_keep_large_ones_from_their_best(seed: int) -> None:
    large, small = tiling(seed, 200), random_problem(seed, 600, most=2000, span=1000)
    problem = PlacementProblem(
        large.lower + small.lower,
        large.upper + tuple(min(upper, 1000) for upper in small.upper),
        tuple(4096 * size for size in large.size) + small.size,
    )
    placement = solve_placement(problem, limits=Limits(work=0.2))
    check_placement(problem, placement)
    assert placement.height <= 1.07 * placement.bound  # branch and bound over all of them: 1.13 to 1.21


def hard() -> PlacementProblem:
    """A tiling with holes: far from solved in a second."""
    whole = tiling(5, 250)
    keep = [i for i in range(250) if i % 19]
    return PlacementProblem(*(tuple(column[i] for i in keep) for column in (whole.lower, whole.upper, whole.size)))


def test_the_wall_clock_ends_a_solve() -> None:
    solve_placement(tiling(1, 30))  # compiled before the clock starts
    start = time.monotonic()
    placement = solve_placement(hard(), limits=Limits(work=1e9, seconds=0.5))
    assert time.monotonic() - start < 60  # the work asked for takes far longer
    check_placement(hard(), placement)


def test_an_interrupt_returns_the_best_so_far() -> None:
    lines = []

    def interrupt(line: str) -> None:
        lines.append(line)
        raise KeyboardInterrupt

    placement = solve_placement(hard(), limits=Limits(work=1e9, progress=interrupt))
    check_placement(hard(), placement)
    assert len(lines) == 1
    assert "height" in lines[0]
    assert placement.status == Status.FEASIBLE


def test_many_buffers() -> None:
    rng = random.Random(0)
    lower = tuple(rng.randrange(10**6) for _ in range(30_000))
    upper = tuple(lo + rng.randint(1, 3000) for lo in lower)
    size = tuple(rng.choice((64, 4096, 65536, 10**6)) for _ in lower)
    problem = PlacementProblem(lower, upper, size)
    placement = solve_placement(problem, limits=Limits(work=0.02))
    check_placement(problem, placement)
    assert placement.gap < 0.25
    together = PlacementProblem((0,) * 20_000, (1,) * 20_000, size[:20_000])
    assert solve_placement(together, limits=SHORT).status == Status.OPTIMAL


@pytest.mark.parametrize(
    ("offsets", "height", "message"),
    [
        ((0, 4), 12, "live at once and overlap"),
        ((0, 10), 18, "not a multiple"),
        ((0, 8), 12, "states a height"),
        ((0,), 8, "1 offsets for 2"),
        ((0, -8), 8, "not a multiple"),
    ],
)
def test_the_check_finds_what_is_wrong(offsets: tuple[int, ...], height: int, message: str) -> None:
    problem = PlacementProblem((0, 2), (4, 6), (8, 8), alignment=4)
    check_placement(problem, Placement((0, 8), 16, 16, Status.OPTIMAL))
    with pytest.raises(PlanError, match=message):
        check_placement(problem, Placement(offsets, height, 0, Status.FEASIBLE))


def test_the_check_refuses_a_height_below_the_bound() -> None:
    with pytest.raises(PlanError, match="below the stated bound"):
        check_placement(PlacementProblem((0,), (1,), (8,)), Placement((0,), 8, 9, Status.OPTIMAL))


def test_csv_round_trip(tmp_path: Path) -> None:
    problem = PlacementProblem((0, 2), (4, 6), (8, 8), ids=("a", "b,c"))
    placement = solve_placement(problem)
    write_csv(tmp_path / "plan.csv", problem, placement)
    assert read_csv(tmp_path / "plan.csv") == problem  # the offset column is ignored
    rows = (tmp_path / "plan.csv").read_text().splitlines()
    assert rows[0] == "id,lower,upper,size,offset"
    assert rows[2].startswith('"b,c",2,6,8,')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,lower,upper\n", "line 1: no column 'size'"),
        ("", "line 1: no column 'id'"),
        ("id,lower,upper,size\na,0,1,2\nb,0,x,2\n", "line 3: upper is 'x', not an integer"),
        ("id,lower,upper,size\na,0,1\n", "line 2: size is None, not an integer"),
        ("id,lower,upper,size\na,5,1,2\n", "line 2: upper 1 is before lower 5"),
        ("id,lower,upper,size\na,0,1,-2\n", "line 2: negative size -2"),
        ("id,lower,upper,size\na,0,1,2\na,0,1,2\n", "line 3: id 'a' stands already on line 2"),
    ],
)
def test_bad_input_is_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_csv(tmp_path / "bad.csv")


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_csv(tmp_path / "none.csv")


@pytest.mark.parametrize(
    "columns", [((0,), (1, 2), (3,)), ((4,), (1,), (3,)), ((0,), (1,), (-3,)), ((0,), (1,), (1,), 0)]
)
def test_a_problem_that_makes_no_sense(columns: tuple) -> None:
    with pytest.raises(InputError):
        PlacementProblem(*columns)


def test_restart_lengths() -> None:
    assert [luby(k) for k in range(15)] == [1, 1, 2, 1, 1, 2, 4, 1, 1, 2, 1, 1, 2, 4, 8]


PLANS = """
import random, sys
from memplan.outcome import Limits
from memplan.solvers.placement import PlacementProblem, solve_placement
for seed in range(6):
    rng = random.Random(seed)
    lower = tuple(rng.randrange(20) for _ in range(14 + seed))
    upper = tuple(lo + rng.randint(1, 12) for lo in lower)
    size = tuple(rng.randint(1, 30) for _ in lower)
    problem = PlacementProblem(lower, upper, size)
    placement = solve_placement(problem, limits=Limits(work=2e-5))
    print(placement)
    print(solve_placement(problem, capacity=placement.bound, limits=Limits(work=2e-5)))
print("torch" in sys.modules)
"""


def test_plain_python_gives_the_same_plans_without_torch() -> None:
    """The compiled loops and the same source run as Python."""
    outputs = compiled_and_plain(PLANS, Path(__file__).parent)
    assert outputs[0] == outputs[1]
    assert outputs[0].endswith("False\n")


DATA = Path(os.environ.get("MEMPLAN_DATA", "")) / "placement"
public = pytest.mark.skipif(
    "MEMPLAN_DATA" not in os.environ or not DATA.is_dir(), reason="MEMPLAN_DATA names no folder with placement/"
)


@public
@pytest.mark.parametrize("letter", "ABCDEFGHIJK")
def test_minimalloc_instances_within_their_capacity(letter: str) -> None:
    problem = read_csv(DATA / f"{letter}.1048576.csv")
    placement = solve_placement(problem, capacity=1 << 20)
    check_placement(problem, placement)
    assert placement.height <= 1 << 20


@public
def test_idealloc_instances() -> None:
    problem = read_csv(DATA / "resnet50.csv")
    placement = solve_placement(problem)
    check_placement(problem, placement)
    assert placement.status == Status.OPTIMAL
    problem = read_csv(DATA / "pangu_2.6B.csv")
    placement = solve_placement(problem, limits=Limits(work=1))
    check_placement(problem, placement)
    assert placement.gap < 0.01

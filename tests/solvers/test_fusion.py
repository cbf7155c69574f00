"""Fusion on pure data: legality by replay, and the peak that never rises."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.solvers.fusion import FusionPlan, FusionProblem, Run, solve_fusion


def replay(problem: FusionProblem, plan: FusionPlan) -> int:
    """Peak of the fused sequence, by a direct walk that shares no code with the solver; asserts that it is legal."""
    assert sorted(r for unit in plan.units for r in unit) == list(range(len(problem.runs)))
    slot = {run: at for at, unit in enumerate(plan.units) for run in unit}
    writer = {b: i for i, run in enumerate(problem.runs) for b in run.writes}
    for i, run in enumerate(problem.runs):
        assert all(slot[writer[b]] <= slot[i] for b in run.reads if b in writer)
        assert all(slot[j] <= slot[i] for j in run.after)
    for unit in plan.regions:
        assert len({problem.runs[r].domain for r in unit}) == 1 and problem.runs[unit[0]].domain >= 0
    loads = [sum(size for b, size in enumerate(problem.sizes) if b not in writer)] * (len(plan.units) + 1)
    for b, maker in writer.items():
        uses = [slot[i] for i, run in enumerate(problem.runs) if b in run.reads]
        end = len(plan.units) + 1 if b in problem.kept else max(uses, default=slot[maker]) + 1
        fused = len(plan.units[slot[maker]]) > 1
        if fused and b not in problem.kept and all(at == slot[maker] for at in uses):
            continue  # inside a region: never made
        for at in range(slot[maker], end):
            loads[at] += problem.sizes[b]
    for at, unit in enumerate(plan.units):
        loads[at] += max(problem.runs[r].workspace for r in unit)
    return max(loads)


def test_chain_becomes_one_region() -> None:
    runs = tuple(Run(f"op{i}", reads=(i,), writes=(i + 1,), domain=0) for i in range(5))
    plan = solve_fusion(FusionProblem(runs, sizes=(8,) * 6, kept=frozenset({5})))
    assert plan.units == ((0, 1, 2, 3, 4),)
    assert (plan.moved_before, plan.moved_after) == (80, 16)
    assert plan.peak_after == 16


def test_no_region_around_a_matmul() -> None:
    """a -> mm -> c with a skip from a to c: the pair a, c is not convex."""
    runs = (
        Run("a", reads=(0,), writes=(1,), domain=0),
        Run("mm", reads=(1,), writes=(2,)),
        Run("c", reads=(1, 2), writes=(3,), domain=0),
    )
    assert solve_fusion(FusionProblem(runs, (8,) * 4, frozenset({3}))).regions == ()


def test_domains_stay_apart() -> None:
    runs = (Run("f", reads=(0,), writes=(1,), domain=0), Run("b", reads=(1,), writes=(2,), domain=1))
    assert solve_fusion(FusionProblem(runs, (8,) * 3, frozenset({2}))).regions == ()


def test_a_merge_that_would_lift_the_peak_is_left() -> None:
    """Fusing the two sums early would hold both results over the large matmul; the peak forbids it."""
    runs = (
        Run("a", reads=(0,), writes=(1,), domain=0),
        Run("big", reads=(0,), writes=(2,), workspace=100),
        Run("c", reads=(0,), writes=(3,), domain=0),
    )
    problem = FusionProblem(runs, (1, 50, 1, 50), kept=frozenset({2, 3, 1}), launch_bytes=1)
    plan = solve_fusion(problem)
    assert replay(problem, plan) == plan.peak_after <= plan.peak_before
    assert solve_fusion(problem, limit=1000).regions == ((0, 2),)


def test_caps_bound_the_region() -> None:
    runs = tuple(Run(f"op{i}", reads=(i,), writes=(i + 1,), domain=0) for i in range(8))
    plan = solve_fusion(FusionProblem(runs, (8,) * 9, frozenset({8})), caps=dict.fromkeys(range(8), 3))
    assert max(len(r) for r in plan.regions) <= 3


@st.composite
def problems(draw: st.DrawFn) -> FusionProblem:
    runs: list[Run] = []
    buffers = 2
    for i in range(draw(st.integers(2, 14))):
        reads = draw(st.lists(st.integers(0, buffers - 1), min_size=1, max_size=3, unique=True))
        count = draw(st.integers(1, 2))
        after = (draw(st.integers(0, i - 1)),) if i and draw(st.integers(0, 7)) == 0 else ()
        domain = draw(st.sampled_from([-1, 0, 0, 0, 1]))
        runs.append(
            Run(f"r{i}", tuple(reads), tuple(range(buffers, buffers + count)), after, domain, draw(st.integers(0, 9)))
        )
        buffers += count
    sizes = tuple(draw(st.lists(st.integers(0, 20), min_size=buffers, max_size=buffers)))
    kept = frozenset(draw(st.lists(st.integers(0, buffers - 1), max_size=3)))
    return FusionProblem(tuple(runs), sizes, kept, launch_bytes=draw(st.integers(0, 5)))


@settings(max_examples=300)
@given(problems())
def test_any_plan_is_legal_and_never_lifts_the_peak(problem: FusionProblem) -> None:
    plan = solve_fusion(problem)
    assert replay(problem, plan) == plan.peak_after
    assert plan.peak_after <= plan.peak_before
    assert plan.moved_after <= plan.moved_before
    assert plan == solve_fusion(problem)

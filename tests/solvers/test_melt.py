"""Recomputation that regions take in: valid sequences that save the fewest bytes a cut can."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.problem import Buffer, Op, Phase, Problem
from memplan.solvers.recompute import melted
from memplan.validate import check_sequence

BACK = Phase.BACKWARD


def chain(sizes: tuple[int, ...]) -> Problem:
    """A product, a cast of it and its exponential, and a backward that reads the last."""
    buffers = (*(Buffer(name, size) for name, size in zip("pce", sizes, strict=True)), Buffer("gradient", 8))
    ops = (
        Op("product", writes=(0,)),
        Op("cast", reads=(0,), writes=(1,)),
        Op("exp", reads=(1,), writes=(2,)),
        Op("backward", reads=(2,), writes=(3,), phase=BACK),
    )
    return Problem(ops, buffers, outputs=(3,))


def test_what_is_wider_than_its_source_is_made_again_beside_its_reader() -> None:
    assert melted(chain((4, 8, 8)), range(4), {1, 2}, {1, 2, 3}) == (0, 1, 2, 1, 2, 3)


def test_nothing_is_made_again_where_that_saves_no_bytes() -> None:
    assert melted(chain((8, 8, 8)), range(4), {1, 2}, {1, 2, 3}) is None


def test_what_a_kernel_of_its_own_reads_is_saved() -> None:
    assert melted(chain((4, 8, 8)), range(4), {1, 2}, {1, 2}) is None


def test_what_a_much_larger_result_is_made_of_is_saved() -> None:
    """A statistic of each row, read for every element of the rows."""
    problem = chain((1, 2, 2))
    wide = Problem(problem.ops, (*problem.buffers[:3], Buffer("gradient", 1000)), outputs=(3,))
    assert melted(wide, range(4), {1, 2}, {1, 2, 3}) is None


def test_what_the_caller_holds_costs_nothing_to_save() -> None:
    problem = chain((4, 8, 8))
    held = Problem(problem.ops, problem.buffers, outputs=(2, 3), forward_outputs=(2,))
    assert melted(held, range(4), {1, 2}, {1, 2, 3}) is None


def test_what_the_sequence_makes_again_itself_is_read_as_it_is() -> None:
    problem = chain((4, 8, 8))
    first = Op("first", writes=(4,), phase=BACK)
    longer = Problem((*problem.ops[:3], first, problem.ops[3]), (*problem.buffers, Buffer("other", 8)), outputs=(3, 4))
    assert melted(longer, (0, 1, 2, 3, 1, 2, 4), {1, 2}, {1, 2, 4}) is None


def a_problem(seed: int) -> tuple[Problem, set[int], set[int]]:
    """A random forward and backward; the ops that are pointwise, and those that are fusible."""
    rng = random.Random(seed)
    buffers, ops = [Buffer("input", 4)], list[Op]()
    for i in range(rng.randint(6, 14)):
        forward = i < 7
        reads = {rng.randrange(len(buffers)) for _ in range(rng.choice((1, 2)))}
        buffers.append(Buffer(f"b{i}", rng.choice((1, 2, 4, 8, 40))))
        ops.append(
            Op(
                f"op{i}",
                reads=tuple(sorted(reads)),
                writes=(len(buffers) - 1,),
                phase=Phase.FORWARD if forward else BACK,
            )
        )
    held = tuple(b for b in (rng.randrange(1, 8),) if rng.random() < 0.3)
    fusible = {i for i in range(len(ops)) if rng.random() < 0.7}
    pointwise = {i for i in fusible if rng.random() < 0.8}
    return Problem(tuple(ops), tuple(buffers), (*held, len(buffers) - 1), held), pointwise, fusible


def saved(problem: Problem, sequence: tuple[int, ...]) -> int:
    """Bytes of forward results, other than those the caller holds, that the backward reads as the forward made them."""
    begin = sum(op.phase == Phase.FORWARD for op in problem.ops)  # what is made again before the backward is, too
    fresh, old = set[int](), set[int]()
    for i in sequence[begin:]:
        old |= {b for b in problem.ops[i].reads if problem.writer[b] >= 0 and b not in fresh}
        fresh.update(problem.ops[i].writes)
    return sum(problem.buffers[b].size for b in old if b not in problem.outputs)


def fewest(problem: Problem, pointwise: set[int], fusible: set[int]) -> int:
    """The same, of the best of all ways to make results again, tried one by one."""
    forward = [b for b, i in enumerate(problem.writer) if i >= 0 and problem.ops[i].phase == Phase.FORWARD]
    size = [buffer.size for buffer in problem.buffers]
    readers = {b: [problem.ops[i] for i in problem.readers[b]] for b in forward}
    wanted = {b for b in forward if any(op.phase == BACK for op in readers[b])}
    free = [
        b
        for b in forward
        if problem.writer[b] in pointwise
        and all(i in fusible for i in problem.readers[b] if problem.ops[i].phase == BACK)
        and all(size[op.writes[0]] <= 8 * size[b] for op in readers[b])
    ]
    best = sum(size[b] for b in wanted if b not in problem.outputs)
    for count in range(len(free) + 1):
        for again in map(set, combinations(free, count)):
            needed, stack = set(wanted), [b for b in wanted if b in again]
            while stack:
                operands = {b for b in problem.ops[problem.writer[stack.pop()]].reads if problem.writer[b] >= 0}
                stack += [b for b in operands - needed if b in again]
                needed |= operands
            best = min(best, sum(size[b] for b in needed - again if b not in problem.outputs))
    return best


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 100_000))
def test_no_choice_of_results_saves_fewer_bytes(seed: int) -> None:
    problem, pointwise, fusible = a_problem(seed)
    stored = tuple(range(len(problem.ops)))
    if all(op.phase == Phase.FORWARD for op in problem.ops):
        return
    found = melted(problem, stored, pointwise, fusible) or stored
    check_sequence(problem, found)
    assert tuple(dict.fromkeys(found)) == stored
    assert saved(problem, found) == fewest(problem, pointwise, fusible)
    assert {i for i in stored if found.count(i) > 1} <= pointwise


@pytest.mark.parametrize("sequence", ((0, 1, 2), ()))
def test_a_forward_alone_is_left(sequence: tuple[int, ...]) -> None:
    problem = chain((4, 8, 8))
    forward = Problem(problem.ops[: len(sequence)], problem.buffers, outputs=())
    assert melted(forward, sequence, {1, 2}, {1, 2}) is None


def test_a_chain_whose_every_link_is_read_is_not_made_again_for_each() -> None:
    """Link after link, each read by the backward: the runs would grow with the square of the chain."""
    links = 50
    forward = [Op(f"f{i}", reads=(i,), writes=(i + 1,)) for i in range(links)]
    backward = [Op(f"b{i}", reads=(i + 1,), writes=(links + 1 + i,), phase=BACK) for i in range(links)]
    problem = Problem(
        (*forward, *backward), tuple(Buffer(f"x{b}", 8) for b in range(2 * links + 1)), outputs=(2 * links,)
    )
    everything = set(range(2 * links))
    assert melted(problem, range(2 * links), everything, everything) is None

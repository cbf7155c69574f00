"""Recomputation that fusion makes free: values that a backward's regions compute again instead of reading them.

A minimum cut through the forward decides what is saved, as in torch's min-cut partitioner (functorch, "Min-cut optimal
recomputation"): here it starts from a plan's sequence, counts as saved what is held anyway, and recomputes only where a
region takes the value in, so that neither its bytes nor their traffic exist.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import islice

from ortools.graph.python import max_flow

from memplan.problem import Phase, Problem
from memplan.solvers.recompute.lowest import is_valid

_LONGER = 3  # times the sequence's runs
_SPREAD = 8  # an element of one byte beside one of eight is none


def melted(
    problem: Problem, sequence: Sequence[int], pointwise: Collection[int], fusible: Collection[int]
) -> tuple[int, ...] | None:
    """The sequence with the fewest bytes saved for the backward, where every reader of what is recomputed is fusible.

    ``fusible``: ops that may share a region with others of their phase; ``pointwise``: those of them that a region
    repeats at no cost, with one result each. None where nothing would be recomputed, or the result broke a rule or got
    too long: each reader of a long chain's links would run what comes before them.
    """
    begin = next((at for at, i in enumerate(sequence) if problem.ops[i].phase != Phase.FORWARD), len(sequence))
    forward = {b for i in sequence[:begin] for b in problem.ops[i].writes}
    wanted, pinned = _readings(problem, sequence[begin:], forward, fusible)
    pinned |= {b for b in forward if _is_spread(problem, b)}
    again = _recomputed(problem, forward, wanted, pinned, pointwise)
    if not wanted & again:
        return None
    result = tuple(islice(_with_runs(problem, sequence, begin, again), _LONGER * len(sequence) + 1))
    return result if len(result) <= _LONGER * len(sequence) and is_valid(problem, result) else None


def _is_spread(problem: Problem, b: int) -> bool:
    """Whether an op makes much more of a buffer than it is: a region would compute it anew for every element of that."""
    made = [problem.buffers[w].size for i in problem.readers[b] for w in problem.ops[i].writes]
    return max(made, default=0) > _SPREAD * problem.buffers[b].size


def _readings(
    problem: Problem, backward: Sequence[int], forward: Collection[int], fusible: Collection[int]
) -> tuple[set[int], set[int]]:
    """Buffers whose forward copy the backward reads, and those of them that no region reads."""
    wanted, pinned, fresh = set[int](), set[int](), set[int]()
    for i in backward:
        old = {b for b in problem.ops[i].reads if b in forward and b not in fresh}
        wanted |= old
        if i not in fusible:
            pinned |= old
        fresh.update(problem.ops[i].writes)
    return wanted, pinned


def _recomputed(
    problem: Problem, forward: set[int], wanted: set[int], pinned: set[int], pointwise: Collection[int]
) -> set[int]:
    """Buffers on the backward's side of the minimum cut, which that nearest to the backward makes as few as can be."""
    flow = max_flow.SimpleMaxFlow()
    size = len(problem.buffers)
    source, sink = 2 * size, 2 * size + 1  # buffer b: its making is node b, its having is node size + b
    unlimited = 1 + sum(buffer.size for buffer in problem.buffers)
    held = set(problem.outputs)
    for b in forward:
        i = problem.writer[b]
        flow.add_arc_with_capacity(b, size + b, 0 if b in held else problem.buffers[b].size)
        if b in wanted:
            flow.add_arc_with_capacity(size + b, sink, unlimited)
        if i in pointwise and b not in pinned:
            for operand in problem.ops[i].reads:
                if operand in forward:
                    flow.add_arc_with_capacity(size + operand, b, unlimited)
        else:
            flow.add_arc_with_capacity(source, b, unlimited)
    flow.add_arc_with_capacity(source, sink, 0)  # both have an arc
    flow.solve(source, sink)
    return forward.intersection(flow.get_sink_side_min_cut())


def _with_runs(problem: Problem, sequence: Sequence[int], begin: int, again: Collection[int]) -> Iterator[int]:
    """The sequence, and before every reader of a forward copy in the backward the runs that make it anew."""
    yield from sequence[:begin]
    fresh = set[int]()  # what the sequence itself makes in the backward
    for i in sequence[begin:]:
        yield from _runs(problem, [b for b in problem.ops[i].reads if b in again and b not in fresh], again)
        yield i
        fresh.update(problem.ops[i].writes)


def _runs(problem: Problem, buffers: Sequence[int], again: Collection[int]) -> list[int]:
    """The ops that make the buffers and what they are made from, operands first."""
    runs: dict[int, None] = {}
    stack = [problem.writer[b] for b in reversed(buffers)]
    while stack:
        i = stack[-1]
        waiting = [w for b in problem.ops[i].reads if b in again and (w := problem.writer[b]) not in runs and w != i]
        if waiting and i not in runs:
            stack += waiting
        else:
            runs[stack.pop()] = None
    return list(runs)

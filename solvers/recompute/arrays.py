"""A Problem as flat arrays, the form that the compiled kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memplan.problem import Phase, Problem

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


# The graph is one table of integers, so that kernels hand on one array; its rows. Row i of relation X stands in
# X[X_ROW[i] : X_ROW[i + 1]].
READ_ROW, READS = 0, 1  # operands of each op
WRITE_ROW, WRITES = 2, 3  # results of each op
READER_ROW, READERS = 4, 5  # ops that read each buffer
AFTER_ROW, AFTER = 6, 7  # ops whose first run comes before each op's first run
BEFORE_ROW, BEFORE = 8, 9  # ... and after it
WRITER, SIZE = 10, 11  # per buffer: op that makes it (-1: resident), bytes
IS_OUTPUT = 12  # per buffer, 1: the newest copy is held to the end
IS_HELD = 13  # per buffer, 1: a forward output; the caller holds the copy in force when backward begins
MADE, WORKSPACE = 14, 15  # per op: bytes of all results, bytes of workspace
FORWARD, ONCE = 16, 17  # per op, 1 for those
GUARDS = 18  # per op, 1: moving it over the begin of backward matters: it makes a forward output or runs once
LOTTERY = 19  # buffers that may be recomputed, large ones more often
COUNT = 20  # OPS, BUFFERS, TICKETS: how many
OPS, BUFFERS, TICKETS = 0, 1, 2
FINAL_ROW, FINAL = 21, 22  # ops all of whose runs come before each op
UNTIL_ROW, UNTIL = 23, 24  # ops that come after each op's every run


class Graph(NamedTuple):
    """A problem for the kernels. Resident buffers cost nothing here: they are off every budget before the search."""

    table: Ints
    time: Floats  # per op


def pack(problem: Problem) -> Graph:
    """The arrays of a problem."""
    ops = problem.ops
    size = np.array([b.size for b in problem.buffers], np.int64)
    joint = any(op.phase != Phase.FORWARD for op in ops)
    held = [b for b in problem.forward_outputs if joint and problem.writer[b] >= 0]
    outputs = [b for b in problem.outputs if problem.writer[b] >= 0 and b not in set(held)]
    is_held, is_output = np.zeros(len(size), np.int64), np.zeros(len(size), np.int64)
    is_held[held], is_output[outputs] = 1, 1
    after = [tuple({*op.after, *op.after_all}) for op in ops]
    before, until = _followers(after), _followers([op.after_all for op in ops])
    makes_held = {problem.writer[b] for b in held}
    makes = [sum(problem.buffers[b].size for b in op.writes) for op in ops]
    guards = [i in makes_held or (op.once and op.phase == Phase.FORWARD) for i, op in enumerate(ops)]
    tickets = _lottery(problem, size)
    rows: list[Sequence[int] | Ints] = [
        *_rows(problem.operands),
        *_rows([op.writes for op in ops]),
        *_rows(problem.readers),
        *_rows(after),
        *_rows(before),
        problem.writer,
        size,
        is_output,
        is_held,
        makes,
        [op.workspace for op in ops],
        [op.phase == Phase.FORWARD for op in ops],
        [op.once for op in ops],
        guards,
        tickets,
        [len(ops), len(size), len(tickets)],
        *_rows([op.after_all for op in ops]),
        *_rows(until),
    ]
    table = np.zeros((len(rows), max(len(row) for row in rows)), np.int64)
    for at, row in enumerate(rows):
        table[at, : len(row)] = row
    return Graph(table, np.array([op.time for op in ops], np.float64))


def _lottery(problem: Problem, size: Ints) -> list[int]:
    """Buffers as often as the square root of their size asks, at most 64 times the rarest; none for tiny ones."""
    able = [b for b, w in enumerate(problem.writer) if w >= 0 and not problem.ops[w].once and problem.readers[b]]
    largest = max((int(size[b]) for b in able), default=0)
    tickets = [(b, int(np.sqrt(size[b] / largest) * 64)) for b in able] if largest else []
    return [b for b, count in tickets for _ in range(count)]


def _followers(after: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each op those that name it."""
    found: list[list[int]] = [[] for _ in after]
    for i, named in enumerate(after):
        for j in named:
            found[j].append(i)
    return found


def _rows(lists: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    return [0, *accumulate(len(x) for x in lists)], [v for x in lists for v in x]

"""A Problem with tiers as flat arrays, the form that the compiled kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memplan.problem import Phase, Problem

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Rows of the table of integers; row i of relation X stands in X[X_ROW[i] : X_ROW[i + 1]].
READ_ROW, READS = 0, 1  # buffers that each op reads: those that an op makes, and those with a home
CHANGED = 2  # parallel to READS, 1: the op changes the buffer in place
WRITE_ROW, WRITES = 3, 4  # results of each op
WRITER, SIZE, HOME = 5, 6, 7  # per buffer: op that makes it (-1: none), bytes, its home's tier (-1: none)
HELD = 8  # forward outputs that an op makes
KEPT = 9  # buffers held or at home when the step ends, HELD and GIVEN left out
WORKSPACE, FORWARD, ONCE = 10, 11, 12  # per op: bytes, and 1 for those
CAPACITY = 13  # per tier: bytes
UNTIL_FIRST = 14  # per op: the op before whose first run all its runs come (-1: none)
GIVEN = 15  # per buffer, 1: the caller holds it from where it is made
COUNT = 16  # the numbers named below
OPS, BUFFERS, TIERS, N_HELD, N_KEPT, WIDTH = 0, 1, 2, 3, 4, 5  # WIDTH: the most reads of an op


class Graph(NamedTuple):
    """A problem for the kernels. Resident buffers without a home cost nothing here: they are off every budget."""

    table: Ints
    time: Floats  # [0]: of each op; [1 + 2 j], [2 + 2 j]: of each buffer's copy to tier j, and back


def pack(problem: Problem) -> Graph:
    """The arrays of a problem."""
    ops, buffers, writer = problem.ops, problem.buffers, problem.writer
    names = [tier.name for tier in problem.tiers]
    reads = [[b for b in dict.fromkeys(op.reads) if writer[b] >= 0 or buffers[b].home] for op in ops]
    changed = [int(b in op.mutates) for op, of_op in zip(ops, reads, strict=True) for b in of_op]
    joint = any(op.phase != Phase.FORWARD for op in ops)
    held = [b for b in problem.forward_outputs if joint and writer[b] >= 0]
    elsewhere = {*held, *problem.given}
    kept = [b for b in problem.outputs if writer[b] >= 0 and b not in elsewhere] + list(problem.homed)
    rows: list[Sequence[int]] = [
        *_rows(reads),
        changed,
        *_rows([op.writes for op in ops]),
        writer,
        [buffer.size for buffer in buffers],
        [names.index(buffer.home) if buffer.home else -1 for buffer in buffers],
        held,
        kept,
        [op.workspace for op in ops],
        [op.phase == Phase.FORWARD for op in ops],
        [op.once for op in ops],
        [tier.capacity for tier in problem.tiers],
        [min((u for u, op in enumerate(ops) if i in op.after_all), default=-1) for i in range(len(ops))],
        [b in problem.given for b in range(len(buffers))],
        [len(ops), len(buffers), len(names), len(held), len(kept), max((len(r) for r in reads), default=0)],
    ]
    table = np.zeros((len(rows), max(len(row) for row in rows)), np.int64)
    for at, row in enumerate(rows):
        table[at, : len(row)] = row
    time = np.zeros((1 + 2 * len(names), max(1, len(ops), len(buffers))))
    time[0, : len(ops)] = [op.time for op in ops]
    for j, tier in enumerate(problem.tiers):
        time[1 + 2 * j, : len(buffers)] = [tier.latency + buffer.size / tier.write for buffer in buffers]
        time[2 + 2 * j, : len(buffers)] = [tier.latency + buffer.size / tier.read for buffer in buffers]
    return Graph(table, time)


def _rows(lists: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    return [0, *accumulate(len(x) for x in lists)], [v for x in lists for v in x]

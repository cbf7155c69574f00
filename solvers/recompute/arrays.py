"""A Problem as flat arrays, the form that the compiled kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memplan.problem import Phase, Problem

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Graph(NamedTuple):
    """Ops and the buffers that ops make, in compressed rows: row i of ``x`` is ``x[p[i]:p[i + 1]]``.

    Resident buffers stand nowhere: what they take is off every budget before the search starts.
    """

    read_row: Ints  # operands of each op
    reads: Ints
    write_row: Ints  # results of each op
    writes: Ints
    after_row: Ints  # ops whose first run comes first
    after: Ints
    writer: Ints  # op that makes each buffer, -1 for resident ones
    size: Ints  # bytes of each buffer
    outputs: Ints  # buffers whose newest copy is held to the end
    held: Ints  # forward outputs: the caller holds the copy in force when backward begins
    is_held: Ints  # per buffer, 1 for those
    time: Floats
    workspace: Ints
    forward: Ints  # 1 for ops of the forward phase
    once: Ints


def pack(problem: Problem) -> Graph:
    """The arrays of a problem."""
    ops = problem.ops
    joint = any(op.phase != Phase.FORWARD for op in ops)
    held = [b for b in problem.forward_outputs if joint and problem.writer[b] >= 0]
    outputs = [b for b in problem.outputs if problem.writer[b] >= 0 and b not in set(held)]
    is_held = np.zeros(len(problem.buffers), np.int64)
    is_held[held] = 1
    return Graph(
        *_rows(problem.operands),
        *_rows([op.writes for op in ops]),
        *_rows([op.after for op in ops]),
        np.array(problem.writer, np.int64),
        np.array([b.size for b in problem.buffers], np.int64),
        np.array(outputs, np.int64),
        np.array(held, np.int64),
        is_held,
        np.array([op.time for op in ops], np.float64),
        np.array([op.workspace for op in ops], np.int64),
        np.array([op.phase == Phase.FORWARD for op in ops], np.int64),
        np.array([op.once for op in ops], np.int64),
    )


def _rows(lists: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    row = np.zeros(len(lists) + 1, np.int64)
    row[1:] = np.cumsum([len(x) for x in lists])
    return row, np.array([v for x in lists for v in x], np.int64)

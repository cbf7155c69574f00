"""The order problem as plain arrays: runs to put in order, precedences between them, and bytes each one takes and frees.

Every run stands in the sequence exactly once. Runs are numbered in the given order, so the identity is a valid order
and every predecessor has a smaller number. A sequence with recomputation is the same problem: each repeat is a run of
its own that makes its own copies, and precedences keep every reader on the copy it had.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memplan.problem import Phase, Problem

BARRIER = -1  # the run of no op that stands between what must precede backward and the backward ops

Ints = NDArray[np.int64]


class Arrays(NamedTuple):
    """The model for compiled loops. Ragged lists are stored as (start, flat): item i is ``flat[start[i]:start[i + 1]]``."""

    size: Ints  # per buffer, bytes
    made: Ints  # per run, bytes live from its start on
    extra: Ints  # per run, bytes live only while it runs
    read_start: Ints
    reads: Ints  # per run, the buffers it reads
    pred_start: Ints
    preds: Ints
    succ_start: Ints
    succs: Ints


@dataclass(frozen=True)
class OrderModel:
    """Runs and the buffers that die before the end. A buffer is live from its writer to its last reader.

    ``op``: per run, the op of the problem, or BARRIER. ``made`` bytes are live from the run on, ``held`` of them to the
    end; ``extra`` bytes (workspace, results that nobody reads) only while it runs. ``base``: bytes live throughout.
    """

    op: tuple[int, ...]
    made: tuple[int, ...]
    held: tuple[int, ...]
    extra: tuple[int, ...]
    size: tuple[int, ...]
    writer: tuple[int, ...]
    readers: tuple[tuple[int, ...], ...]
    preds: tuple[tuple[int, ...], ...]
    base: int

    @property
    def n(self) -> int:
        return len(self.op)

    @cached_property
    def succs(self) -> tuple[tuple[int, ...], ...]:
        return _inverse(self.preds, self.n)

    @cached_property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        """Per run, the buffers it reads."""
        return _inverse(self.readers, self.n)

    @cached_property
    def writes(self) -> tuple[tuple[int, ...], ...]:
        """Per run, the buffers it makes."""
        return _inverse([(w,) for w in self.writer], self.n)

    @cached_property
    def arrays(self) -> Arrays:
        return Arrays(
            ints(self.size), ints(self.made), ints(self.extra), *ragged(self.reads), *ragged(self.preds),
            *ragged(self.succs),
        )  # fmt: skip

    def sequence(self, order: Iterable[int]) -> tuple[int, ...]:
        """The ops of the problem, in this order of the runs."""
        return tuple(self.op[v] for v in order if self.op[v] != BARRIER)

    def loads(self, order: Sequence[int]) -> list[int]:
        """Bytes held while each run of ``order`` runs, ``base`` included."""
        left = [len(r) for r in self.readers]
        live, loads = self.base, []
        for v in order:
            live += self.made[v]
            loads.append(live + self.extra[v])
            for b in self.reads[v]:
                left[b] -= 1
                if left[b] == 0:
                    live -= self.size[b]
        return loads

    def peak(self, order: Sequence[int]) -> int:
        return max(self.loads(order), default=self.base)


@dataclass
class _Copy:
    """A copy of a buffer while the model is being built."""

    size: int
    writer: int
    readers: list[int]
    held: bool = False


def build_model(problem: Problem, sequence: Sequence[int] | None = None) -> OrderModel:
    """The order problem of a valid sequence's runs; without a sequence, of every op once."""
    ops, buffers = problem.ops, problem.buffers
    runs = _with_barrier(problem, range(len(ops)) if sequence is None else sequence)
    barrier = runs.index(BARRIER) if BARRIER in runs else None
    forward_outputs = frozenset(problem.forward_outputs)
    newest: dict[int, _Copy] = {}
    copies: list[_Copy] = []
    first_run: dict[int, int] = {}
    last_run: dict[int, int] = {}
    all_runs: defaultdict[int, list[int]] = defaultdict(list)
    preds: list[set[int]] = []
    for v, i in enumerate(runs):
        before: set[int] = set()
        preds.append(before)
        if i == BARRIER:
            before.update(last_run[j] for j in last_run if ops[j].once)
            for b in forward_outputs & newest.keys():
                newest[b].held = True
                before.add(newest[b].writer)
            continue
        op = ops[i]
        if barrier is not None and op.phase != Phase.FORWARD:
            before.add(barrier)
        if i in last_run:
            before.add(last_run[i])
        else:
            before.update(first_run[j] for j in op.after)
            before.update(v for j in op.after_all for v in all_runs[j])
            first_run[i] = v
        last_run[i] = v
        all_runs[i].append(v)
        for b in problem.operands[i]:
            newest[b].readers.append(v)
            before.add(newest[b].writer)
        for b in op.writes:
            if b in newest:  # readers of the older copy stay before this run
                before.update(newest[b].readers)
                if barrier is not None and v > barrier and b in forward_outputs:
                    before.add(barrier + 1)  # the first backward run: the copy in force before it stays the same
            newest[b] = _Copy(buffers[b].size, v, [])
            copies.append(newest[b])
        before.discard(v)
    for b in problem.outputs:
        if b in newest and (barrier is None or b not in forward_outputs):
            newest[b].held = True
    return _reduced(problem, runs, copies, preds)


def _with_barrier(problem: Problem, sequence: Sequence[int]) -> list[int]:
    """The sequence with a BARRIER before its first backward or optimizer op, if forward ops precede that."""
    runs = list(sequence)
    for v, i in enumerate(runs):
        if problem.ops[i].phase != Phase.FORWARD:
            return [*runs[:v], BARRIER, *runs[v:]] if v > 0 else runs
    return runs


def _reduced(problem: Problem, runs: list[int], copies: list[_Copy], preds: list[set[int]]) -> OrderModel:
    """Sum up copies that live and die together; fold what is never read into its run."""
    made, held, extra = [0] * len(runs), [0] * len(runs), [0] * len(runs)
    for v, i in enumerate(runs):
        extra[v] = 0 if i == BARRIER else problem.ops[i].workspace
    together: dict[tuple[int, tuple[int, ...]], int] = {}
    for copy in copies:
        if copy.held:
            made[copy.writer] += copy.size
            held[copy.writer] += copy.size
        elif not copy.readers:
            extra[copy.writer] += copy.size
        elif copy.size:
            made[copy.writer] += copy.size
            key = (copy.writer, tuple(copy.readers))
            together[key] = together.get(key, 0) + copy.size
    return OrderModel(
        op=tuple(runs),
        made=tuple(made),
        held=tuple(held),
        extra=tuple(extra),
        size=tuple(together.values()),
        writer=tuple(w for w, _ in together),
        readers=tuple(r for _, r in together),
        preds=tuple(tuple(sorted(p)) for p in preds),
        base=problem.resident_bytes,
    )


def _inverse(lists: Sequence[Sequence[int]], n: int) -> tuple[tuple[int, ...], ...]:
    """For each of n items, the lists that name it."""
    found: list[list[int]] = [[] for _ in range(n)]
    for i, items in enumerate(lists):
        for item in items:
            found[item].append(i)
    return tuple(tuple(f) for f in found)


def ints(values: Iterable[int]) -> Ints:
    return np.array(tuple(values), dtype=np.int64)


def ragged(lists: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """(start, flat): item i of the lists is ``flat[start[i]:start[i + 1]]``."""
    start = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(items) for items in lists], out=start[1:])
    return start, ints(item for items in lists for item in items)

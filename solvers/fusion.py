"""Which runs of a sequence become one fused region: by bytes and launches saved, such that the peak never rises.

A region is legal when contracting it leaves an order: everything it reads is made before its place in the sequence,
everything that reads it comes after. Regions grow by merging pairs, the pair that saves most first, in rounds until none
saves; each merge is checked against the exact load at every position that it changes. Greedy merging under a convexity
test is the method of XLA's and Inductor's fusion; the peak constraint on every merge is ours.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

MAX_RUNS = 96  # runs in one region: beyond, a C++ compile takes minutes and a GPU kernel runs out of registers
MAX_OPERANDS = 64  # distinct buffers in and out of one region: each is a pointer argument of the kernel
_ROUNDS = 8  # merges open further ones; on the zoo no more than 5 rounds ever found any


@dataclass(frozen=True)
class Run:
    """One run of one op. Buffers are copies: a recomputation writes buffers of its own, each has one writer."""

    name: str
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    after: tuple[int, ...] = ()  # runs that must stay before this one, beyond what reads imply
    domain: int = -1  # runs of one domain (phase, device) may share a region; -1: never fused
    workspace: int = 0  # bytes


@dataclass(frozen=True)
class FusionProblem:
    """Runs in execution order. Buffers that no run writes are held throughout."""

    runs: tuple[Run, ...]
    sizes: tuple[int, ...]  # bytes of each buffer
    kept: frozenset[int] = frozenset()  # buffers held to the end
    launch_bytes: int = 0  # bytes that could be moved in the time a launch costs: what each merge saves besides

    @cached_property
    def writer(self) -> dict[int, int]:
        return {b: i for i, run in enumerate(self.runs) for b in run.writes}

    @cached_property
    def readers(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, list[int]] = defaultdict(list)
        for i, run in enumerate(self.runs):
            for b in dict.fromkeys(run.reads):
                found[b].append(i)
        return {b: tuple(r) for b, r in found.items()}


@dataclass(frozen=True)
class FusionPlan:
    """``units``: runs in the new execution order; a tuple of several is one region, in an order that runs.

    ``loads``: bytes held while each unit runs. ``moved_before`` / ``moved_after``: bytes that fusible runs read and write.
    """

    units: tuple[tuple[int, ...], ...]
    loads: tuple[int, ...]
    peak_before: int
    peak_after: int
    moved_before: int
    moved_after: int

    @property
    def regions(self) -> tuple[tuple[int, ...], ...]:
        return tuple(u for u in self.units if len(u) > 1)


def solve_fusion(problem: FusionProblem, limit: int | None = None, caps: Mapping[int, int] | None = None) -> FusionPlan:
    """Choose regions such that no load rises above ``limit`` bytes, and none that is above it rises at all.

    ``limit``: None for the peak of the sequence as given. ``caps``: for single runs, the most runs that
    their region may hold (a larger one was found to need too much workspace). Deterministic.
    """
    state = _Units(problem, limit, caps or {})
    before, moved = state.peak, state.moved_bytes()
    for _ in range(_ROUNDS):
        if not _merge_round(problem, state):
            break
    return FusionPlan(state.units(), state.loads(), before, state.peak, moved, state.moved_bytes())


def _merge_round(problem: FusionProblem, state: _Units) -> bool:
    """Try every pair that shares a buffer, best saving first; a merged unit's pairs are tried again next round."""
    heap: list[tuple[int, int, int]] = []
    for a, b in _pairs(problem, state):
        saving = state.saving(a, b)
        if saving > 0:
            heapq.heappush(heap, (-saving, a, b))
    merged = False
    while heap:
        value, a, b = heapq.heappop(heap)
        a, b = state.root(a), state.root(b)
        if a == b:
            continue
        saving = state.saving(a, b)
        if saving < -value:
            if saving > 0:
                heapq.heappush(heap, (-saving, a, b))
        elif state.try_merge(a, b):
            merged = True
    return merged


def _pairs(problem: FusionProblem, state: _Units) -> Iterable[tuple[int, int]]:
    """Units that share a buffer: its writer and each reader, and readers next to each other."""
    seen = set()
    for buffer, readers in problem.readers.items():
        made = [problem.writer[buffer]] if buffer in problem.writer else []
        units = sorted({state.root(i) for i in (*made, *readers) if problem.runs[i].domain >= 0})
        chain = [(units[0], u) for u in units[1:]] + list(pairwise(units[1:]))
        for pair in chain:
            if pair not in seen:
                seen.add(pair)
                yield pair


class _Units:
    """The sequence under construction: each run belongs to a unit, each unit stands in one slot of the sequence."""

    def __init__(self, problem: FusionProblem, limit: int | None, caps: Mapping[int, int]) -> None:
        self.problem = problem
        count = len(problem.runs)
        self.cap = [min(MAX_RUNS, caps.get(i, MAX_RUNS)) for i in range(count)]
        self.parent = list(range(count))
        self.slot = list(range(count))  # of a unit's root
        self.members: dict[int, list[int]] = {i: [i] for i in range(count)}
        self.inputs = {i: {b for b in run.reads} for i, run in enumerate(problem.runs)}
        self.made = {i: set(run.writes) for i, run in enumerate(problem.runs)}
        self.waits = {i: set(run.after) for i, run in enumerate(problem.runs)}
        self.awaited: dict[int, set[int]] = defaultdict(set)
        for i, run in enumerate(problem.runs):
            for j in run.after:
                self.awaited[j].add(i)
        self.workspace = [run.workspace for run in problem.runs]
        resident = sum(size for b, size in enumerate(problem.sizes) if b not in problem.writer)
        self.load = np.full(count + 1, resident, dtype=np.int64)
        for b in problem.writer:
            start, end = self._interval(b, {})
            self.load[start:end] += problem.sizes[b]
        self.load[:count] += np.array(self.workspace, dtype=np.int64)
        self.limit = self.peak if limit is None else limit

    @property
    def peak(self) -> int:
        return int(self.load.max())

    def root(self, run: int) -> int:
        while self.parent[run] != run:
            self.parent[run] = self.parent[self.parent[run]]
            run = self.parent[run]
        return run

    def units(self) -> tuple[tuple[int, ...], ...]:
        roots = sorted(self.members, key=lambda u: self.slot[u])
        return tuple(tuple(sorted(self.members[u])) for u in roots)

    def loads(self) -> tuple[int, ...]:
        return tuple(int(self.load[place]) for place in sorted(self.slot[u] for u in self.members))

    def moved_bytes(self) -> int:
        """Bytes that fusible units read and write."""
        fusible = [u for u in self.members if self.problem.runs[u].domain >= 0]
        sizes = self.problem.sizes
        return sum(sum(sizes[b] for b in self._operands(u)) + sum(sizes[b] for b in self._results(u)) for u in fusible)

    def saving(self, a: int, b: int) -> int:
        """Bytes no longer moved when the two are one, a launch included; 0 where they may not be one."""
        runs = self.problem.runs
        if a == b or runs[a].domain < 0 or runs[a].domain != runs[b].domain:
            return 0
        sizes = self.problem.sizes
        shared = (self.inputs[a] & self.inputs[b]) - self.made[a] - self.made[b]
        saved = sum(sizes[x] for x in shared)
        for x in (self.made[a] & self.inputs[b]) | (self.made[b] & self.inputs[a]):
            saved += sizes[x]  # no longer read
            if x not in self.problem.kept and {self.root(r) for r in self.problem.readers[x]} <= {a, b}:
                saved += sizes[x]  # no longer written
        return saved + self.problem.launch_bytes

    def try_merge(self, a: int, b: int) -> bool:
        """Merge two units if a legal place keeps the load within the limit."""
        if len(self.members[a]) + len(self.members[b]) > min(self.cap[a], self.cap[b]):
            return False
        inputs, made = self.inputs[a] | self.inputs[b], self.made[a] | self.made[b]
        if len(inputs | made) > MAX_OPERANDS + len(inputs & made):
            return False
        first, last = self._window(a, b, inputs, made)
        for place in sorted({self.slot[a], self.slot[b]}):
            if first < place < last and self._fits(a, b, place, inputs | made):
                self._merge(a, b, place)
                return True
        return False

    def _window(self, a: int, b: int, inputs: set[int], made: set[int]) -> tuple[int, int]:
        """The open interval of slots between the last producer and the first consumer of the two together."""
        both = {a, b}
        writer, readers = self.problem.writer, self.problem.readers
        producers = {self.root(writer[x]) for x in inputs if x in writer}
        producers |= {self.root(i) for i in self.waits[a] | self.waits[b]}
        consumers = {self.root(r) for x in made for r in readers.get(x, ())}
        consumers |= {self.root(i) for u in both for i in self.awaited[u]}
        first = max((self.slot[u] for u in producers - both), default=-1)
        last = min((self.slot[u] for u in consumers - both), default=len(self.slot))
        return first, last

    def _interval(self, buffer: int, moved: dict[int, int]) -> tuple[int, int]:
        """Slots [start, end) that hold the buffer when the units in ``moved`` stand at the places given there."""
        unit = self.root(self.problem.writer[buffer])
        start = moved.get(unit, self.slot[unit])
        if buffer in self.problem.kept:
            return start, len(self.slot) + 1
        last = start
        inside = True
        for reader in self.problem.readers.get(buffer, ()):
            user = self.root(reader)
            place = moved.get(user, self.slot[user])
            last = max(last, place)
            inside = inside and place == start
        fused = len(self.members[unit]) > 1 or unit in moved
        return (start, start) if fused and inside else (start, last + 1)  # a region never makes its inner buffers

    def _fits(self, a: int, b: int, place: int, touched: set[int]) -> bool:
        """Whether the load stays within the limit; if so, it is brought up to date."""
        change = np.zeros_like(self.load)
        moved = {a: place, b: place}
        for x in touched:
            if x in self.problem.writer:
                size = self.problem.sizes[x]
                start, end = self._interval(x, {})
                change[start:end] -= size
                start, end = self._interval(x, moved)
                change[start:end] += size
        for unit in (a, b):
            change[self.slot[unit]] -= self.workspace[unit]
        change[place] += max(self.workspace[a], self.workspace[b])
        load = self.load + change
        if ((load > self.limit) & (change > 0)).any():
            return False
        self.load = load
        return True

    def _merge(self, a: int, b: int, place: int) -> None:
        self.parent[b] = a
        self.slot[a] = place
        self.members[a] += self.members.pop(b)
        self.cap[a] = min(self.cap[a], self.cap[b])
        self.workspace[a] = max(self.workspace[a], self.workspace[b])
        self.made[a] |= self.made.pop(b)
        self.inputs[a] |= self.inputs.pop(b)
        self.waits[a] |= self.waits.pop(b)
        self.awaited[a] |= self.awaited.pop(b, set())

    def _operands(self, unit: int) -> set[int]:
        return self.inputs[unit] - self.made[unit]

    def _results(self, unit: int) -> set[int]:
        """What a unit writes: a region only what is kept or read outside, a plain run all its results."""
        if len(self.members[unit]) == 1:
            return self.made[unit]
        readers = self.problem.readers
        return {
            b
            for b in self.made[unit]
            if b in self.problem.kept or any(self.root(r) != unit for r in readers.get(b, ()))
        }

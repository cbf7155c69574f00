"""What a sequence holds at every position: links from reads to copies, useless runs, loads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from memplan.solvers.recompute.arrays import Graph, Ints
from numba import njit

VALID, BROKEN = 1, 0


class State(NamedTuple):
    """A sequence and what follows from it. Read slot ``row[t] + k`` is the k-th operand of the run at position t."""

    seq: Ints  # op at each position
    row: Ints  # first read slot of each position
    source: Ints  # per read slot: position of the run whose copy is read
    previous: Ints  # per read slot: the last use of that copy before, its making included
    load: Ints  # bytes at each position
    runs: Ints  # per op: how many runs it has
    newest: Ints  # per op: scratch, position of its newest run
    used: Ints  # per buffer: scratch, last use of its newest copy
    mark: Ints  # per position: scratch
    scalar: Ints  # length, bytes over the budget summed over positions, peak


def new_state(graph: Graph, capacity: int) -> State:
    """An empty state for at most ``capacity`` runs."""
    n = len(graph.time)
    widest = int(np.max(np.diff(graph.read_row), initial=0))
    slots = min(capacity * max(1, widest), 8 * (len(graph.reads) + n) + capacity)

    def ints(length: int) -> Ints:
        return np.zeros(length, np.int64)

    return State(
        ints(capacity + 1),
        ints(capacity + 2),
        ints(slots + 1),
        ints(slots + 1),
        ints(capacity + 2),
        ints(n),
        ints(n),
        ints(len(graph.size)),
        ints(capacity + 1),
        ints(3),
    )


@njit(cache=True)
def link(g, s, length):
    """Find for every read the run it reads from; BROKEN when the sequence breaks a rule of the problem."""
    n = len(g.time)
    for i in range(n):
        s.runs[i] = 0
        s.newest[i] = -1
    for t in range(length):
        s.mark[t] = 0
    backward = False
    slot = 0
    for t in range(length):
        i = s.seq[t]
        if g.forward[i] == 0 and not backward:
            backward = True
            for b in g.held:
                if s.newest[g.writer[b]] < 0:
                    return BROKEN
                s.mark[s.newest[g.writer[b]]] = 1
        if g.once[i] == 1 and (s.runs[i] > 0 or (backward and g.forward[i] == 1)):
            return BROKEN
        if s.runs[i] == 0:
            for k in range(g.after_row[i], g.after_row[i + 1]):
                if s.runs[g.after[k]] == 0:
                    return BROKEN
        s.row[t] = slot
        if slot + g.read_row[i + 1] - g.read_row[i] >= len(s.source):
            return BROKEN
        for k in range(g.read_row[i], g.read_row[i + 1]):
            made = s.newest[g.writer[g.reads[k]]]
            if made < 0:
                return BROKEN
            s.source[slot] = made
            slot += 1
        s.runs[i] += 1
        s.newest[i] = t
    s.row[length] = slot
    for i in range(n):
        if s.runs[i] == 0:
            return BROKEN
    for b in g.outputs:
        s.mark[s.newest[g.writer[b]]] = 1
    return VALID


@njit(cache=True)
def trim(g, s, length):
    """Drop, from the end, repeated runs that nothing reads; returns the new length. Needs fresh links and marks."""
    dropped = 0
    for t in range(length - 1, -1, -1):
        i = s.seq[t]
        if s.mark[t] == 0 and s.runs[i] > 1:
            s.runs[i] -= 1
            s.mark[t] = -1
            dropped += 1
            continue
        for slot in range(s.row[t], s.row[t + 1]):
            s.mark[s.source[slot]] = 1
    if dropped == 0:
        return length
    kept = 0
    for t in range(length):
        if s.mark[t] >= 0:
            s.seq[kept] = s.seq[t]
            kept += 1
    return kept


@njit(cache=True)
def weigh(g, s, length, budget):
    """Loads, peak and bytes over the budget of a linked sequence; returns its time. O(reads + length)."""
    load = s.load
    for t in range(length + 1):
        load[t] = 0
    began = length  # position at which backward begins
    total = 0.0
    for t in range(length):
        i = s.seq[t]
        if g.forward[i] == 0 and began == length:
            began = t
            for b in g.held:
                load[s.used[b] + 1] += g.size[b]
                load[length] -= g.size[b]
        for k in range(g.read_row[i], g.read_row[i + 1]):
            b = g.reads[k]
            slot = s.row[t] + k - g.read_row[i]
            if g.is_held[b] == 1 and began < length and s.source[slot] < began:
                s.previous[slot] = t  # the caller's copy: never idle, already counted
                continue
            s.previous[slot] = s.used[b]
            load[s.used[b] + 1] += g.size[b]
            load[t + 1] -= g.size[b]
            s.used[b] = t
        for k in range(g.write_row[i], g.write_row[i + 1]):
            b = g.writes[k]
            load[t] += g.size[b]
            load[t + 1] -= g.size[b]
            s.used[b] = t
        load[t] += g.workspace[i]
        load[t + 1] -= g.workspace[i]
        total += g.time[i]
    for b in g.outputs:
        load[s.used[b] + 1] += g.size[b]
        load[length] -= g.size[b]
    over = 0
    peak = 0
    held = 0
    for t in range(length):
        held += load[t]
        load[t] = held
        peak = max(peak, held)
        if held > budget:
            over += held - budget
    s.scalar[0] = length
    s.scalar[1] = over
    s.scalar[2] = peak
    return total

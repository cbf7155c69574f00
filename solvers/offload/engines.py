"""What a sequence with offloads costs: every copy's gaps between uses, the loads, and the engines' timeline.

A *gap* lies between two uses of a copy that follow each other. The *slot* of the later use says what happens over it:
the copy stays, or goes to a tier. Everything is computed anew from the sequence and its slots, in one pass over the
uses and one over the positions: some 5 ns a gap.
"""

from __future__ import annotations

import numpy as np

from memplan.solvers.compiled import compiled
from memplan.solvers.offload.arrays import (
    BUFFERS,
    CAPACITY,
    CHANGED,
    COUNT,
    FORWARD,
    GIVEN,
    HELD,
    HOME,
    KEPT,
    N_HELD,
    N_KEPT,
    READ_ROW,
    READS,
    SIZE,
    TIERS,
    WIDTH,
    WORKSPACE,
    WRITE_ROW,
    WRITES,
    Floats,
    Graph,
    Ints,
)

NONE = -1
AT_HOME = -2

# A slot's rows. Run r's k-th read has slot r * WIDTH + k; buffers kept to the end have theirs behind those of all runs.
TIER = 0  # NONE: the copy stays
FROM, RELEASE = 1, 2  # positions after the first free one: the copy-out starts, its end is waited for
AHEAD = 3  # positions before the use at which the copy-in starts

# The view's rows: what an evaluation finds. Per gap:
BUFFER, MADE, USE, NEXT_USE, SLOT, AWAY = 0, 1, 2, 3, 4, 5  # AWAY: the tier, NONE: the copy stays
OUT_FROM, OUT_UNTIL, IN_FROM, SENT = 6, 7, 8, 9  # SENT: gap that copied the contents out; itself, an earlier, AT_HOME
UNTIL = 10  # of a gap that copied out: until when its tier holds the contents
AFTER_OUT, AFTER_FREE, AFTER_IN, AFTER_WAIT = 11, 12, 13, 14  # chains of the lists below
OLDER = 15  # the gap before of the same buffer
# ... per position: the first gap whose copy-out starts, is waited for, whose copy-in starts, is waited for.
STARTS_OUT, ENDS_OUT, STARTS_IN, ENDS_IN = 16, 17, 18, 19
CHANGE, LOAD = 20, 21  # bytes that come minus bytes that go; bytes held
# ... per buffer: its last use, where its copy was made, whether the caller holds that, its newest gap.
LAST, NEWEST, PINNED, GAP = 22, 23, 24, 25
FIRST = 26  # per op: position of its first run
NUMBERS = 27  # GAPS: how many; OVER: bytes over budget and capacities, summed over positions; CRAMMED: the latter alone
ROWS = 28  # then per tier two rows: per buffer, the gap that copied it there; per position, how its bytes change
GAPS, OVER, CRAMMED = 0, 1, 2
# The view's rows of times.
CLOCK, OUT_END, IN_END, FREE = 0, 1, 2, 3  # per position: when its run starts; per gap; per engine


def new_slots(g: Graph, capacity: int) -> Ints:
    """Slots for ``capacity`` runs, every copy staying."""
    slots = np.zeros((4, capacity * g.table[COUNT, WIDTH] + g.table[COUNT, BUFFERS]), np.int64)
    slots[TIER] = NONE
    return slots


def new_view(g: Graph, capacity: int) -> tuple[Ints, Floats]:
    """Room for what an evaluation finds."""
    width = max(capacity * g.table[COUNT, WIDTH] + g.table[COUNT, BUFFERS], capacity + 2, g.table.shape[1])
    return np.zeros((ROWS + 2 * g.table[COUNT, TIERS], width), np.int64), np.zeros((4, width))


@compiled
def evaluate(g, runs, ops, length, slots, budget, v, t):
    """The time of a sequence with its slots, in ``v`` and ``t`` the rest. ``runs``: run ids in order, ``ops``: of each
    run id; ``budget``: bytes beyond the resident ones."""
    find_gaps(g.table, runs, ops, length, slots, v)
    link_gaps(g.table, length, v)
    return replay(g.table, g.time, runs, ops, length, budget, v, t)


@compiled
def find_gaps(g, runs, ops, length, slots, v):
    """List all gaps, and how the bytes on the device and on the tiers change."""
    tiers, buffers, width = g[COUNT, TIERS], g[COUNT, BUFFERS], g[COUNT, WIDTH]
    v[CHANGE, : length + 3] = 0
    v[NUMBERS, GAPS] = 0
    v[PINNED, :buffers] = 0
    v[GAP, :buffers] = NONE
    v[FIRST, : g[COUNT, 0]] = NONE
    for b in range(buffers):
        v[LAST, b] = v[NEWEST, b] = NONE
        for j in range(tiers):
            v[ROWS + 2 * j, b] = AT_HOME if g[HOME, b] == j else NONE
    for j in range(tiers):
        v[ROWS + 2 * j + 1, : length + 2] = 0
    began = False
    for p in range(length):
        i = ops[runs[p]]
        if v[FIRST, i] == NONE:
            v[FIRST, i] = p
        if not began and g[FORWARD, i] == 0:
            began = True
            for k in range(g[COUNT, N_HELD]):
                b = g[HELD, k]
                v[PINNED, b] = 1
                v[CHANGE, v[LAST, b] + 1] += g[SIZE, b]
                v[CHANGE, length + 1] -= g[SIZE, b]
        for k in range(g[READ_ROW, i], g[READ_ROW, i + 1]):
            b = g[READS, k]
            close(g, slots, v, b, p, runs[p] * width + k - g[READ_ROW, i], length)
            v[LAST, b] = p
            if g[CHANGED, k] == 1:
                for j in range(tiers):
                    v[ROWS + 2 * j, b] = NONE
        for k in range(g[WRITE_ROW, i], g[WRITE_ROW, i + 1]):
            b = g[WRITES, k]
            v[LAST, b] = v[NEWEST, b] = p
            v[PINNED, b] = g[GIVEN, b]
            v[CHANGE, p] += g[SIZE, b]
            v[CHANGE, length + 1 if g[GIVEN, b] == 1 else p + 1] -= g[SIZE, b]
            for j in range(tiers):
                v[ROWS + 2 * j, b] = NONE
    behind = slots.shape[1] - buffers
    for k in range(g[COUNT, N_KEPT]):
        close(g, slots, v, g[KEPT, k], length, behind + g[KEPT, k], length)


@compiled
def close(g, slots, v, b, p, slot, length):
    """Add the gap of buffer b that its use at position p ends, decided by ``slot``."""
    if v[PINNED, b] == 1:
        return
    u, size, home = v[LAST, b], g[SIZE, b], g[HOME, b]
    for_good = home >= 0 and p == length
    forced = for_good or (home >= 0 and u == NONE)
    v[CHANGE, u + 1] += size
    v[CHANGE, p + 1] -= size
    if p - u < 2 and not forced:
        return
    n = v[NUMBERS, GAPS]
    v[NUMBERS, GAPS] = n + 1
    v[BUFFER, n], v[MADE, n], v[USE, n], v[NEXT_USE, n], v[SLOT, n] = b, v[NEWEST, b], u, p, slot
    v[OLDER, n] = v[GAP, b]
    v[GAP, b] = n
    j = home if forced else slots[TIER, slot]
    v[AWAY, n] = NONE
    if j == NONE:
        return
    sent = v[ROWS + 2 * j, b]
    out_from = out_until = u + 1
    if sent == NONE:
        out_until = min(u + 1 + max(0, slots[RELEASE, slot]), p)
        out_from = min(u + 1 + max(0, slots[FROM, slot]), out_until)
    back = p if for_good else min(max(p - slots[AHEAD, slot], out_until), p)
    if back == out_until and not forced:
        return
    v[AWAY, n], v[OUT_FROM, n], v[OUT_UNTIL, n], v[IN_FROM, n] = j, out_from, out_until, back
    v[CHANGE, out_until] -= size
    v[CHANGE, length + 1 if for_good else back] += size
    bytes_there = ROWS + 2 * j + 1
    if sent == NONE:
        v[SENT, n], v[ROWS + 2 * j, b] = n, n
        v[UNTIL, n] = p
        if j != home:
            v[bytes_there, out_from] += size
            v[bytes_there, p] -= size
    else:
        v[SENT, n] = sent
        if sent >= 0 and j != home:
            v[bytes_there, v[UNTIL, sent]] += size
            v[bytes_there, p] -= size
            v[UNTIL, sent] = p


@compiled
def link_gaps(g, length, v):
    """Sort the copies into the lists of the positions where they start and are waited for."""
    for row in range(STARTS_OUT, ENDS_IN + 1):
        v[row, : length + 1] = NONE
    for n in range(v[NUMBERS, GAPS] - 1, -1, -1):  # in descending order of the next use
        if v[AWAY, n] == NONE:
            continue
        if v[SENT, n] == n:
            until = v[OUT_UNTIL, n]
            v[AFTER_FREE, n] = v[ENDS_OUT, until]
            v[ENDS_OUT, until] = n
            before, after = NONE, v[STARTS_OUT, v[OUT_FROM, n]]
            while after != NONE and v[OUT_UNTIL, after] < until:
                before, after = after, v[AFTER_OUT, after]
            v[AFTER_OUT, n] = after
            if before == NONE:
                v[STARTS_OUT, v[OUT_FROM, n]] = n
            else:
                v[AFTER_OUT, before] = n
        if not (g[HOME, v[BUFFER, n]] >= 0 and v[NEXT_USE, n] == length):
            v[AFTER_IN, n] = v[STARTS_IN, v[IN_FROM, n]]
            v[STARTS_IN, v[IN_FROM, n]] = n
            v[AFTER_WAIT, n] = v[ENDS_IN, v[NEXT_USE, n]]
            v[ENDS_IN, v[NEXT_USE, n]] = n


@compiled
def replay(g, duration, runs, ops, length, budget, v, t):
    """Replay the step: loads, what is over the budget and the capacities, when every run starts; returns its time."""
    tiers = g[COUNT, TIERS]
    t[FREE, : 2 * tiers] = 0.0
    clock, held, over = 0.0, 0, 0
    for p in range(length + 1):
        n = v[STARTS_OUT, p]
        while n != NONE:
            j, b = v[AWAY, n], v[BUFFER, n]
            t[OUT_END, n] = t[FREE, 2 * j] = max(clock, t[FREE, 2 * j]) + duration[1 + 2 * j, b]
            n = v[AFTER_OUT, n]
        n = v[ENDS_OUT, p]
        while n != NONE:
            clock = max(clock, t[OUT_END, n])
            n = v[AFTER_FREE, n]
        n = v[STARTS_IN, p]
        while n != NONE:
            j, b = v[AWAY, n], v[BUFFER, n]
            start = max(clock, t[FREE, 2 * j + 1])
            if v[SENT, n] >= 0:
                start = max(start, t[OUT_END, v[SENT, n]])
            t[IN_END, n] = t[FREE, 2 * j + 1] = start + duration[2 + 2 * j, b]
            n = v[AFTER_IN, n]
        n = v[ENDS_IN, p]
        while n != NONE:
            clock = max(clock, t[IN_END, n])
            n = v[AFTER_WAIT, n]
        t[CLOCK, p] = clock
        held += v[CHANGE, p]
        v[LOAD, p] = held
        if p < length:
            v[LOAD, p] += g[WORKSPACE, ops[runs[p]]]
            clock += duration[0, ops[runs[p]]]
        over += max(0, v[LOAD, p] - budget)
    crammed = 0
    for j in range(tiers):
        held = 0
        for b in range(g[COUNT, BUFFERS]):
            if g[HOME, b] == j:
                held += g[SIZE, b]
        for p in range(length + 1):
            held += v[ROWS + 2 * j + 1, p]
            crammed += max(0, held - g[CAPACITY, j])
    v[NUMBERS, OVER], v[NUMBERS, CRAMMED] = over + crammed, crammed
    return clock

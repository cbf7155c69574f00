"""A sequence of runs, the loads it makes, and edits of it that are weighed (``weigh``) before they are kept.

A run stands at a *key*: its position times SPACING. Runs that an edit inserts before position q get the keys just
below ``(q << BITS)``, so that an edit renumbers nothing until it is kept. Every op has its runs in a linked list in
order of keys; a copy's live interval follows from the lists of its writer and its readers.
"""

from __future__ import annotations

import numpy as np

from memplan.solvers.compiled import compiled
from memplan.solvers.recompute.arrays import (
    BUFFERS,
    COUNT,
    FORWARD,
    IS_HELD,
    IS_OUTPUT,
    READ_ROW,
    READER_ROW,
    READERS,
    READS,
    SIZE,
    WORKSPACE,
    WRITE_ROW,
    WRITER,
    WRITES,
    Graph,
    Ints,
)

BITS = 10
SPACING = 1 << BITS  # an edit inserts fewer runs than this
NONE = -1

# The state is one table of integers, so that kernels hand on one array; its rows:
N = 0  # the numbers named below
RUN, LOAD = 1, 2  # per position: run id, bytes
OP, KEY, NEXT, PREV, GONE = 3, 4, 5, 6, 7  # per run id; NEXT, PREV: the op's other runs; GONE: the edit removes it
FREE = 8  # stack of run ids
FIRST, RUNS = 9, 10  # per op: its first run, how many
INSERTED, REMOVED, TOUCHED = 11, 12, 13  # lists of the edit: run ids, run ids, buffers whose intervals may change
STAMP = 14  # per buffer: the last edit that touched it
CHANGE, FRESH = 15, 16  # per position of the edited sequence: bytes that begin minus bytes that ended; load
SPARE = 17  # scratch
ROWS = 18
# The numbers: of the sequence (CAPACITY: most runs; OVER: bytes over the budget, summed over positions; BORDER: where backward begins) ...
LENGTH, OVER, N_FREE, BORDER, BUDGET, CAPACITY = 0, 1, 2, 3, 4, 15
# ... and of the edit at hand (LOW, HIGH: the positions it changes; BEGIN: the key at which backward begins after it).
AT, N_INSERTED, N_REMOVED, N_TOUCHED, EDIT, LOW, HIGH, BEGIN, NEW_OVER, BROKEN = 5, 6, 7, 8, 9, 10, 11, 12, 13, 14


def new_state(graph: Graph, capacity: int) -> Ints:
    """An empty state for at most ``capacity`` runs."""
    state = np.zeros((ROWS, max(capacity + 3 * SPACING, graph.table.shape[1])), np.int64)
    state[N, CAPACITY] = capacity
    return state


@compiled
def attach(s, run):
    """Put a run into its op's list, in order of keys."""
    i = s[OP, run]
    before, after = NONE, s[FIRST, i]
    while after != NONE and s[KEY, after] < s[KEY, run]:
        before, after = after, s[NEXT, after]
    s[PREV, run], s[NEXT, run] = before, after
    if before == NONE:
        s[FIRST, i] = run
    else:
        s[NEXT, before] = run
    if after != NONE:
        s[PREV, after] = run
    s[RUNS, i] += 1


@compiled
def detach(s, run):
    """Take a run out of its op's list."""
    before, after = s[PREV, run], s[NEXT, run]
    if before == NONE:
        s[FIRST, s[OP, run]] = after
    else:
        s[NEXT, before] = after
    if after != NONE:
        s[PREV, after] = before
    s[RUNS, s[OP, run]] -= 1


@compiled
def place(s, key):
    """Position of a key in the sequence with the edit's inserted runs, removed ones still counted."""
    wall = s[N, AT] << BITS
    if key >= wall:
        return (key >> BITS) + s[N, N_INSERTED]
    if key >= wall - s[N, N_INSERTED]:
        return s[N, AT] + key - (wall - s[N, N_INSERTED])
    return key >> BITS


@compiled
def spans(g, s, b, sign):
    """Add the live intervals of all copies of a buffer to ``change``; marks the edit BROKEN where a copy is missing."""
    size = g[SIZE, b] * sign
    run = s[FIRST, g[WRITER, b]]
    if run == NONE or (g[IS_HELD, b] == 1 and s[KEY, run] > s[N, BEGIN]):
        s[N, BROKEN] = 1
        return
    end_of_all = s[N, LENGTH] + s[N, N_INSERTED]
    for j in range(g[READER_ROW, b], g[READER_ROW, b + 1]):
        reader = s[FIRST, g[READERS, j]]
        if reader != NONE and s[KEY, reader] < s[KEY, run]:
            s[N, BROKEN] = 1
            return
    if size == 0:
        return
    while run != NONE:
        made = s[KEY, run]
        after = s[NEXT, run]
        until = s[KEY, after] if after != NONE else (end_of_all << BITS)
        last = made
        if (g[IS_OUTPUT, b] == 1 and after == NONE) or (g[IS_HELD, b] == 1 and made < s[N, BEGIN] <= until):
            stop = end_of_all
        else:
            for j in range(g[READER_ROW, b], g[READER_ROW, b + 1]):
                reader = s[FIRST, g[READERS, j]]
                while reader != NONE and s[KEY, reader] < until:
                    last = max(last, s[KEY, reader])
                    reader = s[NEXT, reader]
            stop = place(s, last) + 1
        start = place(s, made)
        s[CHANGE, start] += size
        s[CHANGE, stop] -= size
        s[N, LOW] = min(s[N, LOW], start)
        s[N, HIGH] = max(s[N, HIGH], stop)
        run = after


@compiled
def reset(g, duration, s, sequence, length, budget):
    """Make a valid sequence the state under a budget of bytes beyond the resident ones; returns its time."""
    s[N, LENGTH], s[N, AT], s[N, N_INSERTED], s[N, BUDGET] = length, length, 0, budget
    s[N, BORDER] = length
    s[N, LOW] = s[N, HIGH] = s[N, BROKEN] = 0
    s[FIRST, :] = NONE
    s[RUNS, :] = 0
    time = 0.0
    for t in range(length - 1, -1, -1):
        s[RUN, t] = t
        s[OP, t] = sequence[t]
        s[KEY, t] = t << BITS
        s[GONE, t] = 0
        attach(s, t)
        time += duration[sequence[t]]
        if g[FORWARD, sequence[t]] == 0:
            s[N, BORDER] = t
    s[N, BEGIN] = s[N, BORDER] << BITS
    s[N, N_FREE] = 0
    for run in range(s.shape[1] - 1, length - 1, -1):
        s[GONE, run] = 0
        s[FREE, s[N, N_FREE]] = run
        s[N, N_FREE] += 1
    s[CHANGE, :] = 0
    for b in range(g[COUNT, BUFFERS]):
        if g[WRITER, b] != NONE:
            spans(g, s, b, 1)
    s[N, OVER] = 0
    held = 0
    for t in range(length):
        held += s[CHANGE, t]
        s[LOAD, t] = held + g[WORKSPACE, sequence[t]]
        s[N, OVER] += max(0, s[LOAD, t] - budget)
    s[CHANGE, :] = 0
    return time


@compiled
def touch(g, s, i):
    """Take the intervals of all buffers of op i out of the edited sequence, before its list changes."""
    for k in range(g[READ_ROW, i], g[READ_ROW, i + 1]):
        _touch_buffer(g, s, g[READS, k])
    for k in range(g[WRITE_ROW, i], g[WRITE_ROW, i + 1]):
        _touch_buffer(g, s, g[WRITES, k])


@compiled
def _touch_buffer(g, s, b):
    if s[STAMP, b] == s[N, EDIT]:
        return
    s[STAMP, b] = s[N, EDIT]
    s[TOUCHED, s[N, N_TOUCHED]] = b
    s[N, N_TOUCHED] += 1
    spans(g, s, b, -1)


@compiled
def begin(s, at, inserted):
    """Start an edit that inserts ``inserted`` runs before position ``at`` (below the length)."""
    s[N, AT], s[N, N_INSERTED] = at, inserted
    s[N, N_REMOVED] = s[N, N_TOUCHED] = s[N, BROKEN] = 0
    s[N, EDIT] += 1
    s[N, LOW], s[N, HIGH] = at, at + inserted
    s[N, BEGIN] = s[N, BORDER] << BITS


@compiled
def insert(g, s, k, i):
    """Insert a run of op i as the k-th of the edit. Call in order after ``begin``, after removals."""
    touch(g, s, i)
    s[N, N_FREE] -= 1
    run = s[FREE, s[N, N_FREE]]
    s[OP, run] = i
    s[KEY, run] = (s[N, AT] << BITS) - s[N, N_INSERTED] + k
    s[GONE, run] = 0
    s[INSERTED, k] = run
    attach(s, run)


@compiled
def remove(g, s, run):
    """Remove a run."""
    touch(g, s, s[OP, run])
    detach(s, run)
    s[GONE, run] = 1
    s[REMOVED, s[N, N_REMOVED]] = run
    s[N, N_REMOVED] += 1
    at = place(s, s[KEY, run])
    s[N, LOW], s[N, HIGH] = min(s[N, LOW], at), max(s[N, HIGH], at + 1)


@compiled
def useless(g, s, run):
    """Whether nothing reads any copy that a repeated run makes."""
    made, after = s[KEY, run], s[NEXT, run]
    until = s[KEY, after] if after != NONE else ((s[N, LENGTH] + 1) << BITS)
    for k in range(g[WRITE_ROW, s[OP, run]], g[WRITE_ROW, s[OP, run] + 1]):
        b = g[WRITES, k]
        if (g[IS_OUTPUT, b] == 1 and after == NONE) or (g[IS_HELD, b] == 1 and made < s[N, BEGIN] <= until):
            return False
        for j in range(g[READER_ROW, b], g[READER_ROW, b + 1]):
            reader = s[FIRST, g[READERS, j]]
            while reader != NONE and s[KEY, reader] < until:
                if s[KEY, reader] > made:
                    return False
                reader = s[NEXT, reader]
    return True


@compiled
def sweep_useless(g, s):
    """Remove repeated runs that the edit left unread, and those that only they had read."""
    k = 0
    while k < s[N, N_TOUCHED]:  # removing a run touches its operands, which lengthens the list
        i = g[WRITER, s[TOUCHED, k]]
        run = s[FIRST, i]
        while run != NONE and s[RUNS, i] > 1:
            after = s[NEXT, run]
            if useless(g, s, run):
                remove(g, s, run)
            run = after
        k += 1


@compiled
def undo(s):
    """Give the edit up."""
    for k in range(s[N, N_REMOVED] - 1, -1, -1):
        run = s[REMOVED, k]
        s[GONE, run] = 0
        attach(s, run)
    for k in range(s[N, N_INSERTED]):
        run = s[INSERTED, k]
        detach(s, run)
        s[FREE, s[N, N_FREE]] = run
        s[N, N_FREE] += 1


@compiled
def keep(s):
    """Make the edited sequence the sequence."""
    inserted, length = s[N, N_INSERTED], s[N, LENGTH]
    low, high = s[N, LOW], min(s[N, HIGH], length + inserted)
    to = low
    for v in range(low, length + inserted):
        if s[N, AT] <= v < s[N, AT] + inserted:
            run = s[INSERTED, v - s[N, AT]]
        else:
            run = s[RUN, v if v < s[N, AT] else v - inserted]
            if v >= high and s[N, N_REMOVED] == inserted:
                break  # from here on nothing moved
        if s[GONE, run] == 0:
            s[SPARE, to] = run
            s[FRESH, to] = s[FRESH, v] if v < high else s[LOAD, v - inserted]
            to += 1
    border = s[N, BORDER]
    begin_key = s[N, BEGIN]
    for t in range(low, to):
        run = s[SPARE, t]
        if s[KEY, run] == begin_key:
            border = t
        s[RUN, t] = run
        s[LOAD, t] = s[FRESH, t]
    for t in range(low, to):
        s[KEY, s[RUN, t]] = t << BITS
    s[N, LENGTH] = length + inserted - s[N, N_REMOVED]
    s[N, BORDER] = border if begin_key < (length << BITS) else s[N, LENGTH]
    s[N, OVER] = s[N, NEW_OVER]
    for k in range(s[N, N_REMOVED]):
        run = s[REMOVED, k]
        s[GONE, run] = 0
        s[FREE, s[N, N_FREE]] = run
        s[N, N_FREE] += 1

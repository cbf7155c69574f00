"""Sequences that keep a budget by eviction: what is missing is made again, what is in the way is let go.

First runs stand in a given order. Before a run that does not fit, the held buffer with the least score goes: cost of
making it again over its bytes and the distance to its next use. Dynamic tensor rematerialization (Kirisame et al., ICLR
2021, section 3) with the future known, as Belady's rule has it. In milliseconds it comes as low as annealing does in
tens of seconds; how fast its sequences are is left to what follows.

An output, such as a weight's gradient, is needed at the end: it too may go and be made again there. Of several missing
operands the one whose making needs most memory comes first (Sethi and Ullman, JACM 1970).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from memplan.solvers.compiled import compiled
from memplan.solvers.recompute.arrays import (
    BUFFERS,
    COUNT,
    FORWARD,
    IS_HELD,
    IS_OUTPUT,
    ONCE,
    OPS,
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


class Rule(NamedTuple):
    """Exponents of the score cost^a / (bytes^b · distance^c); ``below``: share of the cost of what was made from a buffer
    and is gone, which making it again would need. ``reach``: what may go, FORWARDS (results of the forward), ANY but
    outputs, or ALL. ``hungry``: 1 where the missing operand that needs most memory is made first, and where waiting ops
    may lose operands if nothing else can go; 0: the first one, and they may not."""

    cost: float
    size: float
    distance: float
    below: float
    reach: float
    hungry: float


# The first comes lowest on most graphs; each of the others does so on one of the public or captured ones.
SCORES = (
    (0.5, 1.0, 1.0, 0.0),
    (0.5, 1.0, 0.5, 1.0),
    (1.0, 1.0, 1.0, 1.0),
    (1.0, 0.5, 0.5, 0.0),
    (0.5, 0.5, 1.0, 0.0),
)
FORWARDS, ANY, ALL = 0, 1, 2
RULES = tuple(
    Rule(*score, reach, hungry) for reach, hungry in product((ANY, FORWARDS, ALL), (0, 1)) for score in SCORES
)
LONGEST = 4  # sequences with so many runs an op are given up: a budget that is too small recomputes without end
NEVER = 1e18
TIGHT = 1 << 40  # locks on the operands of what runs, and on outputs at the end; fewer: of what waits
IMPOSSIBLE = 1e30


# Rows of the scratch table of integers (per buffer but RAN, per op, and STACK, of ops).
HERE, LOCKED, RAN, STACK, POSITION = 0, 1, 2, 3, 4
TWICE = 5  # per buffer, 1: a second copy stands beside the one that the caller holds, counted from then on
WORK, BEGAN = 6, 7  # one entry each: how often all buffers were looked at; 1 once backward began
# ... and of numbers, per buffer: when it is needed next; time to make it again; time of what is gone and made from it.
NEXT, COST, BELOW = 0, 1, 2
WANTED = 3  # when something made from it is needed next, gone or not
NEED = 4  # bytes that are there at once while it is made again
# Entries of a rule in the compiled loops.
TO_COST, TO_SIZE, TO_DISTANCE, SHARE_BELOW, REACH, HUNGRY = 0, 1, 2, 3, 4, 5


@compiled
def _look_ahead(g, duration, order, w, x):
    """Fill ``x``: next uses, costs and needs of all buffers as things stand."""
    n = g[COUNT, OPS]
    w[WORK, 0] += 1
    for b in range(g[COUNT, BUFFERS]):
        x[NEXT, b] = n if g[IS_OUTPUT, b] == 1 else NEVER
        x[COST, b] = x[BELOW, b] = 0.0
        if g[WRITER, b] >= 0:
            for j in range(g[READER_ROW, b], g[READER_ROW, b + 1]):
                if w[RAN, g[READERS, j]] == 0:
                    x[NEXT, b] = min(x[NEXT, b], w[POSITION, g[READERS, j]])
        x[WANTED, b] = x[NEXT, b]
    for at in range(n - 1, -1, -1):  # what is gone and needed again needs what it is made from
        i = order[at]
        if w[RAN, i] == 0 or g[ONCE, i] == 1:
            continue
        when, lost, wanted = NEVER, 0.0, NEVER
        for k in range(g[WRITE_ROW, i], g[WRITE_ROW, i + 1]):
            b = g[WRITES, k]
            wanted = min(wanted, x[WANTED, b])
            if w[HERE, b] == 0 and x[NEXT, b] < NEVER:
                when = min(when, x[NEXT, b])
                lost += x[BELOW, b]
        for k in range(g[READ_ROW, i], g[READ_ROW, i + 1]):
            b = g[READS, k]
            x[WANTED, b] = min(x[WANTED, b], wanted)
            if when < NEVER:
                x[NEXT, b] = min(x[NEXT, b], when)
                x[BELOW, b] += lost + duration[i]
    for at in range(n):
        i = order[at]
        if w[RAN, i] == 1:
            cost = IMPOSSIBLE if g[ONCE, i] == 1 else duration[i]
            need, together = 0.0, float(g[WORKSPACE, i])
            for k in range(g[READ_ROW, i], g[READ_ROW, i + 1]):
                if w[HERE, g[READS, k]] == 0:
                    cost += x[COST, g[READS, k]]
                    need = max(need, x[NEED, g[READS, k]])
                    together += g[SIZE, g[READS, k]]
            for k in range(g[WRITE_ROW, i], g[WRITE_ROW, i + 1]):
                together += g[SIZE, g[WRITES, k]]
            for k in range(g[WRITE_ROW, i], g[WRITE_ROW, i + 1]):
                x[COST, g[WRITES, k]] = min(cost, IMPOSSIBLE)
                x[NEED, g[WRITES, k]] = max(need, together)


@compiled
def _victim(g, rule, w, x, now, running, locks):
    """The held buffer that may go at the least score, of those with at most ``locks`` locks; -1 where there is none."""
    best, least = -1, np.inf
    for b in range(g[COUNT, BUFFERS]):
        if w[HERE, b] == 0 or w[LOCKED, b] > locks or g[SIZE, b] == 0 or g[WRITER, b] == running:
            continue
        if g[IS_HELD, b] == 1 or (g[IS_OUTPUT, b] == 1 and rule[REACH] < ALL):
            continue
        if x[NEXT, b] >= NEVER and (g[ONCE, g[WRITER, b]] == 0 or x[WANTED, b] >= NEVER):
            return b
        if x[COST, b] >= IMPOSSIBLE or (rule[REACH] == FORWARDS and g[FORWARD, g[WRITER, b]] == 0):
            continue
        cost = (x[COST, b] + rule[SHARE_BELOW] * x[BELOW, b]) ** rule[TO_COST]
        score = cost / (g[SIZE, b] ** rule[TO_SIZE] * max(1.0, x[NEXT, b] - now) ** rule[TO_DISTANCE])
        if score < least:
            best, least = b, score
    return best


@compiled
def _growth(g, w, b):
    """Bytes that come to stand when b is made now."""
    if w[HERE, b] == 1 and (g[IS_HELD, b] == 0 or w[BEGAN, 0] == 0 or w[TWICE, b] == 1):
        return 0
    return g[SIZE, b]


@compiled
def _make_room(g, duration, order, rule, w, x, now, i, held, room):
    """Let buffers go until op i can run; bytes held then, -1 where nothing more may go."""
    if g[FORWARD, i] == 0:
        w[BEGAN, 0] = 1
    need = g[WORKSPACE, i]
    for k in range(g[WRITE_ROW, i], g[WRITE_ROW, i + 1]):
        need += _growth(g, w, g[WRITES, k])
    if held + need > room:
        _look_ahead(g, duration, order, w, x)
    while held + need > room:
        b = _victim(g, rule, w, x, now, i, 0)
        if b < 0 and rule[HUNGRY] == 1:
            _lock(g, w, i, TIGHT)
            b = _victim(g, rule, w, x, now, i, TIGHT - 1)
            _lock(g, w, i, -TIGHT)
        if b < 0:
            return -1
        w[HERE, b] = 0
        held -= g[SIZE, b]
    return held


@compiled
def _lock(g, w, i, by):
    for k in range(g[READ_ROW, i], g[READ_ROW, i + 1]):
        w[LOCKED, g[READS, k]] += by


@compiled
def _missing(g, rule, w, x, i):
    """The operand of op i that is to be made next; -1 where all are there."""
    best, most = -1, -1.0
    for k in range(g[READ_ROW, i], g[READ_ROW, i + 1]):
        b = g[READS, k]
        if w[HERE, b] == 0:
            need = max(0.0, x[NEED, b] - g[SIZE, b]) if rule[HUNGRY] == 1 else 0.0
            if need > most:
                best, most = b, need
    return best


@compiled
def _run(g, duration, order, rule, room, w, x, sequence, now, goal, held, length):
    """Append op ``goal`` and before it what must be made again for it; bytes held then, -1 where there is no way on, and
    the length of the sequence."""
    w[STACK, 0] = goal
    _lock(g, w, goal, 1)
    depth = 1
    while depth > 0:  # an op waits on the stack until its operands have been made again
        i = w[STACK, depth - 1]
        missing = _missing(g, rule, w, x, i)
        if missing >= 0:
            if g[ONCE, g[WRITER, missing]] == 1 or depth == g[COUNT, OPS]:
                return -1, length
            w[STACK, depth] = g[WRITER, missing]
            _lock(g, w, g[WRITER, missing], 1)
            depth += 1
            continue
        held = _make_room(g, duration, order, rule, w, x, now, i, held, room)
        if held < 0 or length == len(sequence):
            return -1, length
        depth -= 1
        _lock(g, w, i, -1)
        sequence[length] = i
        length += 1
        w[RAN, i] = 1
        for k in range(g[WRITE_ROW, i], g[WRITE_ROW, i + 1]):
            b = g[WRITES, k]
            growth = _growth(g, w, b)
            held += growth
            if w[HERE, b] == 1 and growth > 0:
                w[TWICE, b] = 1
            w[HERE, b] = 1
    return held, length


@compiled
def _evicting(g, duration, order, rule, room, w, x, sequence):
    """Fill ``sequence`` with runs that hold at most ``room`` bytes; how many, or -1 where there is no way on."""
    n, held, length = g[COUNT, OPS], 0, 0
    for now in range(n):
        held, length = _run(g, duration, order, rule, room, w, x, sequence, now, order[now], held, length)
        if held < 0:
            return -1
    for b in range(g[COUNT, BUFFERS]):
        w[LOCKED, b] += TIGHT * g[IS_OUTPUT, b]
    for b in range(g[COUNT, BUFFERS] - 1, -1, -1):  # what was made last needs what is still there
        if g[IS_OUTPUT, b] == 1 and g[WRITER, b] >= 0 and w[HERE, b] == 0:
            held, length = _run(g, duration, order, rule, room, w, x, sequence, n, g[WRITER, b], held, length)
            if held < 0:
                return -1
    return length


def evicting(graph: Graph, order: Sequence[int], room: int, rule: Rule) -> tuple[tuple[int, ...] | None, int]:
    """A sequence with first runs in ``order`` that holds at most ``room`` bytes beyond the resident ones, None where the
    rule finds none; and the work done: how many ops were looked at."""
    n, buffers = len(graph.time), int(graph.table[COUNT, BUFFERS])
    first = np.array(order, np.int64)
    w = np.zeros((8, max(buffers, n, 1)), np.int64)
    w[POSITION, first] = np.arange(n)
    sequence: Ints = np.zeros(LONGEST * n, np.int64)
    x = np.zeros((5, max(1, buffers)))
    length = _evicting(graph.table, graph.time, first, np.array(rule, np.float64), room, w, x, sequence)
    work = n * (1 + int(w[WORK, 0]))
    return (None if length < 0 else tuple(int(i) for i in sequence[:length])), work

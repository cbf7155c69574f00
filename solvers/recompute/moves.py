"""Moves of the sequence search: recompute before a reader with its chain, drop runs, shift runs."""

from __future__ import annotations

from memplan.solvers.compiled import compiled
from memplan.solvers.lehmer import draw, unit
from memplan.solvers.recompute.arrays import (
    COUNT,
    IS_HELD,
    IS_OUTPUT,
    LOTTERY,
    ONCE,
    OPS,
    READ_ROW,
    READER_ROW,
    READERS,
    READS,
    SIZE,
    TICKETS,
    WRITE_ROW,
    WRITER,
    WRITES,
)
from memplan.solvers.recompute.state import (
    BITS,
    BUDGET,
    CAPACITY,
    FIRST,
    GONE,
    KEY,
    LENGTH,
    LOAD,
    NEXT,
    NONE,
    OP,
    OVER,
    PREV,
    RUN,
    RUNS,
    N,
    begin,
    insert,
    remove,
)

# Rows of the moves' scratch table.
CHOSEN, SEEN = 0, 1  # ops of the chain at hand; per op: the last chain that chose it
CHAIN, FOUND = 2, 3  # one entry: the chain at hand; what ``look`` found
FAR = 30  # the farthest that a run is moved with what stands in its way
TRIES = 12  # draws in search of an idle buffer over one position
CHAIN_BITS = 9  # one move inserts below 2^9 runs; the bound is drawn, as long chains are rarely wanted and costly


@compiled
def look(g, s, b, key, w):
    """The copy of b in force just before ``key``: w[FOUND] = (run, last use before key, next use from key on or NONE)."""
    run = s[FIRST, g[WRITER, b]]
    w[FOUND, 0] = w[FOUND, 1] = w[FOUND, 2] = NONE
    if run == NONE or s[KEY, run] >= key:
        return
    while s[NEXT, run] != NONE and s[KEY, s[NEXT, run]] < key:
        run = s[NEXT, run]
    made = s[KEY, run]
    until = s[KEY, s[NEXT, run]] if s[NEXT, run] != NONE else ((s[N, LENGTH] + 1) << BITS)
    before, after = made, until + 1
    for j in range(g[READER_ROW, b], g[READER_ROW, b + 1]):
        reader = s[FIRST, g[READERS, j]]
        while reader != NONE and s[KEY, reader] <= until:
            at = s[KEY, reader]
            if made < at < key:
                before = max(before, at)
            elif at >= key:
                after = min(after, at)
            reader = s[NEXT, reader]
    w[FOUND, 0], w[FOUND, 1] = run, before
    if after <= until:
        w[FOUND, 2] = after
    if (g[IS_OUTPUT, b] == 1 and s[NEXT, run] == NONE) or (g[IS_HELD, b] == 1):
        w[FOUND, 2] = key  # held on in any case


@compiled
def over_position(s, random):
    """A position over the budget, or any where none is."""
    length = s[N, LENGTH]
    start = draw(random, length)
    if s[N, OVER] > 0:
        for t in range(start, length):
            if s[LOAD, t] > s[N, BUDGET]:
                return t
        for t in range(start):
            if s[LOAD, t] > s[N, BUDGET]:
                return t
    return start


@compiled
def overload(s, size, start, stop):
    """How much the bytes over the budget grow when ``size`` more are held in positions [start, stop)."""
    more = 0
    budget = s[N, BUDGET]
    for t in range(start, stop):
        more += max(0, s[LOAD, t] + size - budget) - max(0, s[LOAD, t] - budget)
    return more


@compiled
def pick_idle(g, duration, s, w, at, random):
    """A buffer that lies idle over position ``at``, its next use in ``w[FOUND, 2]``; NONE when no draw finds one.

    Of two found the one with more bytes per time of its op is likelier.
    """
    best, best_key, best_next = NONE, 0.0, NONE
    hits = 0
    for _ in range(TRIES):
        b = g[LOTTERY, draw(random, g[COUNT, TICKETS])]
        look(g, s, b, (at << BITS) + 1, w)
        if w[FOUND, 0] == NONE or w[FOUND, 1] == (at << BITS) or w[FOUND, 2] <= (at << BITS) + 1:
            continue
        hits += 1
        key = g[SIZE, b] / (1.0 + duration[g[WRITER, b]]) * unit(random)
        if key > best_key:
            best, best_key, best_next = b, key, w[FOUND, 2]
        if hits == 2:
            break
    w[FOUND, 2] = best_next
    return best


@compiled
def gather_chain(g, duration, s, w, i, at, price, random):
    """List in ``w[CHOSEN]`` op i and the absent operands to run again with it before ``at``; returns how many.

    An absent operand is either held on from its last use (priced by the overload that makes) or made again (priced by
    its time, blurred by a random factor).
    """
    w[CHAIN, 0] += 1
    mark = w[CHAIN, 0]
    w[CHOSEN, 0] = i
    w[SEEN, i] = mark
    count, done = 1, 0
    longest = 1 << draw(random, CHAIN_BITS)
    blur = 4.0 * unit(random)
    while done < count < longest:
        i = w[CHOSEN, done]
        done += 1
        for k in range(g[READ_ROW, i], g[READ_ROW, i + 1]):
            b = g[READS, k]
            j = g[WRITER, b]
            if w[SEEN, j] == mark or g[ONCE, j] == 1:
                continue
            look(g, s, b, (at << BITS), w)
            if w[FOUND, 0] == NONE or w[FOUND, 2] != NONE:
                continue
            hold = price * overload(s, g[SIZE, b], (w[FOUND, 1] >> BITS) + 1, at)
            if duration[j] * blur * (0.25 + unit(random)) < hold:
                w[SEEN, j] = mark
                w[CHOSEN, count] = j
                count += 1
                if count == longest:
                    break
    for k in range(1, count):  # stored order is a valid order of the chain
        i = w[CHOSEN, k]
        j = k - 1
        while j >= 0 and w[CHOSEN, j] > i:
            w[CHOSEN, j + 1] = w[CHOSEN, j]
            j -= 1
        w[CHOSEN, j + 1] = i
    return count


@compiled
def recompute(g, duration, s, w, price, random):
    """Edit: run an idle buffer's op again, with what it lacks, before its next use. False when nothing was found."""
    if g[COUNT, TICKETS] == 0:
        return False
    b = pick_idle(g, duration, s, w, over_position(s, random), random)
    if b == NONE:
        return False
    at = w[FOUND, 2] >> BITS
    if draw(random, 8) == 0:
        look(g, s, b, w[FOUND, 2], w)
        at -= draw(random, max(1, at - (w[FOUND, 1] >> BITS)))
    count = gather_chain(g, duration, s, w, g[WRITER, b], at, price, random)
    if s[N, LENGTH] + count > s[N, CAPACITY]:
        return False
    begin(s, at, count)
    for k in range(count):
        insert(g, s, k, w[CHOSEN, k])
    return True


@compiled
def drop(g, s, random):
    """Edit: remove a run of a repeated op, at times with the repeated runs next to it. False when there is none."""
    length = s[N, LENGTH]
    if length == g[COUNT, OPS]:
        return False
    at = draw(random, length)
    while s[RUNS, s[OP, s[RUN, at]]] < 2:
        at = at + 1 if at + 1 < length else 0
    begin(s, 0, 0)
    width = 1 if draw(random, 3) > 0 else 1 + draw(random, 8)
    while width > 0 and at < length:
        run = s[RUN, at]
        if s[RUNS, s[OP, run]] < 2:
            break
        if s[GONE, run] == 0:
            remove(g, s, run)
        at += 1
        width -= 1
    return True


@compiled
def shift(g, s, w, random):
    """Edit: move a run, or a short block, to another place between what it reads and what reads it."""
    length = s[N, LENGTH]
    start = draw(random, length)
    width = 1 if draw(random, 3) > 0 else min(1 + draw(random, 8), length - start)
    low, high = 0, length - 1
    if draw(random, 4) > 0:  # keep all readers on their copies
        for t in range(start, start + width):
            low, high = neighbours(g, s, w, s[RUN, t], start, start + width, low, high)
    if draw(random, 2) == 0:
        reach = 1 + draw(random, 16)
        low, high = max(low, start - reach), min(high, start + width + reach)
    if high < low:
        return False
    to = low + draw(random, high - low + 1)
    if start <= to <= start + width:
        return False
    begin(s, to, width)
    for t in range(start, start + width):
        remove(g, s, s[RUN, t])
    for k in range(width):
        insert(g, s, k, s[OP, s[RUN, start + k]])
    return True


@compiled
def drag(g, s, w, random):
    """Edit: move a run some places and with it what stands in its way: its readers, or what it reads."""
    length = s[N, LENGTH]
    start = draw(random, length)
    far = 1 + draw(random, FAR)
    if draw(random, 2) == 0:
        to = min(length - 1, start + far + 1)
        count = _readers_before(g, s, w, start, to)
    else:
        to = max(0, start - far)
        count = _makers_from(g, s, w, start, to)
    if count == 0 or to == start or to == start + 1:
        return False
    begin(s, to, count)
    for k in range(count):
        remove(g, s, s[RUN, w[CHOSEN, k]])
    for k in range(count):
        insert(g, s, k, s[OP, s[RUN, w[CHOSEN, k]]])
    return True


@compiled
def _readers_before(g, s, w, start, to):
    """List in ``w[CHOSEN]``, ascending, position ``start`` and those before ``to`` that need its results."""
    w[CHAIN, 0] += 1
    mark = w[CHAIN, 0]
    w[CHOSEN, 0] = start
    w[SEEN, s[OP, s[RUN, start]]] = mark
    count = 1
    for t in range(start + 1, to):
        i = s[OP, s[RUN, t]]
        w[SEEN, i] = 0  # from here on its newest copy is this one
        for k in range(g[READ_ROW, i], g[READ_ROW, i + 1]):
            if w[SEEN, g[WRITER, g[READS, k]]] == mark:
                w[SEEN, i] = mark
                w[CHOSEN, count] = t
                count += 1
                break
    return count


@compiled
def _makers_from(g, s, w, start, to):
    """List in ``w[CHOSEN]``, ascending, position ``start`` and those from ``to`` on whose results it needs."""
    w[CHAIN, 0] += 1
    mark = w[CHAIN, 0]
    count = 0
    w[SEEN, s[OP, s[RUN, start]]] = mark
    for t in range(start, to - 1, -1):
        i = s[OP, s[RUN, t]]
        if w[SEEN, i] != mark:
            continue
        w[SEEN, i] = 0  # an older copy is not read
        w[CHOSEN, count] = t
        count += 1
        for k in range(g[READ_ROW, i], g[READ_ROW, i + 1]):
            w[SEEN, g[WRITER, g[READS, k]]] = mark
    for k in range(count // 2):
        w[CHOSEN, k], w[CHOSEN, count - 1 - k] = w[CHOSEN, count - 1 - k], w[CHOSEN, k]
    return count


@compiled
def neighbours(g, s, w, run, start, stop, low, high):
    """Narrow [low, high], the positions before which a run may stand, by what it reads and what reads it.

    Runs in [start, stop) move along and do not count.
    """
    i, key = s[OP, run], s[KEY, run]
    for k in range(g[READ_ROW, i], g[READ_ROW, i + 1]):
        look(g, s, g[READS, k], key, w)
        made = s[KEY, w[FOUND, 0]] >> BITS
        if made < start:
            low = max(low, made + 1)
    if s[PREV, run] != NONE:
        low = max(low, (s[KEY, s[PREV, run]] >> BITS) + 1)
    if s[NEXT, run] != NONE:
        high = min(high, s[KEY, s[NEXT, run]] >> BITS)
    for k in range(g[WRITE_ROW, i], g[WRITE_ROW, i + 1]):
        b = g[WRITES, k]
        for j in range(g[READER_ROW, b], g[READER_ROW, b + 1]):
            reader = s[FIRST, g[READERS, j]]
            while reader != NONE:
                t = s[KEY, reader] >> BITS
                if s[KEY, reader] > key and t >= stop:
                    high = min(high, t)
                    break
                reader = s[NEXT, reader]
    return low, high

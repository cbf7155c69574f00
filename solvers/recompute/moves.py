"""Moves of the sequence search: recompute before a reader with its chain, drop a run, shift a run or a block."""

from __future__ import annotations

from numba import njit

NONE = -1


@njit(cache=True)
def draw(random, below):
    """A whole number in [0, below); Lehmer's generator, whose products stay under 2^47 in any integer type."""
    random[0] = random[0] * 48271 % 2147483647
    return random[0] % below


@njit(cache=True)
def unit(random):
    """A number in (0, 1)."""
    random[0] = random[0] * 48271 % 2147483647
    return random[0] / 2147483647.0


@njit(cache=True)
def overload_of(s, size, start, stop, budget):
    """How much the bytes over the budget grow when ``size`` more are held in positions [start, stop)."""
    more = 0
    for t in range(start, stop):
        room = budget - s.load[t]
        if room < size:
            more += size - max(0, room)
    return more


@njit(cache=True)
def pick_gap(g, s, budget, random):
    """A read slot whose copy lies idle before it, and its position; over an overloaded position where there is one."""
    length = s.scalar[0]
    at = draw(random, length)
    if s.scalar[1] > 0:
        seen = 0
        for t in range(length):
            if s.load[t] > budget:
                seen += 1
                if draw(random, seen) == 0:
                    at = t
    best = NONE
    best_t = NONE
    best_key = 0.0
    for t in range(at + 1, length):
        i = s.seq[t]
        for slot in range(s.row[t], s.row[t + 1]):
            if s.previous[slot] < at:
                b = g.reads[g.read_row[i] + slot - s.row[t]]
                if g.size[b] > 0 and g.once[g.writer[b]] == 0:
                    key = g.size[b] * unit(random) / (1.0 + g.time[g.writer[b]])
                    if key > best_key:
                        best_key, best, best_t = key, slot, t
    return best, best_t


@njit(cache=True)
def chain(g, s, slot, at, weight, budget, random, work):
    """Mark in ``work.chosen`` the ops to run again just before position ``at`` so that read ``slot`` has a fresh copy.

    Each absent operand is either held on from its last use (priced by the overload it makes) or made again (priced by
    its time), both blurred by a random factor. Returns how many ops were chosen.
    """
    for i in range(len(g.time)):
        work.chosen[i] = 0
    for b in range(len(g.size)):
        work.last[b] = -1
        work.alive[b] = 0
    for t in range(at):
        i = s.seq[t]
        for k in range(g.read_row[i], g.read_row[i + 1]):
            work.last[g.reads[k]] = t
        for k in range(g.write_row[i], g.write_row[i + 1]):
            work.last[g.writes[k]] = t
    for t in range(at, s.scalar[0]):
        i = s.seq[t]
        for j in range(s.row[t], s.row[t + 1]):
            if s.source[j] < at:
                work.alive[g.reads[g.read_row[i] + j - s.row[t]]] = 1
    b = g.reads[g.read_row[s.seq[at]] + slot - s.row[at]]
    first = g.writer[b]
    work.chosen[first] = 1
    work.stack[0] = first
    depth = 1
    count = 1
    blur = 4.0 * unit(random)
    while depth > 0:
        depth -= 1
        i = work.stack[depth]
        for k in range(g.read_row[i], g.read_row[i + 1]):
            b = g.reads[k]
            j = g.writer[b]
            if work.chosen[j] == 1 or work.alive[b] == 1 or g.once[j] == 1 or work.last[b] < 0:
                continue
            hold = weight * overload_of(s, g.size[b], work.last[b] + 1, at, budget)
            if g.time[j] * blur * (0.25 + unit(random)) < hold:
                work.chosen[j] = 1
                work.stack[depth] = j
                depth += 1
                count += 1
    return count


@njit(cache=True)
def insert_chain(g, s, c, at, count, work):
    """Write into ``c`` the sequence of ``s`` with the chosen ops, in stored order, before position ``at``."""
    length = s.scalar[0]
    if length + count > len(c.seq) - 1:
        return 0
    for t in range(at):
        c.seq[t] = s.seq[t]
    to = at
    for i in range(len(g.time)):
        if work.chosen[i] == 1:
            c.seq[to] = i
            to += 1
    for t in range(at, length):
        c.seq[to] = s.seq[t]
        to += 1
    return to


@njit(cache=True)
def drop_run(s, c, random):
    """Write into ``c`` the sequence without one random run of a repeated op; 0 when there is none."""
    length = s.scalar[0]
    seen = 0
    at = NONE
    for t in range(length):
        if s.runs[s.seq[t]] > 1:
            seen += 1
            if draw(random, seen) == 0:
                at = t
    if at == NONE:
        return 0
    for t in range(at):
        c.seq[t] = s.seq[t]
    for t in range(at + 1, length):
        c.seq[t - 1] = s.seq[t]
    return length - 1


@njit(cache=True)
def shift_block(s, c, random):
    """Write into ``c`` the sequence with a short block moved to another place."""
    length = s.scalar[0]
    width = 1 if draw(random, 2) == 0 else 1 + draw(random, min(12, length))
    start = draw(random, length - width + 1)
    reach = 1 + int((length - 1) * unit(random) ** 3)
    to = start + (reach if draw(random, 2) == 0 else -reach)
    to = min(max(to, 0), length - width)
    if to == start:
        return 0
    low, high = min(start, to), max(start, to) + width
    for t in range(length):
        c.seq[t] = s.seq[t]
    if to > start:
        for t in range(start + width, high):
            c.seq[t - width] = s.seq[t]
    else:
        for t in range(low, start):
            c.seq[t + width] = s.seq[t]
    for t in range(width):
        c.seq[to + t] = s.seq[start + t]
    return length

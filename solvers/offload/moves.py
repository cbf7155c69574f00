"""Moves of the joint search: send a copy away over a gap, retime it, recompute instead, and back."""

from __future__ import annotations

from memplan.solvers.compiled import compiled
from memplan.solvers.lehmer import draw, unit
from memplan.solvers.offload.arrays import COUNT, HOME, ONCE, READ_ROW, READS, SIZE, TIERS, UNTIL_FIRST, WIDTH, WRITER
from memplan.solvers.offload.engines import (
    AFTER_FREE,
    AFTER_WAIT,
    AHEAD,
    AWAY,
    BUFFER,
    CLOCK,
    ENDS_IN,
    ENDS_OUT,
    FIRST,
    FROM,
    GAP,
    GAPS,
    IN_END,
    IN_FROM,
    LOAD,
    MADE,
    NEXT_USE,
    NONE,
    NUMBERS,
    OLDER,
    OUT_END,
    OUT_FROM,
    OUT_UNTIL,
    RELEASE,
    SENT,
    SLOT,
    TIER,
    USE,
)

# The state is one table of integers; its rows:
N = 0  # the numbers named below
RUNS, TRIAL = 1, 2  # run ids in order: of the sequence, of the edited one
OP, AGAIN, FREE_RUNS = 3, 4, 5  # per run id: its op; 1 for a repeated run; stack of free run ids
LOG = 6  # five rows: a slot that the edit changed, and what stood there
CHAIN = 11  # ops of the chain at hand
STATE_ROWS = 12
# (TAKEN: the run that the edit removes; MIX: 1, sequences may change; 0, only offloads.)
LENGTH, TRIAL_LENGTH, N_FREE, BUDGET, N_LOG, TRIAL_N_FREE, TAKEN, MIX = 0, 1, 2, 3, 4, 5, 6, 7
TRIES = 24  # gaps drawn in search of one over a position
LONGEST = 12  # ops that one move runs again
LOGGED = 64  # slots that one move may change


@compiled
def note(s, slots, slot):
    """Remember a slot before it is changed; False when the edit has changed too many."""
    k = s[N, N_LOG]
    if k == LOGGED:
        return False
    s[LOG, k] = slot
    for row in range(4):
        s[LOG + 1 + row, k] = slots[row, slot]
    s[N, N_LOG] = k + 1
    return True


@compiled
def position_before(t, length, time):
    """The last position whose run starts at ``time`` or earlier."""
    low, high = 0, length
    while low < high:
        middle = (low + high + 1) // 2
        if t[CLOCK, middle] <= time:
            low = middle
        else:
            high = middle - 1
    return low


@compiled
def start_of_back(g, duration, v, t, n, tier, crowded):
    """When a copy-in must start to end before its use; ``crowded``: and before those in its way for later uses."""
    p = v[NEXT_USE, n]
    time = t[CLOCK, p]
    if crowded:
        for m in range(v[NUMBERS, GAPS]):
            if m != n and v[AWAY, m] == tier and v[NEXT_USE, m] >= p and v[IN_FROM, m] < p:
                time = min(time, t[IN_END, m] - duration[2 + 2 * tier, v[BUFFER, m]])
    return time - duration[2 + 2 * tier, v[BUFFER, n]]


@compiled
def end_of_out(duration, v, t, n, tier, crowded):
    """When a copy-out that starts at once would end; ``crowded``: behind those under way."""
    u = v[USE, n]
    time = t[CLOCK, u + 1]
    if crowded:
        for m in range(v[NUMBERS, GAPS]):
            if m != n and v[AWAY, m] == tier and v[SENT, m] == m and v[OUT_FROM, m] <= u + 1:
                time = max(time, t[OUT_END, m])
    return time + duration[1 + 2 * tier, v[BUFFER, n]]


@compiled
def send(g, duration, s, slots, v, t, n, tier, at, random):
    """Edit: send gap n's copy to a tier, so that position ``at`` (NONE: any) is free of it."""
    slot, u, p, length = v[SLOT, n], v[USE, n], v[NEXT_USE, n], s[N, LENGTH]
    if not note(s, slots, slot):
        return False
    crowded = draw(random, 2) == 0
    out_until = position_before(t, length, end_of_out(duration, v, t, n, tier, crowded)) + 1
    back = position_before(t, length, start_of_back(g, duration, v, t, n, tier, crowded))
    if at != NONE:
        out_until, back = min(out_until, at), max(back, at + 1)
    slots[TIER, slot] = tier
    slots[FROM, slot] = 0
    slots[RELEASE, slot] = out_until - u - 1
    slots[AHEAD, slot] = p - back
    return True


@compiled
def stay(s, slots, v, n):
    """Edit: keep gap n's copy on the device."""
    if not note(s, slots, v[SLOT, n]):
        return False
    slots[TIER, v[SLOT, n]] = NONE
    return True


@compiled
def retime(g, duration, s, slots, v, t, n, random):
    """Edit: change when gap n's copies start and what waits for them."""
    slot, u, p, length = v[SLOT, n], v[USE, n], v[NEXT_USE, n], s[N, LENGTH]
    if not note(s, slots, slot):
        return False
    tier = v[AWAY, n]
    slots[RELEASE, slot] = v[OUT_UNTIL, n] - u - 1
    slots[AHEAD, slot] = p - v[IN_FROM, n]
    kind = draw(random, 8)
    copies_out = v[SENT, n] == n
    if copies_out:
        slots[FROM, slot] = v[OUT_FROM, n] - u - 1
    if copies_out and kind < 2:
        slots[RELEASE, slot] = position_before(t, length, t[OUT_END, n]) - u
    elif copies_out and kind == 2:
        slots[RELEASE, slot] += (1 + draw(random, 8)) * (1 - 2 * draw(random, 2))
    elif copies_out and kind == 3:
        slots[FROM, slot] = draw(random, 2) * draw(random, 16)
    elif kind < 6:
        back = position_before(t, length, start_of_back(g, duration, v, t, n, tier, draw(random, 2) == 0))
        slots[AHEAD, slot] = p - back
    else:
        slots[AHEAD, slot] += (1 + draw(random, 8)) * (1 - 2 * draw(random, 2))
    slots[AHEAD, slot] = min(max(0, slots[AHEAD, slot]), p)
    slots[RELEASE, slot] = min(max(0, slots[RELEASE, slot]), p)
    return True


@compiled
def over_position(s, v, random):
    """A position over the budget; NONE where there is none."""
    length = s[N, LENGTH] + 1
    start = draw(random, length)
    for k in range(length):
        at = start + k if start + k < length else start + k - length
        if v[LOAD, at] > s[N, BUDGET]:
            return at
    return NONE


@compiled
def pick_over(g, v, at, random):
    """A gap whose copy lies idle on the device at a position, large ones likelier; NONE when no draw finds one."""
    best, best_key, hits = NONE, 0.0, 0
    if v[NUMBERS, GAPS] == 0:
        return NONE
    for _ in range(TRIES):
        n = draw(random, v[NUMBERS, GAPS])
        if v[USE, n] < at < v[NEXT_USE, n] and (v[AWAY, n] == NONE or at < v[OUT_UNTIL, n] or at >= v[IN_FROM, n]):
            key = g[SIZE, v[BUFFER, n]] * unit(random)
            hits += 1
            if key > best_key:
                best, best_key = n, key
            if hits == 3:
                break
    return best


@compiled
def pick_away(v, random):
    """A gap whose copy is away; NONE when no draw finds one."""
    if v[NUMBERS, GAPS] == 0:
        return NONE
    for _ in range(TRIES):
        n = draw(random, v[NUMBERS, GAPS])
        if v[AWAY, n] != NONE:
            return n
    return NONE


@compiled
def pick_waited(duration, s, v, t, random):
    """A gap whose copy a run waits for; NONE when there is none."""
    length = s[N, LENGTH]
    start = draw(random, length + 1)
    for k in range(length + 1):
        p = start + k if start + k <= length else start + k - length - 1
        before = 0.0 if p == 0 else t[CLOCK, p - 1] + duration[0, s[OP, s[RUNS, p - 1]]]
        if t[CLOCK, p] <= before + 1e-12 * t[CLOCK, length]:
            continue
        n = v[ENDS_OUT, p]
        while n != NONE:
            if t[OUT_END, n] == t[CLOCK, p]:
                return n
            n = v[AFTER_FREE, n]
        n = v[ENDS_IN, p]
        while n != NONE:
            if t[IN_END, n] == t[CLOCK, p]:
                return n
            n = v[AFTER_WAIT, n]
    return NONE


@compiled
def insert(s, slots, g, at, i):
    """Edit: run op i again before position ``at`` of the edited sequence; False where there is no room."""
    if s[N, TRIAL_N_FREE] == 0:
        return False
    s[N, TRIAL_N_FREE] -= 1
    run = s[FREE_RUNS, s[N, TRIAL_N_FREE]]
    s[OP, run], s[AGAIN, run] = i, 1
    width = g[COUNT, WIDTH]
    slots[:, run * width : (run + 1) * width] = 0
    slots[TIER, run * width : (run + 1) * width] = NONE
    for k in range(g[READ_ROW, i], g[READ_ROW, i + 1]):  # what has a home comes from there
        slots[TIER, run * width + k - g[READ_ROW, i]] = g[HOME, g[READS, k]]
    length = s[N, TRIAL_LENGTH]
    for p in range(length, at, -1):
        s[TRIAL, p] = s[TRIAL, p - 1]
    s[TRIAL, at] = run
    s[N, TRIAL_LENGTH] = length + 1
    return True


@compiled
def take(s, at):
    """Edit: take the run at a position out of the edited sequence; returns it."""
    run = s[TRIAL, at]
    for p in range(at, s[N, TRIAL_LENGTH] - 1):
        s[TRIAL, p] = s[TRIAL, p + 1]
    s[N, TRIAL_LENGTH] -= 1
    return run


@compiled
def absent(v, b, at):
    """The gap of buffer b over position ``at`` where the copy is away; -2: it is there; NONE: it is not held on."""
    n = v[GAP, b]
    while n != NONE:
        if v[USE, n] < at <= v[NEXT_USE, n]:
            if v[AWAY, n] == NONE or at <= v[OUT_UNTIL, n] or at >= v[IN_FROM, n]:
                return -2
            return n
        n = v[OLDER, n]
    return NONE


@compiled
def recompute(g, duration, s, slots, v, n, random):
    """Edit: make gap n's copy again before its next use, with some of what that lacks. False where it cannot be."""
    b, at = v[BUFFER, n], v[NEXT_USE, n]
    i = g[WRITER, b]
    if i == NONE or g[ONCE, i] == 1 or at >= s[N, LENGTH]:
        return False
    if v[AWAY, n] != NONE and not stay(s, slots, v, n):
        return False
    s[CHAIN, 0] = i
    count, done = 1, 0
    longest = 1 if draw(random, 2) == 0 else 1 + draw(random, LONGEST)
    while done < count < longest:
        i = s[CHAIN, done]
        done += 1
        for k in range(g[READ_ROW, i], g[READ_ROW, i + 1]):
            j = g[WRITER, g[READS, k]]
            if j == NONE or g[ONCE, j] == 1 or absent(v, g[READS, k], at) == -2 or draw(random, 3) == 0:
                continue
            fresh = True
            for m in range(count):
                fresh = fresh and s[CHAIN, m] != j
            if fresh and count < longest:
                s[CHAIN, count] = j
                count += 1
    for k in range(1, count):  # descending stored order: each is inserted before the one before
        i = s[CHAIN, k]
        j = k - 1
        while j >= 0 and s[CHAIN, j] < i:
            s[CHAIN, j + 1] = s[CHAIN, j]
            j -= 1
        s[CHAIN, j + 1] = i
    for k in range(count):
        if g[UNTIL_FIRST, s[CHAIN, k]] != NONE and at > v[FIRST, g[UNTIL_FIRST, s[CHAIN, k]]]:
            return False
        if not insert(s, slots, g, at, s[CHAIN, k]):
            return False
    return True


@compiled
def pick_again(s, random):
    """The position of a repeated run; NONE when no draw finds one."""
    length = s[N, LENGTH]
    start = draw(random, length)
    for k in range(length):
        at = start + k if start + k < length else start + k - length
        if s[AGAIN, s[RUNS, at]] == 1:
            return at
    return NONE


@compiled
def drop(g, duration, s, slots, v, t, at, random):
    """Edit: take a repeated run out; at times what it made is brought back from a tier instead."""
    s[N, TAKEN] = take(s, at)
    if draw(random, 2) == 0:
        return True
    tier = draw(random, g[COUNT, TIERS])
    for n in range(v[NUMBERS, GAPS]):
        if v[MADE, n] == at and v[USE, n] == at and not send(g, duration, s, slots, v, t, n, tier, NONE, random):
            return False
    return True


@compiled
def shift(g, s, v, at, random):
    """Edit: move a repeated run to a place nearby."""
    run = take(s, at)
    first = v[FIRST, s[OP, run]]
    to = at + (1 + draw(random, 16)) * (1 - 2 * draw(random, 2))
    last = s[N, TRIAL_LENGTH]
    if g[UNTIL_FIRST, s[OP, run]] != NONE:
        last = v[FIRST, g[UNTIL_FIRST, s[OP, run]]] - 1
    to = min(max(to, first + 1), last)
    for p in range(s[N, TRIAL_LENGTH], to, -1):
        s[TRIAL, p] = s[TRIAL, p - 1]
    s[TRIAL, to] = run
    s[N, TRIAL_LENGTH] += 1
    return to != at

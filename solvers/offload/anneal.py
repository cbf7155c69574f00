"""Simulated annealing over sequences and offloads: time plus a self-adjusting price on every byte over the budget."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from memplan.solvers.compiled import compiled
from memplan.solvers.lehmer import draw, unit
from memplan.solvers.offload.arrays import COUNT, TIERS, Floats, Ints
from memplan.solvers.offload.engines import (
    AWAY,
    BUFFER,
    CRAMMED,
    GAPS,
    IN_FROM,
    LOAD,
    MADE,
    NEXT_USE,
    NONE,
    NUMBERS,
    OUT_FROM,
    OUT_UNTIL,
    OVER,
    evaluate,
)
from memplan.solvers.offload.moves import (
    BUDGET,
    FREE_RUNS,
    LENGTH,
    LOG,
    MIX,
    N_FREE,
    N_LOG,
    OP,
    RUNS,
    TAKEN,
    TRIAL,
    TRIAL_LENGTH,
    TRIAL_N_FREE,
    N,
    drop,
    over_position,
    pick_again,
    pick_away,
    pick_over,
    pick_waited,
    recompute,
    retime,
    send,
    shift,
    stay,
)


class Best(NamedTuple):
    """The fastest sequence within the budget so far, and while there is none the one with the lowest peak."""

    seq: Ints
    stays: Ints  # a column an offload; rows: buffer, made, out from, out until, in from, in until, tier
    count: Ints  # of runs, of offloads
    time: Floats  # one entry, infinity while nothing fits
    peak: Ints  # one entry


def new_best(capacity: int, gaps: int) -> Best:
    """Nothing found yet."""
    return Best(
        np.zeros(capacity, np.int64),
        np.zeros((7, gaps), np.int64),
        np.zeros(2, np.int64),
        np.full(1, np.inf),
        np.full(1, np.iinfo(np.int64).max),
    )


@compiled
def record(s, v, time, best):
    """Remember the current sequence where it is the best so far."""
    length = s[N, LENGTH]
    if v[NUMBERS, OVER] > 0:
        peak = v[LOAD, : length + 1].max()
        if best.time[0] < math.inf or peak >= best.peak[0] or v[NUMBERS, CRAMMED] > 0:
            return
        best.peak[0] = peak
    elif time < best.time[0]:
        best.time[0] = time
        best.peak[0] = v[LOAD, : length + 1].max()
    else:
        return
    for p in range(length):
        best.seq[p] = s[OP, s[RUNS, p]]
    count = 0
    for n in range(v[NUMBERS, GAPS]):
        if v[AWAY, n] != NONE:
            best.stays[0, count], best.stays[1, count] = v[BUFFER, n], v[MADE, n]
            best.stays[2, count], best.stays[3, count] = v[OUT_FROM, n], v[OUT_UNTIL, n]
            best.stays[4, count], best.stays[5, count] = v[IN_FROM, n], v[NEXT_USE, n]
            best.stays[6, count] = v[AWAY, n]
            count += 1
    best.count[0], best.count[1] = length, count


@compiled
def keep(s):
    """Make the edited sequence the sequence."""
    s[N, N_FREE] = s[N, TRIAL_N_FREE]
    if s[N, TAKEN] != NONE:
        s[FREE_RUNS, s[N, N_FREE]] = s[N, TAKEN]
        s[N, N_FREE] += 1
    s[N, LENGTH] = s[N, TRIAL_LENGTH]
    s[RUNS, : s[N, LENGTH]] = s[TRIAL, : s[N, LENGTH]]


@compiled
def undo(s, slots):
    """Give the edit up."""
    for k in range(s[N, N_LOG] - 1, -1, -1):
        for row in range(4):
            slots[row, s[LOG, k]] = s[LOG + 1 + row, k]
    s[TRIAL, : s[N, LENGTH]] = s[RUNS, : s[N, LENGTH]]


@compiled
def edit(g, duration, s, slots, v, t, random):
    """Draw an edit and make it; False when it came to nothing."""
    kind = draw(random, 100)
    tier = draw(random, g[COUNT, TIERS])
    if v[NUMBERS, OVER] > 0 and kind < 50:
        at = over_position(s, v, random)
        n = NONE if at == NONE else pick_over(g, v, at, random)
        if n == NONE:
            return False
        if s[N, MIX] == 1 and draw(random, 3) == 0:
            return recompute(g, duration, s, slots, v, n, random)
        return send(g, duration, s, slots, v, t, n, tier if v[AWAY, n] == NONE else v[AWAY, n], at, random)
    if s[N, MIX] == 1 and kind >= 80:
        at = pick_again(s, random)
        if at != NONE:
            if kind < 88:
                return shift(g, s, v, at, random)
            return drop(g, duration, s, slots, v, t, at, random)
    if kind < 20:
        at = draw(random, s[N, LENGTH])
        n = pick_over(g, v, at, random)
        return n != NONE and send(g, duration, s, slots, v, t, n, tier, at, random)
    n = pick_waited(duration, s, v, t, random) if draw(random, 2) == 0 else pick_away(v, random)
    if n == NONE:
        return False
    kind = draw(random, 8)
    if kind < 5:
        return retime(g, duration, s, slots, v, t, n, random)
    if kind == 5 and s[N, MIX] == 1:
        return recompute(g, duration, s, slots, v, n, random)
    if kind == 6:
        return send(g, duration, s, slots, v, t, n, tier, NONE, random)
    return stay(s, slots, v, n)


@compiled
def anneal(g, s, slots, views, times, now, best, time, steps, hot, cold, price, random):
    """``steps`` moves with the temperature falling from ``hot`` to ``cold`` (time units); returns the time at the end.

    ``views``, ``times``: two of each, ``now[0]`` the one of the current sequence, which must be evaluated. ``price[0]``:
    time units for a byte over the budget at one position; it rises while the sequence is over and falls, to
    ``price[1]`` at the least, while it is within.
    """
    heat = hot
    cooling = (cold / hot) ** (1.0 / steps)
    for _ in range(steps):
        heat *= cooling
        v, t = views[now[0]], times[now[0]]
        over = v[NUMBERS, OVER]
        price[0] = price[0] * 1.001 if over > 0 else max(price[0] * 0.999, price[1])
        s[N, N_LOG], s[N, TAKEN] = 0, NONE
        s[N, TRIAL_LENGTH], s[N, TRIAL_N_FREE] = s[N, LENGTH], s[N, N_FREE]
        if not edit(g.table, g.time, s, slots, v, t, random):
            undo(s, slots)
            continue
        other = 1 - now[0]
        fresh = evaluate(g, s[TRIAL], s[OP], s[N, TRIAL_LENGTH], slots, s[N, BUDGET], views[other], times[other])
        worse = fresh - time + price[0] * (views[other][NUMBERS, OVER] - over)
        if worse <= 0 or unit(random) < math.exp(-worse / heat):
            keep(s)
            now[0] = other
            time = fresh
            if worse != 0:
                record(s, views[other], time, best)
        else:
            undo(s, slots)
    return time

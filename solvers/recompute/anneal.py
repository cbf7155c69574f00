"""Simulated annealing over sequences: time plus a self-adjusting price on every byte over the budget."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from memplan.solvers.compiled import compiled
from memplan.solvers.lehmer import draw, unit
from memplan.solvers.recompute.arrays import Floats, Graph, Ints
from memplan.solvers.recompute.moves import CHAIN_BITS, drag, drop, recompute, shift
from memplan.solvers.recompute.state import BROKEN, LENGTH, LOAD, NEW_OVER, OP, OVER, RUN, N, keep, undo
from memplan.solvers.recompute.weigh import weigh


class Best(NamedTuple):
    """The fastest sequence within the budget so far, and the one with the lowest peak."""

    seq: Ints
    length: Ints  # one entry
    time: Floats  # one entry, infinity before the first
    low_seq: Ints
    low: Ints  # length, peak


def new_work(graph: Graph) -> Ints:
    """Scratch of the moves for a graph."""
    return np.zeros((4, max(1 << CHAIN_BITS, len(graph.time))), np.int64)


def new_best(capacity: int) -> Best:
    """Nothing found yet."""
    return Best(
        np.zeros(capacity, np.int64),
        np.zeros(1, np.int64),
        np.full(1, np.inf),
        np.zeros(capacity, np.int64),
        np.array([0, np.iinfo(np.int64).max], np.int64),
    )


@compiled
def record(s, time, best):
    """Remember the sequence when it is the fastest within the budget, or the lowest so far."""
    length = s[N, LENGTH]
    if s[N, OVER] == 0 and time < best.time[0]:
        best.time[0] = time
        best.length[0] = length
        for t in range(length):
            best.seq[t] = s[OP, s[RUN, t]]
    if s[N, OVER] > 0 and best.time[0] < math.inf:
        return
    peak = 0
    for t in range(length):
        peak = max(peak, s[LOAD, t])
    if peak < best.low[1]:
        best.low[0] = length
        best.low[1] = peak
        for t in range(length):
            best.low_seq[t] = s[OP, s[RUN, t]]


@compiled
def anneal(g, duration, s, work, best, time, steps, hot, cold, price, random):
    """``steps`` moves with the temperature falling from ``hot`` to ``cold`` (time units); returns the time at the end.

    ``price[0]``: time units for a byte over the budget at one position; it rises while the sequence is over the budget
    and falls while it is within. ``best`` is kept up to date.
    """
    record(s, time, best)
    heat = hot
    cooling = (cold / hot) ** (1.0 / steps)
    for _ in range(steps):
        heat *= cooling
        price[0] *= 1.001 if s[N, OVER] > 0 else 0.999
        kind = draw(random, 100)
        if kind < (50 if s[N, OVER] > 0 else 25):
            edited = recompute(g, duration, s, work, price[0], random)
        elif kind < 70:
            edited = drop(g, s, random)
        elif kind < 85:
            edited = drag(g, s, work, random)
        else:
            edited = shift(g, s, work, random)
        if not edited:
            continue
        added = weigh(g, duration, s)
        worse = added + price[0] * (s[N, NEW_OVER] - s[N, OVER])
        if s[N, BROKEN] == 0 and (worse <= 0 or unit(random) < math.exp(-worse / heat)):
            keep(s)
            time += added
            if worse != 0:
                record(s, time, best)
        else:
            undo(s)
    return time

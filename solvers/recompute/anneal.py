"""Simulated annealing over sequences: time plus a self-adjusting price on every byte over the budget."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from memplan.solvers.recompute.arrays import Floats, Graph, Ints
from memplan.solvers.recompute.moves import chain, draw, drop_run, insert_chain, pick_gap, shift_block, unit
from memplan.solvers.recompute.state import BROKEN, link, trim, weigh
from numba import njit


class Work(NamedTuple):
    """Scratch of the moves."""

    chosen: Ints
    stack: Ints
    last: Ints
    alive: Ints


class Best(NamedTuple):
    """The fastest sequence within the budget so far, and the one with the lowest peak."""

    seq: Ints
    length: Ints  # one entry
    time: Floats  # one entry, infinity before the first
    low_seq: Ints
    low: Ints  # length, peak


def new_work(graph: Graph) -> Work:
    n, buffers = len(graph.time), len(graph.size)
    return Work(
        np.zeros(n, np.int64), np.zeros(n + 1, np.int64), np.zeros(buffers, np.int64), np.zeros(buffers, np.int64)
    )


@njit(cache=True)
def settle(g, s, length, budget):
    """Link, trim and weigh ``s``; returns its time, or -1 when the sequence breaks a rule."""
    if link(g, s, length) == BROKEN:
        return -1.0
    shorter = trim(g, s, length)
    if shorter < length and link(g, s, shorter) == BROKEN:
        return -1.0
    return weigh(g, s, shorter, budget)


@njit(cache=True)
def copy_state(s, c):
    """Make ``c`` equal to ``s``."""
    length = s.scalar[0]
    c.seq[:length] = s.seq[:length]
    c.row[: length + 1] = s.row[: length + 1]
    slots = s.row[length]
    c.source[:slots] = s.source[:slots]
    c.previous[:slots] = s.previous[:slots]
    c.load[:length] = s.load[:length]
    c.runs[:] = s.runs
    c.scalar[:] = s.scalar


@njit(cache=True)
def record(s, time, best):
    """Remember ``s`` when it is the best within the budget, or the lowest so far."""
    length = s.scalar[0]
    if s.scalar[1] == 0 and time < best.time[0]:
        best.time[0] = time
        best.length[0] = length
        best.seq[:length] = s.seq[:length]
    if s.scalar[2] < best.low[1]:
        best.low[0] = length
        best.low[1] = s.scalar[2]
        best.low_seq[:length] = s.seq[:length]


@njit(cache=True)
def anneal(g, s, c, work, best, budget, steps, hot, cold, price, random):
    """``steps`` moves from state ``s`` with the temperature falling from ``hot`` to ``cold`` (time units).

    ``price[0]``: time units for a byte over the budget at one position; it rises while the sequence is over the budget
    and falls while it is within. ``best`` is kept up to date. Returns the time of ``s`` at the end.
    """
    time = settle(g, s, s.scalar[0], budget)
    record(s, time, best)
    heat = hot
    cooling = (cold / hot) ** (1.0 / steps)
    swapped = False
    for _ in range(steps):
        heat *= cooling
        price[0] *= 1.001 if s.scalar[1] > 0 else 0.999
        kind = draw(random, 100)
        length = 0
        if kind < (50 if s.scalar[1] > 0 else 25):
            slot, at = pick_gap(g, s, budget, random)
            if slot >= 0:
                count = chain(g, s, slot, at, price[0], budget, random, work)
                length = insert_chain(g, s, c, at, count, work)
        elif kind < 70:
            length = drop_run(s, c, random)
        else:
            length = shift_block(s, c, random)
        if length == 0:
            continue
        other = settle(g, c, length, budget)
        if other < 0:
            continue
        worse = (other - time) + price[0] * (c.scalar[1] - s.scalar[1])
        if worse <= 0 or unit(random) < math.exp(-worse / heat):
            s, c = c, s
            swapped = not swapped
            time = other
            record(s, time, best)
    if swapped:
        copy_state(s, c)
    return time

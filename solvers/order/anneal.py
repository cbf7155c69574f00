"""Simulated annealing over orders: move a run within a stretch of the order, and with it what stands in its way.

A move takes a run some places later and pushes the descendants it meets before it, or some places earlier and pulls its
ancestors along; everything else keeps its order, so each move gives a valid order. The objective is the *overage*, the
sum over positions of the bytes above a target just below the best peak. It is local: a move costs time in proportion to
its stretch. (Overage as penalty: FastSA's feasibility phase has the same shape.)

Compiled by numba; with ``NUMBA_DISABLE_JIT=1`` the same source runs as plain Python and gives the same orders: random
numbers are a multiplicative congruence in 64-bit integers and acceptance compares integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memplan.solvers.compiled import compiled
from memplan.solvers.lehmer import MODULUS, MULTIPLIER
from memplan.solvers.order.model import Arrays, Ints, OrderModel

LEVELS = 50  # temperatures of a round, falling by equal ratios
HOTTEST, COLDEST = 0.3, 0.002  # as multiples of the mean bytes that a run makes
MOVES = 2000  # at each temperature, at least; one for every run of larger problems
SPAN = 30  # the farthest that a move takes a run
CHANCES = np.array([int(-1024 * math.log((i + 0.5) / 4096)) for i in range(4096)], dtype=np.int64)


class Annealer:
    """Rounds of annealing on one order."""

    def __init__(self, model: OrderModel, order: Sequence[int], seed: int, moves: int = MOVES) -> None:
        n, buffers = model.n, len(model.size)
        room = [np.zeros(k, dtype=np.int64) for k in (n, buffers, buffers, n, n, n, n)]
        self.model = model
        self.profile = Profile(np.array(order, dtype=np.int64), *room)
        self.random = np.array([1 + seed % (MODULUS - 1)], dtype=np.int64)
        self.at_each = max(moves, n)  # temperature
        self.moves = 0  # made in all rounds
        mean = max(1, sum(model.made) // max(1, n))
        self.temperatures = (mean * np.geomspace(HOTTEST, COLDEST, LEVELS)).astype(np.int64)

    def round(self, target: int) -> list[int]:
        """Anneal from the last order towards loads of at most ``target``; returns the order it ends with."""
        self.moves += anneal(
            self.model.arrays,
            self.profile,
            self.model.base,
            target,
            self.temperatures,
            CHANCES,
            self.at_each,
            SPAN,
            self.random,
        )
        return self.profile.order.tolist()


class Profile(NamedTuple):
    """An order with what it holds at each position, and room for a stretch of another one."""

    order: Ints
    live: Ints  # per position, bytes held while the run there runs, without ``extra``
    last: Ints  # per buffer, the position of its last reader
    fresh: Ints  # the same of the stretch being tried
    stretch: Ints
    stretch_live: Ints
    aside: Ints
    mark: Ints  # per run, the number of the move that last dragged it


@compiled
def _profile(m: Arrays, p: Profile, base: int, target: int):
    """Fill in what ``p.order`` holds; returns its overage."""
    for t, v in enumerate(p.order):
        p.mark[t] = -1
        for k in range(m.read_start[v], m.read_start[v + 1]):
            p.last[m.reads[k]] = t
    total = base
    overage = 0
    for t, v in enumerate(p.order):
        total += m.made[v]
        p.live[t] = total
        overage += max(0, total + m.extra[v] - target)
        for k in range(m.read_start[v], m.read_start[v + 1]):
            if p.last[m.reads[k]] == t:
                total -= m.size[m.reads[k]]
    return overage


@compiled
def _drag(m: Arrays, p: Profile, i: int, j: int, move: int):
    """Write to ``p.stretch`` the positions between i and j after the run at i has gone to j with what it drags along."""
    step = 1 if i < j else -1
    start, links = (m.pred_start, m.preds) if i < j else (m.succ_start, m.succs)
    p.aside[0] = p.order[i]
    p.mark[p.order[i]] = move
    dragged = 1
    free = i
    for t in range(i + step, j + step, step):
        v = p.order[t]
        for k in range(start[v], start[v + 1]):
            if p.mark[links[k]] == move:
                p.mark[v] = move
                break
        if p.mark[v] == move:
            p.aside[dragged] = v
            dragged += 1
        else:
            p.stretch[free] = v
            free += step
    for k in range(dragged):
        p.stretch[free + step * k] = p.aside[k]


@compiled
def _try(m: Arrays, p: Profile, lo: int, hi: int, target: int, allowed: int):
    """Put ``p.stretch`` in force between lo and hi unless it adds more than ``allowed``; returns the overage it adds."""
    before = 0
    for t in range(lo, hi + 1):
        before += max(0, p.live[t] + m.extra[p.order[t]] - target)
        v = p.stretch[t]
        for k in range(m.read_start[v], m.read_start[v + 1]):
            p.fresh[m.reads[k]] = t
    after = 0
    total = p.live[lo] - m.made[p.order[lo]]
    for t in range(lo, hi + 1):
        v = p.stretch[t]
        total += m.made[v]
        p.stretch_live[t] = total
        after += max(0, total + m.extra[v] - target)
        if after > before + allowed:
            return 0
        for k in range(m.read_start[v], m.read_start[v + 1]):
            b = m.reads[k]
            if p.last[b] <= hi and p.fresh[b] == t:
                total -= m.size[b]
    for t in range(lo, hi + 1):
        v = p.stretch[t]
        p.order[t] = v
        p.live[t] = p.stretch_live[t]
        for k in range(m.read_start[v], m.read_start[v + 1]):
            b = m.reads[k]
            if p.last[b] <= hi:
                p.last[b] = p.fresh[b]
    return after - before


@compiled
def anneal(
    m: Arrays,
    p: Profile,
    base: int,
    target: int,
    temperatures: Ints,
    chances: Ints,
    moves: int,
    span: int,
    random: Ints,
):
    """Anneal ``p.order`` in place until it has no overage: ``moves`` moves at each of ``temperatures`` (bytes).

    ``chances``: quantiles of an exponential variate in 1024ths; a move may raise the overage by temperature times one
    of them, which is Metropolis' rule. ``random``: the generator's state, updated. Returns how many moves it made.
    """
    n = len(p.order)
    overage = _profile(m, p, base, target)
    x = random[0]
    stamp = 0
    for temperature in temperatures:
        for _ in range(moves):
            if overage == 0:
                break
            stamp += 1
            x = x * MULTIPLIER % MODULUS
            i = x % n
            x = x * MULTIPLIER % MODULUS
            j = min(max(i + x % (2 * span + 1) - span, 0), n - 1)
            x = x * MULTIPLIER % MODULUS
            allowed = temperature * chances[x % len(chances)] // 1024
            if i != j:
                _drag(m, p, i, j, stamp)
                overage += _try(m, p, min(i, j), max(i, j), target, allowed)
    random[0] = x
    return stamp

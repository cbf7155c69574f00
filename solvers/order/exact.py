"""Exact search: is there an order whose loads all stay within a limit?

A depth-first search over the sets of runs done so far; a set whose rest was tried is never tried again. Two rules keep
it small. A ready run that fits the limit and does not raise the load is done at once: done later it would lower the
load by no more, so doing it now lowers every load in between. And once a *gate* is done, a run comparable with all
others, what came before it is settled: every order passes through that set.
(Sets of done runs as states: Serenity, Ahn et al. 2020, section 3.1; the first rule extends Liu's for trees.)

Compiled by numba; the same source runs as plain Python and gives the same answers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from memplan.solvers.compiled import compiled
from memplan.solvers.order.model import Ints, ints, ragged
from memplan.solvers.order.sweep import Sweep, gates

BITS = 62  # runs in a word of a set; a word stays a positive 64-bit integer
ROOM = 8_000_000  # words that the sets seen may take (64 MB)
LEAST_WORK = 8  # runs looked at for each set that there is room for; most sets take more
LOAD, READY, DONE, HASH, GATES, WORK, REFUSED = range(7)  # the entries of ``State.numbers``
FOUND, NONE, UNKNOWN = range(3)  # how a search ends


@dataclass(frozen=True)
class Answer:
    """``order``: one within the limit, if found. ``bound``: bytes, no order has a lower peak; 0 if stopped early."""

    order: list[int] | None
    bound: int
    work: int  # runs looked at


class Lists(NamedTuple):
    """A sweep as arrays; ragged lists as (start, flat)."""

    preds: Ints  # per run, how many
    succ_start: Ints
    succs: Ints
    open_start: Ints
    opens: Ints
    close_start: Ints
    closes: Ints
    closers: Ints  # per buffer, how many
    size: Ints
    extra: Ints
    key: Ints  # per run, a random word; a set hashes to the exclusive or of its runs'
    gate: Ints  # per run, 1 if it is one


class State(NamedTuple):
    """Where the search stands; ``_do`` and ``_undo`` keep all of it up to date."""

    waiting: Ints  # per run, predecessors not done
    opened: Ints  # per buffer, openers done
    left: Ints  # per buffer, closers not done
    ready: Ints  # the first READY entries
    place: Ints  # per run, where it stands or stood in ``ready``
    done: Ints  # the set as bits
    trail: Ints  # the first DONE entries: the runs done, in order
    numbers: Ints


class Memory(NamedTuple):
    """The sets seen, and those among them whose rest is still to be tried: a stack of a run and what it leads to."""

    seen: Ints
    table: Ints  # open addressing by hash: indices into ``seen``, -1 where free
    run: Ints
    load: Ints  # after the run and what settles behind it
    parent: Ints  # how many runs had been done before it


class ExactSearch:
    """One sweep, to be asked for several limits."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.words = sweep.n // BITS + 1
        draw, gate = random.Random(0), gates(sweep)
        succ_start, succs = ragged(sweep.succs)
        open_start, opens = ragged(sweep.opens)
        close_start, closes = ragged(sweep.closes)
        self.lists = Lists(
            preds=ints(len(p) for p in sweep.preds),
            succ_start=succ_start,
            succs=succs,
            open_start=open_start,
            opens=opens,
            close_start=close_start,
            closes=closes,
            closers=ints(len(c) for c in sweep.closers),
            size=ints(sweep.size),
            extra=ints(sweep.extra),
            key=ints(draw.getrandbits(BITS) for _ in range(sweep.n)),
            gate=ints(gate >> v & 1 for v in range(sweep.n)),
        )

    def within(self, limit: int, work: int) -> Answer:
        """Look for an order with every load at most ``limit``; give up after looking at ``work`` runs.

        A complete search that finds none would find none either at any limit below the least load that it refused.
        """
        sets = max(1, min(work // LEAST_WORK, ROOM // self.words))
        state = self._start()
        table = np.full(2 * sets + 1, -1, np.int64)
        memory = Memory(np.zeros((sets, self.words), np.int64), table, *np.zeros((3, sets), np.int64))
        ended = _search(self.lists, state, memory, limit, work)
        spent, refused = int(state.numbers[WORK]), int(state.numbers[REFUSED])
        if ended == FOUND:
            return Answer(self.sweep.order(state.trail.tolist()), 0, spent)
        return Answer(None, refused if ended == NONE else 0, spent)

    def _start(self) -> State:
        s, n = self.sweep, self.sweep.n
        ready = [v for v in range(n) if not s.preds[v]]
        numbers = np.zeros(7, np.int64)
        numbers[LOAD], numbers[READY] = s.base, len(ready)
        numbers[REFUSED] = s.base + sum(s.size) + sum(s.extra)
        place = np.zeros(n, np.int64)
        place[ready] = np.arange(len(ready))
        return State(
            self.lists.preds.copy(),
            ints(0 if openers else 1 for openers in s.openers),
            self.lists.closers.copy(),
            ints(ready + [0] * (n - len(ready))),
            place,
            np.zeros(self.words, np.int64),
            np.zeros(n, np.int64),
            numbers,
        )


@compiled
def _do(s: Lists, c: State, v: int):
    """Do a ready run."""
    number = c.numbers
    number[READY] -= 1
    moved = c.ready[number[READY]]
    c.ready[c.place[v]] = moved
    c.place[moved] = c.place[v]
    for k in range(s.open_start[v], s.open_start[v + 1]):
        b = s.opens[k]
        if c.opened[b] == 0:
            number[LOAD] += s.size[b]
        c.opened[b] += 1
    for k in range(s.close_start[v], s.close_start[v + 1]):
        b = s.closes[k]
        c.left[b] -= 1
        if c.left[b] == 0:
            number[LOAD] -= s.size[b]
    for k in range(s.succ_start[v], s.succ_start[v + 1]):
        u = s.succs[k]
        c.waiting[u] -= 1
        if c.waiting[u] == 0:
            c.ready[number[READY]] = u
            c.place[u] = number[READY]
            number[READY] += 1
    c.trail[number[DONE]] = v
    number[DONE] += 1
    c.done[v // BITS] ^= 1 << (v % BITS)
    number[HASH] ^= s.key[v]
    number[GATES] += s.gate[v]


@compiled
def _undo(s: Lists, c: State):
    """Undo the last run, exactly."""
    number = c.numbers
    number[DONE] -= 1
    v = c.trail[number[DONE]]
    c.done[v // BITS] ^= 1 << (v % BITS)
    number[HASH] ^= s.key[v]
    number[GATES] -= s.gate[v]
    for k in range(s.succ_start[v + 1] - 1, s.succ_start[v] - 1, -1):
        u = s.succs[k]
        if c.waiting[u] == 0:
            number[READY] -= 1
        c.waiting[u] += 1
    for k in range(s.close_start[v], s.close_start[v + 1]):
        b = s.closes[k]
        if c.left[b] == 0:
            number[LOAD] += s.size[b]
        c.left[b] += 1
    for k in range(s.open_start[v], s.open_start[v + 1]):
        b = s.opens[k]
        c.opened[b] -= 1
        if c.opened[b] == 0:
            number[LOAD] -= s.size[b]
    moved = c.ready[c.place[v]]
    c.place[moved] = number[READY]
    c.ready[number[READY]] = moved
    c.ready[c.place[v]] = v
    number[READY] += 1


@compiled
def _opening(s: Lists, c: State, v: int):
    """Bytes that a ready run would add while it runs, ``extra`` apart."""
    c.numbers[WORK] += 1
    total = 0
    for k in range(s.open_start[v], s.open_start[v + 1]):
        if c.opened[s.opens[k]] == 0:
            total += s.size[s.opens[k]]
    return total


@compiled
def _fits(s: Lists, c: State, v: int, opening: int, limit: int):
    """Whether a ready run stays within the limit; the least load that did not is remembered."""
    load = c.numbers[LOAD] + opening + s.extra[v]
    if load > limit:
        c.numbers[REFUSED] = min(c.numbers[REFUSED], load)
    return load <= limit


@compiled
def _settle(s: Lists, c: State, limit: int):
    """Do whatever fits and does not raise the load."""
    at = 0
    while at < c.numbers[READY]:
        v = c.ready[at]
        at += 1
        opening = _opening(s, c, v)
        closing = 0
        for k in range(s.close_start[v], s.close_start[v + 1]):
            if c.left[s.closes[k]] == 1:
                closing += s.size[s.closes[k]]
        if opening <= closing and _fits(s, c, v, opening, limit):
            _do(s, c, v)
            at = 0


@compiled
def _is_new(c: State, m: Memory, count: int):
    """Whether the current set is not among the ``count`` sets seen; if so it is stored there."""
    at = c.numbers[HASH] % len(m.table)
    while m.table[at] >= 0:
        k = 0
        while k < len(c.done) and m.seen[m.table[at], k] == c.done[k]:
            k += 1
        if k == len(c.done):
            return False
        at = (at + 1) % len(m.table)
    m.table[at] = count
    for k in range(len(c.done)):
        m.seen[count, k] = c.done[k]
    return True


@compiled
def _push(m: Memory, base: int, height: int, run: int, load: int, parent: int):
    """Insert into the stack's entries from ``base`` on, which stay sorted by load, the lowest on top."""
    k = height
    while k > base and m.load[k - 1] < load:
        m.run[k], m.load[k], m.parent[k] = m.run[k - 1], m.load[k - 1], m.parent[k - 1]
        k -= 1
    m.run[k], m.load[k], m.parent[k] = run, load, parent


@compiled
def _search(s: Lists, c: State, m: Memory, limit: int, work: int):
    """Depth first from the state ``c``. Ends with FOUND and the order in ``c.trail``, with NONE, or with UNKNOWN."""
    height = 0
    count = 0
    passed = 0
    _settle(s, c, limit)
    while c.numbers[DONE] < len(s.preds):
        if c.numbers[GATES] > passed:  # all that stands on the stack lacks this gate
            passed = c.numbers[GATES]
            height = 0
        base = height
        here = c.numbers[DONE]
        for at in range(c.numbers[READY]):
            v = c.ready[at]
            if not _fits(s, c, v, _opening(s, c, v), limit):
                continue
            _do(s, c, v)
            _settle(s, c, limit)
            if count == len(m.seen) or c.numbers[WORK] > work:
                return UNKNOWN
            if _is_new(c, m, count):
                count += 1
                _push(m, base, height, v, c.numbers[LOAD], here)
                height += 1
            while c.numbers[DONE] > here:
                _undo(s, c)
        if height == 0:
            return NONE
        height -= 1
        while c.numbers[DONE] > m.parent[height]:
            _undo(s, c)
        _do(s, c, m.run[height])
        _settle(s, c, limit)
    return FOUND

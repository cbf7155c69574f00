"""The order problem swept in one direction, from the first run to the last or backwards.

Both directions have one form: a buffer opens with the first of its openers to run and closes with the last of its
closers. Forwards the opener is the writer and the closers are the readers; backwards it is the other way round, and
what is held to the end is open from the start. An order of either sweep, turned round where needed, has the same loads.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from memplan.solvers.order.model import OrderModel

Lists = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sweep:
    """``openers`` and ``closers`` per buffer, ``opens`` and ``closes`` per run; ``base`` bytes are open at the start."""

    preds: Lists
    succs: Lists
    openers: Lists
    closers: Lists
    opens: Lists
    closes: Lists
    size: tuple[int, ...]
    extra: tuple[int, ...]
    base: int
    backward: bool

    @property
    def n(self) -> int:
        return len(self.preds)

    def order(self, runs: list[int]) -> list[int]:
        """The sweep's runs in execution order."""
        return runs[::-1] if self.backward else runs


def sweep(model: OrderModel, *, backward: bool = False) -> Sweep:
    """The model's buffers, those held to the end included, as a sweep sees them."""
    holders = tuple(v for v in range(model.n) if model.held[v])
    size = model.size + tuple(model.held[v] for v in holders)
    makers = tuple((w,) for w in (*model.writer, *holders))
    users = model.readers + ((),) * len(holders)
    writes = list(model.writes)
    for k, v in enumerate(holders):
        writes[v] += (len(model.size) + k,)
    made = tuple(writes)
    if backward:
        base = model.base + sum(model.held)
        return Sweep(model.succs, model.preds, users, makers, model.reads, made, size, model.extra, base, True)
    return Sweep(model.preds, model.succs, makers, users, made, model.reads, size, model.extra, model.base, False)


Key = Callable[[int, int, int], tuple[int, ...]]  # (growth in bytes, when it became ready, run) -> smallest goes first

# What a list schedule prefers among the ready runs; all take one that lowers the load before one that raises it.
LEAST_GROWTH: Key = lambda growth, ready, v: (growth, v)
NEWEST_FIRST: Key = lambda growth, ready, v: (max(growth, 0) > 0, -ready, v)
LEAST_GROWTH_NEWEST: Key = lambda growth, ready, v: (max(growth, 0), -ready, v)
KEYS = (LEAST_GROWTH, NEWEST_FIRST, LEAST_GROWTH_NEWEST)


def list_schedule(s: Sweep, key: Key) -> list[int]:
    """Run by run, the ready one with the smallest key; O(edges log n). Returns runs in execution order."""
    opened = [not openers for openers in s.openers]
    left = [len(closers) for closers in s.closers]
    waiting = [len(p) for p in s.preds]
    growth = [sum(s.size[b] for b in s.opens[v]) for v in range(s.n)]
    for b, closers in enumerate(s.closers):
        if len(closers) == 1:
            growth[closers[0]] -= s.size[b]
    since = [0 if w == 0 else -1 for w in waiting]
    heap = [(key(growth[v], 0, v), growth[v], v) for v in range(s.n) if since[v] == 0]
    heapq.heapify(heap)
    done = [False] * s.n
    runs: list[int] = []

    def lower(v: int, size: int) -> None:
        growth[v] -= size
        if since[v] >= 0 and not done[v]:
            heapq.heappush(heap, (key(growth[v], since[v], v), growth[v], v))

    while heap:
        _, stale, v = heapq.heappop(heap)
        if done[v] or stale != growth[v]:
            continue
        done[v] = True
        runs.append(v)
        for b in s.opens[v]:
            if not opened[b]:
                opened[b] = True
                for u in s.openers[b]:
                    if u != v:
                        lower(u, s.size[b])
        for b in s.closes[v]:
            left[b] -= 1
            if left[b] == 1:
                lower(next(u for u in s.closers[b] if not done[u]), s.size[b])
        for u in s.succs[v]:
            waiting[u] -= 1
            if waiting[u] == 0:
                since[u] = len(runs)
                heapq.heappush(heap, (key(growth[u], since[u], u), growth[u], u))
    return s.order(runs)


def gates(s: Sweep) -> int:
    """The runs that come before or after every other one in all orders, as bits."""
    order = _topological(s)
    related = [0] * s.n
    for lists, direction in ((s.preds, order), (s.succs, order[::-1])):
        reached = [0] * s.n
        for v in direction:
            reached[v] = 1 << v
            for u in lists[v]:
                reached[v] |= reached[u]
            related[v] |= reached[v]
    every = (1 << s.n) - 1
    return sum(1 << v for v in range(s.n) if related[v] == every)


def _topological(s: Sweep) -> list[int]:
    waiting = [len(p) for p in s.preds]
    order = [v for v, w in enumerate(waiting) if w == 0]
    for v in order:
        for u in s.succs[v]:
            waiting[u] -= 1
            if waiting[u] == 0:
                order.append(u)
    return order

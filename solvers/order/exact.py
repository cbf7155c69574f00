"""Exact search: is there an order whose loads all stay within a limit?

A depth-first search over the sets of runs done so far; a set whose rest was tried is never tried again. Two rules keep
it small. A ready run that fits the limit and does not raise the load is done at once: done later it would lower the
load by no more, so doing it now lowers every load in between. And once a *gate* is done, a run comparable with all
others, what came before it is settled: every order passes through that set.
(Sets of done runs as states: Serenity, Ahn et al. 2020, section 3.1; the first rule extends Liu's for trees.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from memplan.solvers.order.sweep import Sweep


@dataclass(frozen=True)
class Answer:
    """``order``: one within the limit, if found. ``bound``: bytes, no order has a lower peak; 0 if stopped early."""

    order: list[int] | None
    bound: int
    states: int  # sets of runs looked at


class _State(NamedTuple):
    done: int  # a bit per run
    load: int  # bytes held after them
    ready: tuple[int, ...]
    path: tuple | None  # the runs in order, as a linked list: (last run, path before it)


class ExactSearch:
    """One sweep with its lists as bit sets, to be asked for several limits."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.preds = [_bits(p) for p in sweep.preds]
        self.openers = [_bits(o) for o in sweep.openers]
        self.closers = [_bits(c) for c in sweep.closers]
        self.gates = _gates(sweep)
        self._limit = 0
        self._refused = 0  # the least load over the limit that was turned down

    def within(self, limit: int, states: int) -> Answer:
        """Look for an order with every load at most ``limit``, through at most ``states`` sets.

        A complete search that finds none would find none either at any limit below the least load that it refused.
        """
        s = self.sweep
        self._limit, self._refused = limit, s.base + sum(s.size) + sum(s.extra)
        every = (1 << s.n) - 1
        gates = self.gates
        seen: set[int] = set()
        start = _State(0, s.base, tuple(v for v in range(s.n) if not s.preds[v]), None)
        stack = [self._settle(start)]
        while stack:
            state = stack.pop()
            if state.done == every:
                return Answer(s.order(_runs(state.path)), 0, len(seen))
            passed = state.done & gates
            if passed:
                gates &= ~passed
                stack = [other for other in stack if other.done & passed == passed]
            children = []
            for v in state.ready:
                if self._fits(state, v):
                    child = self._settle(self._run(state, v))
                    if child.done not in seen:
                        seen.add(child.done)
                        children.append(child)
            if len(seen) > states:
                return Answer(None, 0, len(seen))
            children.sort(key=lambda child: -child.load)
            stack += children
        return Answer(None, self._refused, len(seen))

    def _fits(self, state: _State, v: int) -> bool:
        load = state.load + self._opening(state, v) + self.sweep.extra[v]
        if load <= self._limit:
            return True
        self._refused = min(self._refused, load)
        return False

    def _opening(self, state: _State, v: int) -> int:
        return sum(self.sweep.size[b] for b in self.sweep.opens[v] if not self.openers[b] & state.done)

    def _closing(self, state: _State, v: int) -> int:
        rest = ~(state.done | 1 << v)
        return sum(self.sweep.size[b] for b in self.sweep.closes[v] if not self.closers[b] & rest)

    def _run(self, state: _State, v: int) -> _State:
        done = state.done | 1 << v
        load = state.load + self._opening(state, v) - self._closing(state, v)
        fresh = tuple(u for u in self.sweep.succs[v] if not self.preds[u] & ~done)
        return _State(done, load, tuple(u for u in state.ready if u != v) + fresh, (v, state.path))

    def _settle(self, state: _State) -> _State:
        """Run whatever fits and does not raise the load."""
        todo = list(state.ready)
        while todo:
            v = todo.pop()
            if self._opening(state, v) <= self._closing(state, v) and self._fits(state, v):
                state = self._run(state, v)
                todo = list(state.ready)
        return state


def _bits(items: Iterable[int]) -> int:
    return sum(1 << item for item in set(items))


def _runs(path: tuple | None) -> list[int]:
    runs = []
    while path is not None:
        v, path = path
        runs.append(v)
    return runs[::-1]


def _gates(sweep: Sweep) -> int:
    """The runs that come before or after every other one in all orders, as bits."""
    n = sweep.n
    related = [0] * n
    for lists, numbers in ((sweep.preds, sweep.succs), (sweep.succs, sweep.preds)):
        reached = [0] * n
        for v in _topological(lists, numbers):
            reached[v] = 1 << v
            for u in lists[v]:
                reached[v] |= reached[u]
            related[v] |= reached[v]
    every = (1 << n) - 1
    return _bits(v for v in range(n) if related[v] == every)


def _topological(preds: tuple[tuple[int, ...], ...], succs: tuple[tuple[int, ...], ...]) -> list[int]:
    waiting = [len(p) for p in preds]
    order = [v for v, w in enumerate(waiting) if w == 0]
    for v in order:
        for u in succs[v]:
            waiting[u] -= 1
            if waiting[u] == 0:
                order.append(u)
    return order

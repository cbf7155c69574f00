"""Lower bounds on the peak of any order.

*Forced-live*: while op v runs, v's own bytes are live, and so is every buffer made by an ancestor of v and read by v or
a descendant of v.

*Cut*: whatever runs before v is a set closed under predecessors that holds v's ancestors and none of its descendants.
The buffers written inside that set and read outside it are live; the least their bytes can sum up to is a minimum cut.
It is never below the forced-live bytes, because every op that is free to run before or after v costs something either way.
"""

from __future__ import annotations

import time

import numpy as np
from ortools.graph.python import max_flow

from memplan.solvers.order.model import OrderModel

# Ops whose ancestors are held as bits at a time: a block of n ops takes n * BLOCK / 8 bytes (20 MB for 10,000 ops).
BLOCK = 8192


def forced_live(model: OrderModel) -> list[int]:
    """Per run, bytes that are live while it runs in every order, ``base`` included."""
    forced = np.array(model.made, dtype=np.int64) + np.array(model.extra, dtype=np.int64) + model.base
    for first in range(0, model.n, BLOCK):
        block = range(first, min(first + BLOCK, model.n))
        _add_forced(model, block, forced[first : block.stop])
    return [int(bytes_) for bytes_ in forced]


def _add_forced(model: OrderModel, block: range, forced: np.ndarray) -> None:
    """Add to ``forced``, for every run of the block, the buffers and held bytes of its ancestors that it must hold."""
    above, below = reach(model, block)
    for b, w in enumerate(model.writer):
        needed = 0
        for r in model.readers[b]:
            needed |= below[r]
        _add_at(forced, above[w] & needed, model.size[b], w - block.start)
    for w, size in enumerate(model.held):
        if size:
            _add_at(forced, above[w], size, w - block.start)


def reach(model: OrderModel, block: range) -> tuple[list[int], list[int]]:
    """Per run u, as bits over the block: the runs that u precedes, and those that precede u; u itself in both."""
    above, below = [0] * model.n, [0] * model.n
    for u in range(model.n):
        bits = 1 << (u - block.start) if u in block else 0
        for p in model.preds[u]:
            bits |= below[p]
        below[u] = bits
    for u in reversed(range(model.n)):
        bits = 1 << (u - block.start) if u in block else 0
        for s in model.succs[u]:
            bits |= above[s]
        above[u] = bits
    return above, below


def _add_at(forced: np.ndarray, bits: int, size: int, writer: int) -> None:
    """Add ``size`` where a bit is set, except at the writer, whose own bytes are counted."""
    if not bits:
        return
    low = (bits & -bits).bit_length() - 1
    bits >>= low
    n = bits.bit_length()
    flags = np.unpackbits(np.frombuffer(bits.to_bytes((n + 7) // 8, "little"), dtype=np.uint8), bitorder="little")
    forced[low : low + n] += size * flags[:n].astype(np.int64)
    if 0 <= writer < len(forced):
        forced[writer] -= size


def cut_bound(model: OrderModel, loads: dict[int, int], floor: int, work: int, deadline: float) -> int:
    """The largest minimum cut over the runs, at least ``floor``.

    ``loads``: what each run holds in some valid order, which no cut exceeds; runs are tried from the largest down until
    none can raise the bound, until graphs of ``work`` nodes in all have been cut, or until ``deadline`` (monotonic time).
    """
    best = floor
    for v in sorted(loads, key=lambda v: (-loads[v], v)):
        if loads[v] <= best or work < 0 or time.monotonic() > deadline:
            break
        work -= model.n
        best = max(best, cut_at(model, v))
    return best


def cut_at(model: OrderModel, v: int) -> int:
    """The least bytes that any order can hold while run v runs.

    Source side: what runs before v. A buffer pays when its writer is on that side and a reader is not; a junction
    behind the writer makes it pay once. Held bytes pay on the source side; arcs to predecessors keep that side closed.
    """
    source, sink, junction = model.n, model.n + 1, model.n + 2
    side = list(range(model.n))  # the node of each run; settled ones are merged
    for u in _closure(v, model.preds):
        side[u] = source
    for u in _closure(v, model.succs):
        side[u] = sink
    fixed = model.base + model.made[v] + model.extra[v]
    unlimited = sum(model.size) + sum(model.held) + 1
    flow = max_flow.SimpleMaxFlow()
    for u in range(model.n):
        if side[u] == source:
            fixed += model.held[u]
        elif side[u] == u:
            if model.held[u]:
                flow.add_arc_with_capacity(u, sink, model.held[u])
            for p in model.preds[u]:
                if side[p] == p:
                    flow.add_arc_with_capacity(u, p, unlimited)
    for b, w in enumerate(model.writer):
        ends = {side[r] for r in model.readers[b]} - {source}
        if side[w] == sink or not ends:
            continue
        if sink not in ends:
            flow.add_arc_with_capacity(side[w], junction, model.size[b])
            for end in ends:
                flow.add_arc_with_capacity(junction, end, unlimited)
            junction += 1
        elif side[w] == source:
            fixed += model.size[b]
        else:
            flow.add_arc_with_capacity(side[w], sink, model.size[b])
    solved = flow.solve(source, sink) == flow.OPTIMAL  # not so where no run is free: the graph lacks its terminals
    return fixed + int(flow.optimal_flow()) if solved else fixed


def _closure(v: int, neighbours: tuple[tuple[int, ...], ...]) -> set[int]:
    """v and everything reached from it."""
    found, todo = {v}, [v]
    while todo:
        for u in neighbours[todo.pop()]:
            if u not in found:
                found.add(u)
                todo.append(u)
    return found

"""Constructive placements: first fit and best fit in a given order, and best fit as time passes.

All work on sections (half-open ranges) and units; they return the height and fill ``off``.
"""

from __future__ import annotations

import numpy as np

from memplan.solvers.compiled import compiled


@compiled
def fit_in_order(order, begin, end, best, limit, height, lo, hi, size, off, where, ends):
    """Put order[begin:end] in turn into the lowest gap that holds each, or into the smallest such gap if ``best``.

    ``height`` is that of order[:begin], placed before. ``where`` (n × 3: lo, hi, offset) and ``ends`` hold what is
    placed, in order of offset, so that one scan meets the gaps of a lifetime from below. Returns the height; stops as
    soon as it is above ``limit``.
    """
    for m in range(begin, end):
        i = order[m]
        first, last, need = lo[i], hi[i], size[i]
        top, spot, least = np.int64(0), np.int64(-1), np.int64(1) << 62
        for p in range(m):
            if where[p, 0] < last and first < where[p, 1]:
                gap = where[p, 2] - top
                if need <= gap < least:
                    spot, least = top, gap
                    if not best:
                        break
                top = max(top, ends[p])
        if spot < 0:
            spot = top
        off[i] = spot
        height = max(height, spot + need)
        if height > limit:
            return height
        p = m
        while p > 0 and where[p - 1, 2] > spot:
            where[p] = where[p - 1]
            ends[p] = ends[p - 1]
            p -= 1
        where[p, 0], where[p, 1], where[p, 2] = first, last, spot
        ends[p] = spot + need
    return height


@compiled
def fit_in_time(order, lo, hi, size, off, live):
    """Best fit in the order of starts, gone buffers leaving room: linear in buffers times live ones.

    ``order`` is by (lo, …); ``live`` is scratch.
    """
    height = np.int64(0)
    count = 0
    for i in order:
        top, spot, least, at = np.int64(0), np.int64(-1), np.int64(1) << 62, 0
        kept = 0
        for p in range(count):
            k = live[p]
            if hi[k] <= lo[i]:
                continue
            live[kept] = k
            gap = off[k] - top
            if size[i] <= gap < least:
                spot, least, at = top, gap, kept
            top = off[k] + size[k]
            kept += 1
        if spot < 0:
            spot, at = top, kept
        off[i] = spot
        height = max(height, spot + size[i])
        for p in range(kept, at, -1):
            live[p] = live[p - 1]
        live[at] = i
        count = kept + 1
    return height

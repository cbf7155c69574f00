"""Exact branch and bound for one component: is there a placement of at most a given height?

It searches the *left-justified* placements, where every buffer stands at 0 or on top of a buffer whose lifetime meets
its own: if any placement fits, one of these does. Each open buffer carries a lower limit ``off`` of its offset. A node
takes the open buffer with the lowest limit (ties by rank) and branches in two: it stands exactly there, and every
open buffer that meets it goes above it; or it does not, and so must rest on an open buffer, which lifts its limit to
the lowest possible top of one. A section is a maximal set of buffers alive at one instant; with the buffers of a
section in order of limits, limit + bytes of all at or above it must not pass the capacity. When the open buffers fall
into groups with no lifetime in common, each group is searched on its own, and a group without a placement refutes
the node that split it off, whatever the other groups hold.

Canonical solutions, section inference and decomposition follow M. Moffitt, "MiniMalloc: A Lightweight Memory Allocator
for Hardware-Accelerated Machine Learning" (ASPLOS 2023). The second branch's lift stands in place of his dominance and
order rules, and the section bound also sees the gaps that limits leave; both make the tree smaller.
"""

from __future__ import annotations

import numpy as np

from memplan.solvers.compiled import compiled

# Registers of a search: the scalars that a paused search needs to go on.
# TOUCHED: a limit of a buffer in a tight section has changed since the section bound was last checked.
DEPTH, CELL, CELLS, POOL, TRAIL, FAILS, WORK, NEXT, TOUCHED = range(9)
REGISTERS = 9

# What ``advance`` returns.
SOLVED, REFUTED, PAUSED, FULL = range(4)

# Columns of the frame table: one row a placed buffer, with the marks to return to.
BUFFER, FRAME_CELL, TRAIL_MARK, CELL_MARK, POOL_MARK = range(5)
# Columns of the cell table: a group of open buffers, pool[START:END] in order of their limits.
START, END, FIRST, LAST, AFTER, OWNER = range(6)


@compiled
def lift(j, start, end, pool, off, size, lo, hi, reg):
    """Lowest top on which buffer j could rest among pool[start:end], the open ones of its cell; huge if there is none."""
    lowest = np.int64(1) << 62
    q = start
    while q < end and off[pool[q]] < lowest:
        k = pool[q]
        if k != j and lo[k] < hi[j] and lo[j] < hi[k]:
            lowest = min(lowest, off[k] + size[k])
        q += 1
    reg[WORK] += q - start
    return lowest


@compiled
def settle(cell, cells, pool, off, loose, size, lo, hi, twin, tlo, thi, late, placed, trail, reg):
    """Lift every limit of the cell that rests on nothing to the lowest top it can rest on.

    One sweep in order of limits is enough: what a buffer can rest on has a lower limit. Returns False when a buffer
    passes its latest offset.
    """
    start, end = cells[cell, START], cells[cell, END]
    q = start
    while q < end and reg[TRAIL] < len(trail):  # an unfinished sweep leaves valid limits
        j = pool[q]
        before = twin[j]
        target = np.int64(0)
        if before >= 0 and not placed[before]:
            target = off[before] + size[before]  # its twin comes first, and is also something to rest on
        elif loose[j]:
            target = lift(j, start, end, pool, off, size, lo, hi, reg)
        if target <= off[j]:
            q += 1
            continue
        if target > late[j]:
            reg[NEXT] = min(reg[NEXT], target + size[j])
            return False
        raise_limit(j, target, q, end, pool, off, loose, tlo, thi, trail, reg)
    reg[WORK] += end - start
    return True


@compiled
def raise_limit(j, target, at, end, pool, off, loose, tlo, thi, trail, reg):
    """Set off[j] to a higher limit that rests on nothing yet, and move j from pool[at] to its place in the order."""
    t = reg[TRAIL]
    trail[t, 0], trail[t, 1], trail[t, 2] = j, off[j], loose[j]
    reg[TRAIL] = t + 1
    off[j] = target
    loose[j] = True
    if thi[j] > tlo[j]:
        reg[TOUCHED] = 1
    q = at
    while q + 1 < end and off[pool[q + 1]] < target:
        pool[q] = pool[q + 1]
        q += 1
    pool[q] = j
    reg[WORK] += q - at


@compiled
def sections_hold(cell, cells, pool, off, size, tlo, thi, capacity, above, tight, weight, reg):
    """The section bound over the tight sections of a cell; the sections that break it gain weight."""
    start, end = cells[cell, START], cells[cell, END]
    first, last = np.int64(1) << 62, np.int64(0)
    for q in range(start, end):
        j = pool[q]
        if thi[j] > tlo[j]:
            first, last = min(first, tlo[j]), max(last, thi[j])
    for c in range(first, last):
        above[c] = 0
    for q in range(end - 1, start - 1, -1):
        j = pool[q]
        most = np.int64(0)
        for c in range(tlo[j], thi[j]):
            above[c] += size[j]
            most = max(most, above[c])
        reg[WORK] += 1 + (thi[j] - tlo[j]) // 4
        if off[j] + most > capacity:
            reg[NEXT] = min(reg[NEXT], off[j] + most)
            for c in range(tlo[j], thi[j]):
                if off[j] + above[c] > capacity:
                    weight[tight[c]] += 1.0
            return False
    return True


@compiled
def pick(cell, cells, pool, off, rank):
    """Position in the pool of the buffer to branch on: the lowest limit, then the lowest rank."""
    start, end = cells[cell, START], cells[cell, END]
    best = start
    for q in range(start + 1, end):
        if off[pool[q]] > off[pool[start]]:
            break
        if rank[pool[q]] < rank[pool[best]]:
            best = q
    return best


@compiled
def place(
    at, cell, cells, pool, off, loose, size, lo, hi, tlo, thi, late, placed, cover, total, weight, capacity,
    frames, trail, reg,
):  # fmt: skip
    """Put pool[at] at its limit: a new frame, higher limits for the rest of the cell, and the cells that remain.

    Returns False when the rest cannot fit above it.
    """
    j = pool[at]
    d = reg[DEPTH]
    frames[d, BUFFER], frames[d, FRAME_CELL] = j, cell
    frames[d, TRAIL_MARK], frames[d, CELL_MARK], frames[d, POOL_MARK] = reg[TRAIL], reg[CELLS], reg[POOL]
    reg[DEPTH] = d + 1
    placed[j] = True
    top = off[j] + size[j]
    split = False
    most = np.int64(0)
    for s in range(lo[j], hi[j]):
        total[s] -= size[j]
        most = max(most, total[s])
    for s in range(lo[j] + 1, hi[j]):
        cover[s] -= 1
        split |= cover[s] == 0
    start, end = cells[cell, START], cells[cell, END]
    reg[WORK] += (end - start) + (hi[j] - lo[j]) // 4
    if top + most > capacity or off[j] > late[j]:
        reg[NEXT] = min(reg[NEXT], top + most)
        for s in range(lo[j], hi[j]):
            if top + total[s] > capacity:
                weight[s] += 1.0
        return False
    # Open buffers that meet j and whose limit is at most its top go to exactly that: one block in the order, gathered
    # in the free part of the pool.
    new = reg[POOL]
    kept, block = new, new + end - start
    t = reg[TRAIL]
    q = start
    while q < end and off[pool[q]] <= top:
        k = pool[q]
        q += 1
        if k == j:
            continue
        if lo[k] >= hi[j] or lo[j] >= hi[k]:
            pool[kept] = k
            kept += 1
            continue
        if off[k] < top or loose[k]:
            if top > late[k]:
                reg[NEXT] = min(reg[NEXT], top + size[k])
                reg[TRAIL] = t
                return False
            trail[t, 0], trail[t, 1], trail[t, 2] = k, off[k], loose[k]
            t += 1
            off[k] = top
            loose[k] = False
            if thi[k] > tlo[k]:
                reg[TOUCHED] = 1
        pool[block] = k
        block += 1
    reg[TRAIL] = t
    for p in range(new + end - start, block):
        pool[kept] = pool[p]
        kept += 1
    for p in range(q, end):
        pool[kept] = pool[p]
        kept += 1
    split_cell(cell, new, kept, split, d, cells, pool, lo, cover, total, reg)
    return True


@compiled
def split_cell(parent, start, end, split, owner, cells, pool, lo, cover, total, reg):
    """Make pool[start:end] the new current cell, or one cell a group where no lifetime spans a boundary."""
    first, last = cells[parent, FIRST], cells[parent, LAST]
    after = cells[parent, AFTER]
    new = reg[CELLS]
    if not split:
        if end > start:
            cells[new, START], cells[new, END], cells[new, FIRST], cells[new, LAST] = start, end, first, last
            cells[new, AFTER], cells[new, OWNER] = after, owner
            after = new
            new += 1
        else:
            reg[TOUCHED] = 1
        reg[CELL], reg[CELLS], reg[POOL] = after, new, end
        return
    reg[TOUCHED] = 1
    free = end
    left = first
    for s in range(first + 1, last + 1):
        if s < last and cover[s] > 0:
            continue
        if total[left] == 0:  # one section with nothing open in it
            left = s
            continue
        begin = free
        for q in range(start, end):
            if left <= lo[pool[q]] < s:
                pool[free] = pool[q]
                free += 1
        reg[WORK] += end - start
        if free > begin:
            cells[new, START], cells[new, END], cells[new, FIRST], cells[new, LAST] = begin, free, left, s
            cells[new, AFTER], cells[new, OWNER] = after, owner
            after = new
            new += 1
        left = s
    reg[CELL], reg[CELLS], reg[POOL] = after, new, free


@compiled
def undo(d, pool, off, loose, size, lo, hi, placed, cover, total, frames, trail, reg):
    """Take back every placement from frame d on, and the limits that followed from them."""
    for f in range(d, reg[DEPTH]):
        j = frames[f, BUFFER]
        placed[j] = False
        for s in range(lo[j], hi[j]):
            total[s] += size[j]
        for s in range(lo[j] + 1, hi[j]):
            cover[s] += 1
    for t in range(reg[TRAIL] - 1, frames[d, TRAIL_MARK] - 1, -1):
        j = trail[t, 0]
        off[j] = trail[t, 1]
        loose[j] = trail[t, 2] != 0
    reg[TRAIL], reg[CELLS], reg[POOL] = frames[d, TRAIL_MARK], frames[d, CELL_MARK], frames[d, POOL_MARK]
    reg[DEPTH], reg[CELL] = d, frames[d, FRAME_CELL]


@compiled
def advance(
    budget, most_fails, capacity, size, late, lo, hi, twin, rank, tlo, thi, tight,
    off, loose, placed, cover, total, above, weight, pool, cells, frames, trail, reg,
):  # fmt: skip
    """Go on with a search until it is SOLVED, REFUTED or PAUSED, or FULL: out of memory for its alternatives.

    ``budget`` counts elementary steps of this call, ``most_fails`` the failed nodes of the whole search. Arrays over
    buffers: size, late (latest offset), lo and hi (sections), twin (the previous identical buffer or -1; twins stand
    in order), rank, tlo and thi (tight sections), off, loose (the limit rests on nothing yet), placed. Arrays over
    sections: cover (open buffers that span the boundary before it), total (open bytes), weight.
    """
    stop = reg[WORK] + budget
    while reg[WORK] < stop and reg[FAILS] < most_fails:
        cell = reg[CELL]
        width = cells[cell, END] - cells[cell, START]
        if (
            reg[POOL] + 2 * width > len(pool)
            or reg[CELLS] + width + 1 > len(cells)
            or reg[TRAIL] + 2 * width + 1 > len(trail)
        ):
            return FULL
        fits = settle(cell, cells, pool, off, loose, size, lo, hi, twin, tlo, thi, late, placed, trail, reg)
        if reg[TRAIL] + width + 1 > len(trail):
            return FULL
        if fits and reg[TOUCHED]:
            fits = sections_hold(cell, cells, pool, off, size, tlo, thi, capacity, above, tight, weight, reg)
        owner = cells[cell, OWNER]
        reg[TOUCHED] = 0
        if fits:
            at = pick(cell, cells, pool, off, rank)
            if place(
                at, cell, cells, pool, off, loose, size, lo, hi, tlo, thi, late, placed, cover, total, weight,
                capacity, frames, trail, reg,
            ):  # fmt: skip
                if reg[CELL] < 0:
                    return SOLVED
                continue
            owner = reg[DEPTH] - 1
        while True:  # back to the node that split the failing cell off, and there to its second branch
            reg[FAILS] += 1
            if owner < 0:
                return REFUTED
            undo(owner, pool, off, loose, size, lo, hi, placed, cover, total, frames, trail, reg)
            j = frames[owner, BUFFER]
            cell = reg[CELL]
            start, end = cells[cell, START], cells[cell, END]
            target = lift(j, start, end, pool, off, size, lo, hi, reg)
            if target <= late[j]:
                at = start
                while pool[at] != j:
                    at += 1
                raise_limit(j, target, at, end, pool, off, loose, tlo, thi, trail, reg)
                break
            reg[NEXT] = min(reg[NEXT], target + size[j])
            owner = cells[cell, OWNER]
    return PAUSED

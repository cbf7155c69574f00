"""Proof that no sequence at all keeps a budget: a pebble game on the large buffers, played out in full.

Small buffers are taken to be always there and to weigh nothing, and any op may run any number of times; a budget under
which some op can never run even so is infeasible for every order and every recomputation.
"""

from __future__ import annotations

from memplan.problem import Problem

WORK = 2_000_000  # pairs of a set of held buffers and an op that all games together may look at; about 0.5 s
HALVINGS = 8  # of the interval between the bound and the peak: to 0.4 % of it
LARGEST = 400  # buffers in a game


def reach_bound(problem: Problem, floor: int, peak: int, work: int = WORK) -> int:
    """The largest bound on any sequence's peak that the games prove, between a known bound and a known peak."""
    if floor >= peak or proves_infeasible(problem, peak - 1, work):
        return peak
    low, high = floor, peak - 1
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        if low < high and proves_infeasible(problem, middle, work // 4):
            low = middle + 1
        else:
            high = middle
    return low


def proves_infeasible(problem: Problem, budget: int, work: int = WORK) -> bool:
    """Whether no sequence keeps ``budget`` bytes, resident ones included; False means only that no proof was found.

    Games with more and more of the buffers, the largest first, until one proves it or the work is spent.
    """
    room = budget - problem.resident_bytes
    left = work
    sizes = sorted({b.size for b, w in zip(problem.buffers, problem.writer, strict=True) if w >= 0}, reverse=True)
    for least in sizes:
        if least * 16 < sizes[0]:
            return False  # what is so small hardly stands in the way, and makes the game large
        able, spent = _everything_runs(problem, room, least, left)
        left -= spent
        if able is None:
            return False
        if not able:
            return True
    return False


def _everything_runs(problem: Problem, room: int, least: int, work: int) -> tuple[bool | None, int]:
    """Whether every op can run in the game with buffers from ``least`` bytes on, and the work done; None: too large."""
    large = [b for b, w in enumerate(problem.writer) if w >= 0 and problem.buffers[b].size >= least]
    if len(large) > LARGEST:
        return None, 0
    bit = {b: 1 << at for at, b in enumerate(large)}
    size = {bit[b]: problem.buffers[b].size for b in large}
    moves = []
    for i, op in enumerate(problem.ops):
        reads = sum(bit[b] for b in problem.operands[i] if b in bit)
        writes = sum(bit[b] for b in op.writes if b in bit)
        moves.append((reads, writes, op.workspace))
    waiting = {(reads, writes, workspace) for reads, writes, workspace in moves if reads or writes}
    useful = {(reads, writes, workspace) for reads, writes, workspace in waiting if writes}
    seen = {0: 0}  # held buffers → their bytes
    stack = [0]
    while stack:
        held = stack.pop()
        weight = seen[held]
        ran = [m for m in waiting if not m[0] & ~held and weight + _weight(m[1] & ~held, size) + m[2] <= room]
        waiting.difference_update(ran)
        if not waiting:
            return True, len(seen) * len(moves)
        after = [
            (held | writes, weight + more)
            for reads, writes, workspace in useful
            if not reads & ~held
            and writes & ~held
            and weight + (more := _weight(writes & ~held, size)) + workspace <= room
        ]
        rest = held
        while rest:  # let one buffer go
            one = rest & -rest
            rest ^= one
            after.append((held ^ one, weight - size[one]))
        for state, bytes_held in after:
            if state not in seen:
                seen[state] = bytes_held
                stack.append(state)
        if len(seen) * len(moves) > work:
            return None, work
    return False, len(seen) * len(moves)


def _weight(buffers: int, size: dict[int, int]) -> int:
    total = 0
    while buffers:
        one = buffers & -buffers
        total += size[one]
        buffers ^= one
    return total

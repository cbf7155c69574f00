"""Branch and bound with restarts: short searches under different ranks that learn where placements fail."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memplan.solvers.placement import branch
from memplan.solvers.placement.component import Component, Ints, sweep

# The section bound is kept on the fullest sections as far as one dive to a placement stays below this many additions
# (50 ms): every section for up to about 600 buffers, one for 20,000.
DIVE_ADDITIONS = 1 << 24
MOST_ALTERNATIVES = 1 << 21  # entries that keep what a search can return to: some 50 MiB
NO_LIMIT = np.int64(1) << 62


class Search:
    """One branch and bound over a component, to be run in slices of bounded work; reused by ``begin``."""

    def __init__(self, component: Component) -> None:
        c, n, sections = component, len(component), component.sections
        self.component = c
        self.tight = tight_sections(c)
        rank_of = np.concatenate([[0], np.cumsum(np.isin(np.arange(sections), self.tight))]).astype(np.int64)
        # Indices in 32 bits: a node's cost is the memory it reads.
        self.lo, self.hi, self.twin = c.lo.astype(np.int32), c.hi.astype(np.int32), c.twin.astype(np.int32)
        self.tlo, self.thi = rank_of[c.lo].astype(np.int32), rank_of[c.hi].astype(np.int32)
        self.weight = np.zeros(sections)
        self.off = np.zeros(n, np.int64)
        self.loose = np.zeros(n, np.bool_)
        self.placed = np.zeros(n, np.bool_)
        self.cover = np.zeros(sections, np.int64)
        self.total = np.zeros(sections, np.int64)
        self.above = np.zeros(len(self.tight), np.int64)
        self.pool = np.zeros(min(n * (n + 4), MOST_ALTERNATIVES) + 4 * n, np.int32)
        self.cells = np.zeros((min(n * (n + 4), MOST_ALTERNATIVES // 8) + 4 * n, 6), np.int64)
        self.trail = np.zeros((min(n * (n + 4), MOST_ALTERNATIVES // 2) + 8 * n, 3), np.int64)
        self.frames = np.zeros((n + 1, 5), np.int64)
        self.reg = np.zeros(branch.REGISTERS, np.int64)

    def begin(self, capacity: int, late: Ints, rank: Ints) -> None:
        """Start anew: no limits but those of twins, nothing placed, one cell with everything."""
        c, n = self.component, len(self.component)
        self.capacity, self.late, self.rank = capacity, late, rank.astype(np.int32)
        self.complete = True
        self.off[:] = 0
        self.loose[:] = False
        self.placed[:] = False
        for j in c.alike:  # every twin before its follower
            if c.twin[j] >= 0:
                self.off[j] = self.off[c.twin[j]] + c.size[j]
                self.loose[j] = True
        self.total[:] = c.load
        self.cover[:] = sweep(c.lo + 1, c.hi, np.ones(n, np.int64), c.sections + 1)[:-1]
        self.weight[:] = 0.0
        self.pool[:n] = np.argsort(self.off, kind="stable")
        self.cells[0] = (0, n, 0, c.sections, -1, -1)
        self.reg[:] = 0
        self.reg[branch.CELLS], self.reg[branch.POOL], self.reg[branch.NEXT] = 1, n, NO_LIMIT
        self.reg[branch.TOUCHED] = 1

    def advance(self, budget: int, most_fails: int) -> int:
        """Go on for about ``budget`` steps or up to ``most_fails`` failed nodes in all: SOLVED, REFUTED or PAUSED.

        REFUTED is a proof only while ``complete``.
        """
        c = self.component
        while True:
            outcome = branch.advance(
                budget, most_fails, self.capacity, c.size, self.late, self.lo, self.hi, self.twin, self.rank,
                self.tlo, self.thi, self.tight, self.off, self.loose, self.placed, self.cover, self.total, self.above,
                self.weight, self.pool, self.cells, self.frames, self.trail, self.reg,
            )  # fmt: skip
            if outcome != branch.FULL:
                return int(outcome)
            self._commit()

    def _commit(self) -> None:
        """Forget the alternatives to all that is placed so far, which gives their memory back; no longer complete."""
        rows, used = [], 0
        bodies = []
        cell = int(self.reg[branch.CELL])
        while cell >= 0:
            row = self.cells[cell].copy()
            bodies.append(self.pool[row[branch.START] : row[branch.END]].copy())
            row[branch.START], row[branch.END] = used, used + len(bodies[-1])
            used += len(bodies[-1])
            rows.append(row)
            cell = int(row[branch.AFTER])
        for k, row in enumerate(rows):
            row[branch.AFTER] = k + 1 if k + 1 < len(rows) else -1
            row[branch.OWNER] = -1
            self.cells[k] = row
        self.pool[:used] = np.concatenate(bodies)
        self.complete = False
        self.reg[branch.CELL], self.reg[branch.CELLS], self.reg[branch.POOL] = 0, len(rows), used
        self.reg[branch.TRAIL] = self.reg[branch.DEPTH] = 0

    @property
    def work(self) -> int:
        return int(self.reg[branch.WORK])

    @property
    def fails(self) -> int:
        return int(self.reg[branch.FAILS])

    @property
    def next_height(self) -> int:
        """After a proof of infeasibility: the lowest height at which this search would have gone another way."""
        return int(self.reg[branch.NEXT])


def tight_sections(component: Component) -> Ints:
    """The fullest sections, as many as a dive can afford, in order of time."""
    c = component
    fullest = np.argsort(-c.load, kind="stable")
    within = np.cumsum(c.members[fullest]) <= DIVE_ADDITIONS // len(c)
    within[0] = True
    return np.sort(fullest[within]).astype(np.int64)


@dataclass(frozen=True)
class Ranking:
    """How a search ranks buffers: by the product of powers of their features, the largest first."""

    width: float  # exponent of the number of sections
    size: float
    length: float = 0.0  # of the lifetime
    total: float = 0.0  # of the largest load of its sections
    learning: float = 0.0  # of how often its sections failed before, relative to the mean
    noise: float = 0.0  # standard deviation of the logarithm


# As they are: nearly lexicographic ones (MiniMalloc's) and plain products. Area alone is the best on large instances.
FIRST = (
    Ranking(0, 1, 1),
    Ranking(1, 0.01, 0.01, 100),
    Ranking(1, 0.01, 0.01),
    Ranking(0.01, 1),
    Ranking(1, 0.3, 0, 5),
    Ranking(1, 0.3),
)
# With learning: no one of these is best on most instances, so restarts take them in turn.
LEARNT = tuple(
    Ranking(1, size, 0, total, learning, 0.03)
    for learning in (1.0, 0.5)
    for size in (0.0, 0.3, 0.7)
    for total in (0, 5)
)


def ranking(turn: int) -> Ranking:
    """The ranking of the turn-th search of a component."""
    return FIRST[turn] if turn < len(FIRST) else LEARNT[(turn - len(FIRST)) % len(LEARNT)]


def ranks(component: Component, ranking: Ranking, weight: NDArray[np.float64], rng: np.random.Generator) -> Ints:
    """Rank of each buffer under a ranking, 0 first. ``weight``: failures of each section, as far as they count."""
    c = component
    score = ranking.width * np.log(c.hi - c.lo) + ranking.size * np.log(c.size) + ranking.length * np.log(c.length)
    if ranking.total:
        score += ranking.total * np.log(c.fullest)
    if ranking.learning and weight.sum() > 0:
        before = np.concatenate([[0.0], np.cumsum(weight)])
        mean = (before[c.hi] - before[c.lo]) / (c.hi - c.lo)
        score += ranking.learning * np.log(mean / weight.mean() + 1e-3)
    if ranking.noise:
        score += ranking.noise * rng.standard_normal(len(c))
    rank = np.empty(len(c), np.int64)
    rank[np.argsort(-score, kind="stable")] = np.arange(len(c))
    return rank

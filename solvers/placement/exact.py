"""Branch and bound with restarts: short searches under different ranks that learn where placements fail."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memplan.solvers.placement import branch
from memplan.solvers.placement.component import Component, Ints, sweep

# The section bound is kept on the fullest sections only as far as a node stays cheap: this many memberships cover every
# section of instances of up to about 1,000 buffers.
TIGHT_MEMBERSHIPS = 1 << 16
MOST_ALTERNATIVES = 1 << 22  # entries of the pool and of the trail that keep what a search can return to: 128 MiB
NO_LIMIT = np.int64(1) << 62


class Search:
    """One branch and bound over a component, to be run in slices of bounded work; reused by ``begin``."""

    def __init__(self, component: Component) -> None:
        c, n, sections = component, len(component), component.sections
        self.component = c
        self.tight = tight_sections(c)
        rank_of = np.concatenate([[0], np.cumsum(np.isin(np.arange(sections), self.tight))]).astype(np.int64)
        self.tlo, self.thi = rank_of[c.lo], rank_of[c.hi]
        self.weight = np.zeros(sections)
        self.off = np.zeros(n, np.int64)
        self.loose = np.zeros(n, np.bool_)
        self.placed = np.zeros(n, np.bool_)
        self.cover = np.zeros(sections, np.int64)
        self.total = np.zeros(sections, np.int64)
        self.above = np.zeros(len(self.tight), np.int64)
        self.pool = np.zeros(min(n * (n + 4), MOST_ALTERNATIVES) + 4 * n, np.int64)
        self.cells = np.zeros((min(n * (n + 4), MOST_ALTERNATIVES // 8) + 4 * n, 6), np.int64)
        self.trail = np.zeros((min(n * (n + 4), MOST_ALTERNATIVES // 2) + 8 * n, 3), np.int64)
        self.frames = np.zeros((n + 1, 5), np.int64)
        self.reg = np.zeros(branch.REGISTERS, np.int64)

    def begin(self, capacity: int, late: Ints, rank: Ints) -> None:
        """Start anew: no limits but those of twins, nothing placed, one cell with everything."""
        c, n = self.component, len(self.component)
        self.capacity, self.late, self.rank = capacity, late, rank
        self.complete = True
        self.off[:] = 0
        self.loose[:] = False
        self.placed[:] = False
        for j in np.lexsort((np.arange(n), c.size, c.hi, c.lo)):  # every twin before its follower
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

    def advance(self, budget: int, most_fails: int) -> int:
        """Go on for about ``budget`` steps or up to ``most_fails`` failed nodes in all: SOLVED, REFUTED or PAUSED.

        REFUTED is a proof only while ``complete``.
        """
        c = self.component
        while True:
            outcome = branch.advance(
                budget, most_fails, self.capacity, c.size, self.late, c.lo, c.hi, c.twin, self.rank,
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
    """The fullest sections whose memberships stay within TIGHT_MEMBERSHIPS, in order of time."""
    c = component
    members = sweep(c.lo, c.hi, np.ones(len(c), np.int64), c.sections)
    fullest = np.argsort(-c.load, kind="stable")
    within = np.cumsum(members[fullest]) <= TIGHT_MEMBERSHIPS
    within[0] = True
    return np.sort(fullest[within]).astype(np.int64)


@dataclass(frozen=True)
class Ranking:
    """How a search ranks buffers: larger features first, scaled by where earlier searches failed and by noise."""

    features: tuple[str, ...]
    learning: float = 0.0  # exponent of the relative failure weight of a buffer's sections
    noise: float = 0.0  # standard deviation of the logarithm


FEATURES = {
    "area": lambda c: c.size * c.length,
    "width": lambda c: c.hi - c.lo,
    "size": lambda c: c.size,
    "total": lambda c: np.array([c.load[a:b].max() for a, b in zip(c.lo, c.hi, strict=True)]),
}
BASES = (("width", "area"), ("total", "width", "area"), ("area",), ("width", "size"), ("size", "width"))


def ranks(component: Component, ranking: Ranking, weight: NDArray[np.float64], rng: np.random.Generator) -> Ints:
    """Rank of each buffer under a ranking, 0 first."""
    c = component
    scale = np.ones(len(c))
    if ranking.learning and weight.sum() > 0:
        before = np.concatenate([[0.0], np.cumsum(weight)])
        mean = (before[c.hi] - before[c.lo]) / (c.hi - c.lo)
        scale = (mean / weight.mean() + 1e-3) ** ranking.learning
    keys = []
    for feature in reversed(ranking.features):
        noise = np.exp(ranking.noise * rng.standard_normal(len(c))) if ranking.noise else 1.0
        keys.append(-(FEATURES[feature](c) * scale * noise))
    rank = np.empty(len(c), np.int64)
    rank[np.lexsort(keys)] = np.arange(len(c))
    return rank

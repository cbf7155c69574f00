"""From a placement problem to independent components in units: the form that the engines work on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from memplan.solvers.placement.problem import PlacementProblem

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Component:
    """Buffers whose lifetimes form one connected group, with time reduced to sections.

    A section is a maximal set of buffers alive at one instant; every buffer is alive over the half-open range
    ``[lo, hi)`` of sections, and two buffers meet exactly when these ranges do. Sizes are in units.
    """

    index: Ints  # which buffers of the problem
    size: Ints
    lo: Ints
    hi: Ints
    length: Ints  # lifetime in the problem's own time
    padding: Ints  # bytes that rounding added to each size
    unit: int  # bytes

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def sections(self) -> int:
        return int(self.hi.max())

    @cached_property
    def load(self) -> Ints:
        """Units alive in each section."""
        return sweep(self.lo, self.hi, self.size, self.sections)

    @cached_property
    def members(self) -> Ints:
        """Buffers alive in each section."""
        return sweep(self.lo, self.hi, np.ones_like(self.lo), self.sections)

    @cached_property
    def bound(self) -> int:
        """The largest load: no placement is lower."""
        return int(self.load.max())

    @cached_property
    def fullest(self) -> Ints:
        """For each buffer the largest load of its sections."""
        return np.array([self.load[lo:hi].max() for lo, hi in zip(self.lo, self.hi, strict=True)], np.int64)

    def height(self, off: Ints) -> int:
        """Units that a placement takes."""
        return int((off + self.size).max())

    def bytes_of(self, off: Ints) -> int:
        """Bytes that a placement takes: its topmost buffer needs no padding."""
        return int(((off + self.size) * self.unit - self.padding).max())

    @cached_property
    def alike(self) -> Ints:
        """The buffers in an order that puts identical ones side by side."""
        return np.lexsort((np.arange(len(self)), self.padding, self.size, self.hi, self.lo))

    @cached_property
    def twin(self) -> Ints:
        """For each buffer the previous one of the same sections and size, -1 without one."""
        order = self.alike
        key = np.stack([self.lo, self.hi, self.size, self.padding])[:, order]
        same = (key[:, 1:] == key[:, :-1]).all(axis=0)
        twin = np.full(len(self), -1, np.int64)
        twin[order[1:][same]] = order[:-1][same]
        return twin


@dataclass(frozen=True)
class Reduced:
    """A problem in units of ``unit`` bytes. Buffers that take no room (no bytes or no lifetime) are in no component."""

    components: tuple[Component, ...]
    unit: int
    bound: int  # bytes


def sweep(lo: Ints, hi: Ints, amount: Ints, sections: int) -> Ints:
    """Sum of the amounts alive in each section."""
    change = np.zeros(sections + 1, np.int64)
    np.add.at(change, lo, amount)
    np.subtract.at(change, hi, amount)
    return np.cumsum(change)[:-1]


def reduce_problem(problem: PlacementProblem) -> Reduced:
    """Round sizes up to the alignment, divide by what they all share, reduce time to sections, split at empty cuts.

    Rounding loses nothing: the next offset above a buffer is a multiple of the alignment anyway. In a left-justified
    placement every offset is a sum of sizes, so dividing by their greatest common divisor loses nothing either.
    """
    lower, upper = np.array(problem.lower, np.int64), np.array(problem.upper, np.int64)
    true_size = np.array(problem.size, np.int64)
    taking = np.flatnonzero((true_size > 0) & (upper > lower))
    floor = int(true_size.max(initial=0))  # a buffer without a lifetime still counts in the height
    if not len(taking):
        return Reduced((), problem.alignment, floor)
    lower, upper, true_size = lower[taking], upper[taking], true_size[taking]
    rounded = -(-true_size // problem.alignment) * problem.alignment
    unit = int(np.gcd.reduce(rounded))
    size = rounded // unit
    lo, hi = sections_of(lower, upper)
    count = int(hi.max())
    spanned = sweep(lo + 1, hi, np.ones_like(lo), count + 1)[:-1]  # buffers alive across the boundary before a section
    cuts = np.flatnonzero(spanned == 0)
    group = np.searchsorted(cuts, lo, side="right") - 1
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    components = tuple(
        Component(
            index=taking[m],
            size=size[m],
            lo=lo[m] - lo[m].min(),
            hi=hi[m] - lo[m].min(),
            length=(upper - lower)[m],
            padding=(rounded - true_size)[m],
            unit=unit,
        )
        for m in members
    )
    return Reduced(components, unit, max(floor, max(_bound_in_bytes(c) for c in components)))


def _bound_in_bytes(c: Component) -> int:
    """The largest load, less what the topmost buffer of a section need not be padded by."""
    if not c.padding.any():
        return c.bound * c.unit
    least = np.zeros(c.sections, np.int64)
    for lo, hi, padding in zip(c.lo, c.hi, c.padding, strict=True):
        np.maximum(least[lo:hi], padding, out=least[lo:hi])
    return int((c.load * c.unit - least).max())


def sections_of(lower: Ints, upper: Ints) -> tuple[Ints, Ints]:
    """Ranges [lo, hi) of sections for half-open, non-empty lifetimes. A section ends where a start follows an end."""
    n = len(lower)
    times = np.concatenate([upper, lower])
    starts = np.repeat([0, 1], n)
    order = np.lexsort((starts, times))  # at one time ends come first
    is_start = starts[order] == 1
    opens = is_start & np.concatenate([[True], ~is_start[:-1]])
    section = np.empty(2 * n, np.int64)
    section[order] = np.cumsum(opens)
    return section[n:] - 1, section[:n]

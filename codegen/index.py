"""Index arithmetic of a fused kernel: every index is linear in the kernel's *atoms*.

An atom is a factor of the iteration space that no view inside the region splits. A reshape divides and takes remainders
of linear forms; where a remainder would cross an atom, :class:`SplitAtom` asks for a finer space and the work is redone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memplan.errors import UnsupportedError

Bounds = Mapping[int, tuple[int, int]]  # atom -> inclusive range of its values where an expression is evaluated


@dataclass(frozen=True)
class Linear:
    """``const`` + sum of coefficient x atom. ``terms`` are sorted by atom; no coefficient is 0."""

    terms: tuple[tuple[int, int], ...] = ()  # (atom, coefficient)
    const: int = 0

    @classmethod
    def atom(cls, atom: int, coefficient: int = 1) -> Linear:
        return cls(((atom, coefficient),)) if coefficient else cls()

    @property
    def atoms(self) -> frozenset[int]:
        return frozenset(a for a, _ in self.terms)

    def coefficient(self, atom: int) -> int:
        return dict(self.terms).get(atom, 0)

    def __add__(self, other: Linear | int) -> Linear:
        if isinstance(other, int):
            return Linear(self.terms, self.const + other)
        total = dict(self.terms)
        for atom, coefficient in other.terms:
            total[atom] = total.get(atom, 0) + coefficient
        return Linear(tuple(sorted((a, c) for a, c in total.items() if c)), self.const + other.const)

    def __mul__(self, factor: int) -> Linear:
        return Linear(tuple((a, c * factor) for a, c in self.terms) if factor else (), self.const * factor)

    def span(self, bounds: Bounds) -> tuple[int, int]:
        """Least and greatest value."""
        low = self.const + sum(min(c * bounds[a][0], c * bounds[a][1]) for a, c in self.terms)
        high = self.const + sum(max(c * bounds[a][0], c * bounds[a][1]) for a, c in self.terms)
        return low, high


Index = tuple[Linear, ...]  # one form a dimension


class SplitAtom(Exception):
    """The atom must become two: an outer one and an inner one of extent ``inner``."""

    def __init__(self, atom: int, inner: int) -> None:
        super().__init__(f"split atom {atom} at {inner}")
        self.atom, self.inner = atom, inner


def flat_strides(shape: Sequence[int]) -> list[int]:
    """Row-major strides of a dense tensor."""
    strides = [1] * len(shape)
    for d in reversed(range(len(shape) - 1)):
        strides[d] = strides[d + 1] * shape[d + 1]
    return strides


def offset(index: Index, strides: Sequence[int]) -> Linear:
    """Where an element lies: the sum of index x stride."""
    total = Linear()
    for form, stride in zip(index, strides):
        total = total + form * stride
    return total


def divide(form: Linear, divisor: int, bounds: Bounds) -> tuple[Linear, Linear]:
    """Quotient and remainder (floor), both linear. Raises SplitAtom where a finer space would make them so."""
    quotient = Linear(tuple((a, c // divisor) for a, c in form.terms if c % divisor == 0))
    rest = Linear(tuple((a, c) for a, c in form.terms if c % divisor), form.const)
    low, high = rest.span(bounds)
    if low // divisor == high // divisor:
        carry = low // divisor
        return quotient + carry, rest + (-carry * divisor)
    for atom, coefficient in rest.terms:
        extent = bounds[atom][1] + 1
        if 0 < coefficient < divisor and divisor % coefficient == 0:
            inner = divisor // coefficient
            if inner < extent and extent % inner == 0:
                raise SplitAtom(atom, inner)
    raise UnsupportedError(f"an index cannot be divided by {divisor} within one loop nest")


def reshape(index: Index, old: Sequence[int], new: Sequence[int], bounds: Bounds) -> Index:
    """The index into ``new`` of the element that ``index`` names in ``old`` (both row-major, equal numel)."""
    rest = offset(index, flat_strides(old))
    result = []
    for extent, stride in zip(new, flat_strides(new)):
        if extent == 1:
            result.append(Linear())
            continue
        here, rest = divide(rest, stride, bounds)
        result.append(here)
    return tuple(result)


def broadcast(index: Index, shape: Sequence[int]) -> Index:
    """The index into an operand of ``shape`` that broadcasts to a result with ``index``."""
    aligned = index[len(index) - len(shape) :]
    return tuple(Linear() if extent == 1 else form for form, extent in zip(aligned, shape))

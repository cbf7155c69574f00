"""What a kernel was seen to allocate, and which of it are the results that its Program plans for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memplan.capture import tensors
from memplan.place import SCALAR, Kernel
from memplan.program import Program
from memplan.runtime.native import Allocation


@dataclass(frozen=True)
class Recorded:
    """A kernel that ran: the joint Program's step, its allocations, and which of them are which storages."""

    step: int
    allocations: tuple[Allocation, ...]
    results: dict[int, int]

    @property
    def own(self) -> list[int]:
        """Allocations that the kernel takes for itself; torch places numbers."""
        return [k for k, a in enumerate(self.allocations) if k not in self.results and a.size > SCALAR]

    @property
    def kernel(self) -> Kernel:
        spans = ((a.size, a.born, a.died) for a in (self.allocations[k] for k in self.own))
        return Kernel(tuple(spans), {storage: self.allocations[k].born for k, storage in self.results.items()})


def addresses(value: Any) -> tuple[int | None, ...]:
    """Where the results of a call lie: None for one that was left out, 0 for one that takes no bytes."""
    found: list[int | None] = []
    for part in value if isinstance(value, (tuple, list)) else (value,):
        storages = [tensor.untyped_storage() for tensor in tensors(part)]
        found += [storage.data_ptr() if storage.nbytes() else 0 for storage in storages] if part is not None else [None]
    return tuple(found)


def matched(
    program: Program, step: int, results: Sequence[int | None], allocations: Sequence[Allocation]
) -> Recorded | None:
    """The kernel of a step whose ``results`` lie there; None where it allocates otherwise than planned."""
    made = program.steps[step].makes
    if len(results) == len(made):  # a second run may leave results out
        made = tuple(storage for storage, address in zip(made, results, strict=True) if address is not None)
    made = tuple(storage for storage in made if program.storages[storage].size)
    born = {a.address: k for k, a in enumerate(allocations)}  # an address used twice: the last is the result
    found = dict.fromkeys(born.get(address, -1) for address in results if address)
    found.pop(-1, None)
    if len(found) != len(made):
        return None
    return Recorded(step, tuple(allocations), dict(zip(found, made, strict=True)))

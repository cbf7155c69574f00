"""What every lowering of a region yields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

RegionFunction = Callable[[list[torch.Tensor]], tuple[torch.Tensor, ...]]  # may clear the list


@dataclass(frozen=True)
class CompiledRegion:
    """A region ready to run: call with the inputs in a sequence, get a tuple of new tensors.

    ``workspace``: bytes held while it runs beyond inputs and outputs. ``lowering``: what made it.
    """

    run: RegionFunction = field(repr=False)
    workspace: int
    lowering: str
    source: str = field(default="", repr=False)  # generated code, for people

    def __call__(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return self.run(list(inputs))

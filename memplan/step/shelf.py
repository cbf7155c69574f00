"""Optimizer state that lies on the disk between steps."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence

import torch

from memplan.runtime import homes
from memplan.runtime.space import aligned
from memplan.step.capture import Trained
from memplan.step.update import State

# Bytes of a parameter below which its state stays in memory: on GPT-2 these are 0.7 % of the state but two thirds of the
# transfers, each of which costs a disk's latency.
SMALL = 64 * 1024


class Shelf:
    """Room on the disk for the states that should lie there and do not: all at the first step, none later, until
    ``load_state_dict`` brings new ones. One file for all, given up with the last tensor in it."""

    def __init__(self, trained: Sequence[Trained], states: Mapping[torch.Tensor, State], directory: str | None) -> None:
        self._size = sum(
            aligned(one.tensor.nbytes) * len(self._missing(one, states.get(one.tensor, {})))
            for one in trained
            if one.home
        )
        self._directory = directory
        self._memory: mmap.mmap | None = None
        self._end = 0

    def send_home(self, one: Trained, state: State) -> None:
        """Move a parameter's states to the disk, where they belong there. Raises TierError where there is no room."""
        for name in self._missing(one, state) if one.home else ():
            self._memory = self._memory or homes.unnamed_file(self._size, self._directory)
            source = state[name]
            state[name] = homes.mapped(self._memory, self._end, source.shape, source.dtype).copy_(source)
            self._end += aligned(one.tensor.nbytes)

    def _missing(self, one: Trained, state: State) -> list[str]:
        return [name for name in one.update.states if state.get(name) is None or homes.home_of(state[name]) is None]

"""Optimizer state that lies on the disk between steps."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping, Sequence

import torch

from memplan.errors import TierError
from memplan.runtime import homes
from memplan.runtime.disk import SpillFile
from memplan.runtime.space import ALIGNMENT, aligned
from memplan.step.capture import Trained
from memplan.step.update import State

# Bytes of a parameter below which its state stays in memory: on GPT-2 these are 0.7 % of the state but two thirds of the
# transfers, each of which costs a disk's latency.
SMALL = 64 * 1024
# Pieces that all parameters' states come in at least: with one in use and one on its way a tenth of them is in memory.
# Without pieces GPT-2's embedding, 31 % of its parameters, brings in 31 % of the state at once.
_PIECES = 20


def rows_apart(parameter: torch.Tensor, total: int) -> int:
    """How many of a parameter's rows are updated at a time, where all parameters take ``total`` bytes; 0: all of them.

    Pieces begin at whole pages of the disk. Kernels of narrow types round otherwise where a piece ends.
    """
    if parameter.nbytes * _PIECES <= total or parameter.dtype.itemsize < 4:
        return 0
    row = parameter.nbytes // len(parameter)
    together = ALIGNMENT // math.gcd(ALIGNMENT, row)  # rows that fill pages
    rows = max(1, total // _PIECES // row // together) * together
    return rows if rows < len(parameter) else 0


def rows_of(state: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """A piece of a contiguous state, with a storage of its own over the same memory; all of it where ``last`` is 0."""
    if last == 0:
        return state
    row = state.nbytes // len(state)
    memory = state.untyped_storage()[first * row : last * row]
    return torch.empty(0, dtype=state.dtype).set_(memory, 0, (last - first, *state.shape[1:]))  # type: ignore[call-overload]


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
        """Move a parameter's states to the disk, where they belong there.

        Raises TierError where there is no room, and where the file is of the process that this one was forked from.
        """
        if not one.home:
            return
        _check_owner(one, state)
        for name in self._missing(one, state):
            self._memory = self._memory or homes.unnamed_file(self._size, self._directory)
            source = state[name]
            state[name] = homes.mapped(self._memory, self._end, source.shape, source.dtype).copy_(source)
            self._end += aligned(one.tensor.nbytes)

    def _missing(self, one: Trained, state: State) -> list[str]:
        return [name for name in one.update.states if state.get(name) is None or homes.home_of(state[name]) is None]


def _check_owner(one: Trained, state: State) -> None:
    """The file's pages are shared with the process that made it, which goes on to change them."""
    for name in one.update.states:
        home = None if state.get(name) is None else homes.home_of(state[name])
        if home is not None and isinstance(home.file, SpillFile) and home.file.owner != os.getpid():
            raise TierError(
                f"the optimizer's state of {one.name} lies in a file of the process that this one was forked from; "
                "load_state_dict() gives this process its own"
            )

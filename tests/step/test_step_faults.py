"""Faults of the disk under a whole step whose optimizer state lies there: a clear error, and the next step works."""

from __future__ import annotations

import copy
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training import OPTIMIZERS, same

import memplan
from memplan.errors import TierError
from memplan.runtime import homes


class Trained:
    """A network, its optimizer and its compiled step; ``options``: with states on the disk, or without."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(192, 192), nn.Tanh())])
        self.optimizer = OPTIMIZERS["adamw"](self.model.parameters())
        self.data = torch.randn(64, 192), torch.randn(64, 192)
        options |= {"runtime_estimator": "analytic", "verify": False}
        self._step = memplan.compile_step(self.model, nn.functional.mse_loss, self.optimizer, **options)

    def step(self) -> torch.Tensor:
        return self._step(*self.data)

    def states(self) -> list[torch.Tensor]:
        """Those that lie on the disk."""
        values = [v for state in self.optimizer.state.values() for v in state.values()]
        return [v for v in values if homes.home_of(v) is not None]


@pytest.fixture
def usual() -> Trained:
    return Trained()


@pytest.fixture
def ours(tmp_path: Path) -> Trained:
    return Trained(states="disk", memory_budget="80%", **{"swap.directory": str(tmp_path)})


def test_a_full_disk(ours: Trained, usual: Trained, tmp_path: Path) -> None:
    for _ in range(2):
        ours.step(), usual.step()
    ours.optimizer.load_state_dict(copy.deepcopy(usual.optimizer.state_dict()))  # in memory: the next step sends it
    assert not ours.states()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    try:
        with pytest.raises(TierError, match="no room"):
            ours.step()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(ours.model, usual.model) and not list(tmp_path.iterdir())
    assert torch.equal(ours.step(), usual.step())
    assert ours.states() and same(ours.model, usual.model)


def test_states_that_cannot_be_read(ours: Trained) -> None:
    ours.step()
    home = homes.home_of(ours.states()[0])
    assert home is not None
    before, nothing = os.dup(home.file.descriptor), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, home.file.descriptor)
    try:
        with pytest.raises(TierError, match="truncated") as caught:
            ours.step()
    finally:
        os.dup2(before, home.file.descriptor)
        os.close(before), os.close(nothing)
    assert "in its middle" in caught.value.__notes__[0]
    first = ours.step()
    assert ours.step() < first


def test_a_forked_process_needs_states_of_its_own(ours: Trained, usual: Trained) -> None:
    """Both processes would write the states of their own steps to one file."""
    ours.step(), usual.step()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            try:
                ours.step()
            except TierError as error:
                code = 2 if "forked" in str(error) else 3
            ours.optimizer.load_state_dict(copy.deepcopy(usual.optimizer.state_dict()))
            code = 0 if code == 2 and torch.equal(ours.step(), usual.step()) else code
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(ours.step(), usual.step()) and same(ours.model, usual.model)

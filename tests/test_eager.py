"""An analysis of a forward holds what eager holds: tensors that names in the model's code keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memplan
from memplan import torch_compat
from memplan.api import _trace
from memplan.eager import Made, forward_lifetimes, held_by_names
from memplan.options import Options
from memplan.realise import unplanned
from memplan.simulate import simulate
from tests.peak import peak_above

WIDE = 512  # a result of 256 x 512 numbers takes 512 KiB


class Named(nn.Module):
    """``kept`` is read once, but its name lives as long as the call."""

    def forward(self, x):
        kept = x.sin()
        y = kept.cos()
        y = y.exp()
        return y.tanh()


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)

    def forward(self, x):
        shortcut = self.first(x)
        y = self.second(shortcut)
        y += shortcut
        return F.relu(y) * 2


class Dropped(nn.Module):
    """A dropout that drops nothing hands its input on; the captured graph copies it."""

    def forward(self, x):
        scores = x.sin()
        scores = F.dropout(scores, 0.5, training=self.training)
        y = scores.cos()
        return y.exp()


class Repeated(nn.Module):
    """Equal layers, each of which holds its input by a name."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDE, WIDE), nn.GELU()) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            y = layer(x)
            z = y.sin()
            x = z.cos()
        return x


@pytest.mark.parametrize("model", [Named, InPlace, Dropped, Repeated])
def test_a_forward_is_predicted_as_eager_runs_it(model):
    module, x = model().eval(), torch.randn(256, WIDE)

    def forward():
        with torch.no_grad():
            module(x)

    found = memplan.analyze(module, (x,), training=False)
    resident = sum(found.program.storages[s].size for s in found.program.resident)
    assert found.peak_bytes - resident == pytest.approx(
        peak_above(forward), rel=0.03
    )  # a kernel's workspace is bounded


def test_a_name_alone_keeps_a_tensor():
    """The captured graph of ``Named`` needs two results at a time, eager three."""
    found = memplan.analyze(Named(), (torch.randn(256, WIDE),), training=False)
    assert sum(b.category not in ("input", "parameter") for b in found.at_peak) == 3


def test_a_forward_that_needs_values_has_no_lifetimes():
    mode = torch_compat.fake_mode_of([])
    with mode:
        assert forward_lifetimes(lambda: torch.ones(2).sum().item()) == []


def test_other_kernels_than_the_graphs_change_nothing():
    lowered = _lowered()
    strangers = [Made(("bmm", ((3, 3),)), [k + 4]) for k in range(3)]
    assert held_by_names(lowered, strangers) == lowered.program
    assert held_by_names(lowered, []) == lowered.program


def test_no_storage_is_held_shorter():
    lowered = _lowered()
    kernels = [(name, ((256, WIDE),)) for name in ("sin", "cos", "exp", "tanh")]
    for until in ([1, 2, 3, None], [4, 4, 4, None], [3, 2, 4, None], [None, 3, None, None]):
        program = held_by_names(lowered, [Made(key, [died]) for key, died in zip(kernels, until, strict=True)])
        before, after = simulate(lowered.program), simulate(program)
        runs = [[load for load, s in zip(t.loads, t.program.steps) if s.kind == "run"] for t in (before, after)]
        assert all(a >= b for b, a in zip(*runs, strict=True))


def _lowered():
    settings = Options.resolve({"runtime_estimator": "analytic", "placement.enabled": False})
    (planned,) = _trace(Named(), (torch.randn(256, WIDE),), {}, False, settings)
    return unplanned(planned.built, settings)

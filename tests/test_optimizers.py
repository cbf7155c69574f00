"""The account of torch.optim's update against torch.optim: the bytes its own kernels take, by its allocator's events."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from memplan import api
from memplan.analysis import Analysis
from memplan.errors import BudgetInfeasibleError, OptionError
from memplan.meters import HostMeter
from memplan.optimizers import FORMS, Optimizer
from memplan.outcome import Status
from memplan.problem import Phase
from memplan.simulate import simulate

KINDS = {
    "sgd": lambda p, **f: torch.optim.SGD(p, lr=0.1, **f),
    "momentum": lambda p, **f: torch.optim.SGD(p, lr=0.1, momentum=0.9, **f),
    "adam": lambda p, **f: torch.optim.Adam(p, lr=0.1, **f),
    "adamw": lambda p, **f: torch.optim.AdamW(p, lr=0.1, **f),
}
FLAGS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
X = (torch.ones(2, 32),)


class Net(nn.Module):
    """Parameters of two dtypes, a frozen one and one that is never used; the last is larger than the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 48), nn.Linear(48, 96)
        self.frozen = nn.Parameter(torch.ones(16), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(1024))
        self.narrow = nn.Parameter(torch.ones(96, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.last(self.first(x)) * self.narrow).square().mean() + self.frozen.sum()


def of_update(analysis: Analysis) -> tuple[int, int]:
    """(most bytes the update holds, bytes held after it)."""
    program = analysis.program
    begun = next(k for k, step in enumerate(program.steps) if step.phase == Phase.OPTIMIZER)
    loads = simulate(program).loads
    return max(loads[begun:]), loads[-1] - sum(program.storages[s].size for s in program.steps[-1].frees)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_state_and_temporaries_are_those_of_torch(kind, form):
    model = Net()
    optimizer = KINDS[kind](model.parameters(), **FLAGS[form])
    for _ in range(2):
        optimizer.zero_grad()
        model(*X).backward()
        meter = HostMeter()
        optimizer.step()
        taken, _ = meter.stop()
    held = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.ndim]
    analysis = api.analyze(model, X, optimizer=f"{kind}:{form}")
    state = sum(b.size for b in analysis.at_peak if b.category == "optimizer")
    assert abs(state - sum(v.nbytes for v in held)) <= 64 * len(held)
    peak, after = of_update(analysis)
    assert abs(peak - after - taken) <= 64 * len(held) + 64


def test_defaults_are_those_of_the_device():
    assert Optimizer.parse("adamw", "cpu").form == "for-loop" and Optimizer.parse("adamw", "cuda").form == "foreach"
    with pytest.raises(OptionError, match="known are sgd, momentum"):
        Optimizer.parse("lion", "cpu")
    with pytest.raises(OptionError, match="unknown form 'foreech'"):
        Optimizer.parse("adamw:foreech", "cpu")


def test_the_update_bounds_every_budget():
    """Parameters alone: no plan of forward and backward makes the update's lists of temporaries smaller."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
    whole = api.analyze(model, (torch.ones(1, 64),), optimizer="adam:foreach", frontier_points=4)
    peak, _ = of_update(whole)
    assert whole.peak_bytes == peak and whole.timeline[-1].phase == Phase.OPTIMIZER
    assert [p.peak for p in whole.frontier] == [peak]
    with pytest.raises(BudgetInfeasibleError, match="denominator") as refused:
        api.analyze(model, (torch.ones(1, 64),), optimizer="adam:foreach", memory_budget="90%")
    assert refused.value.smallest == refused.value.bound == peak
    kept = api.analyze(model, (torch.ones(1, 64),), optimizer="adam:foreach", memory_budget=peak)
    assert kept.peak_bytes == kept.plan.peak == kept.plan.budget == peak


def test_a_budget_that_neither_part_keeps_counts_the_state():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    x = (torch.ones(512, 64),)
    with pytest.raises(BudgetInfeasibleError) as refused:
        api.analyze(model, x, optimizer="adam", memory_budget=1000)
    assert refused.value.budget == 1000
    kept = api.analyze(model, x, optimizer="adam", memory_budget=refused.value.smallest)
    assert kept.peak_bytes == kept.plan.peak <= refused.value.smallest
    assert kept.plan.status in (Status.FEASIBLE, Status.OPTIMAL)

"""Offload end to end: the same bits as without, and the measured peak is the predicted one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from memplan import planner
from memplan.backend import recent_plans
from memplan.plans import Plan
from memplan.problem import Problem
from tests.peak import peak_above
from tests.stays import with_stays

OPTIONS = {"runtime_estimator": "analytic", "swap.tiers": "disk"}


class Net(nn.Module):
    """Attention, dropout and a branch whose views are read on both sides of a stay."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(64, 128)
        self.attend = nn.MultiheadAttention(128, 4, batch_first=True)
        self.norm = nn.LayerNorm(128)
        self.out = nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.inside(x))
        x = self.norm(x + self.attend(x, x, x, need_weights=False)[0])
        x = nn.functional.dropout(nn.functional.gelu(x), 0.1)
        left, right = self.out(x.transpose(1, 2).reshape(x.shape)).chunk(2, -1)
        return (left * right.sigmoid()).logsumexp(-1).mean()


@pytest.fixture
def offloading(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every plan sends what it saves to the disk."""
    solve = planner.solve

    def solved(problem: Problem, *args: Any) -> Plan:
        return with_stays(problem, solve(problem, *args))

    monkeypatch.setattr(planner, "solve", solved)
    yield


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="memplan", options=OPTIONS | options)


def inputs(seed: int = 0, batch: int = 8) -> torch.Tensor:
    return torch.randn(batch, 64, 64, generator=torch.Generator().manual_seed(seed))


def step(run: Any, model: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = run(inputs(seed))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().train()


@pytest.fixture
def wanted(net: Net) -> list[list[torch.Tensor]]:
    twin = copy.deepcopy(net)
    run = compiled(twin, **{"swap.enabled": False})
    return [step(run, twin, seed) for seed in range(4)]


def test_same_bits(wanted: list[list[torch.Tensor]], net: Net, offloading: None) -> None:
    run = compiled(net)
    for seed in range(4):
        assert_same(step(run, net, seed), wanted[seed])
    planned = recent_plans()[-1]
    assert len(planned.plan.offloads) >= 8
    assert planned.timeline.peak < planned.plan.unplanned_peak


def test_measured_peak_is_the_predicted_one(net: Net, offloading: None) -> None:
    run = compiled(net)
    x = inputs()

    def once() -> None:
        run(x).backward()
        net.zero_grad(set_to_none=True)

    measured = peak_above(once, warm_ups=2)
    planned = recent_plans()[-1]
    above = planned.timeline.peak - planned.problem.resident_bytes
    assert 0.97 * above <= measured <= above

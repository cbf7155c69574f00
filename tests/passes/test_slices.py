"""Gradients of slices side by side: eager's numbers, without a tensor of the whole for every slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from memplan.backend import recent_plans
from tests.backend.compare import FAST
from tests.described import misdescribed
from tests.peak import peak_above

aten = torch.ops.aten
WHOLES = (aten.select_backward.default, aten.slice_backward.default)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Sliced(nn.Module):
    """What ``function`` makes of a product of [4, 6, 10]."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 10)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x)).square().sum()


def wholes(function: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """Tensors of the whole that the backward makes of slices' gradients, and how often it joins some; the gradients
    are eager's."""
    torch.manual_seed(0)
    model, x = Sliced(function), torch.randn(4, 6, 8, requires_grad=True)
    found = []
    for run in (model, torch.compile(model, backend="memplan", options=FAST)):
        model.zero_grad(set_to_none=True)
        x.grad = None
        run(x).backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    targets = [n.target for n in recent_plans()[-1].scheduled.graph_module.graph.nodes]
    return sum(targets.count(t) for t in WHOLES), targets.count(aten.cat.default)


def over_time(y: Tensor) -> Tensor:
    state = torch.zeros(4, 10)
    for t in range(y.shape[1]):
        state = torch.tanh(state + y[:, t])
    return state


@pytest.mark.parametrize(
    ("function", "left", "joins"),
    [
        (over_time, 0, 1),
        (lambda y: over_time(y) + y.sum(1), 0, 1),  # a term more
        (lambda y: y[:, 0].sin() * y[:, -1].exp(), 0, 1),  # zeros between
        (lambda y: y[:, 2].sin() * y[:, 4].exp(), 0, 1),  # and at both ends
        (lambda y: y[..., :3].sin().sum() * y[..., 3:].exp(), 0, 1),
        (lambda y: y[:, :4].sin().sum() * y[:, 2:].exp(), 2, 0),  # these overlap
        (lambda y: y[:, ::2].sin() * y[:, 1::2].exp(), 2, 0),
        (lambda y: y[:, 0].sin().sum() * y[0].exp(), 2, 0),  # two dimensions
        (
            lambda y: y[:, 0].sin().sum() + y[:, 1].exp().sum() * (y.tan() * y.sum(1, keepdim=True)),
            2,
            0,
        ),  # two terms more
        (lambda y: y[:, 1].sin(), 1, 0),
    ],
)
def test_slices_of_an_activation(function: Callable[[Tensor], Tensor], left: int, joins: int) -> None:
    assert wholes(function) == (left, joins)


def test_a_gradient_that_is_a_view_of_something_large_is_copied() -> None:
    def cell(y: Tensor) -> Tensor:
        state = torch.zeros(4, 40)
        for t in range(y.shape[1]):
            state = torch.cat([y[:, t], state], 1)[:, :40].tanh()
        return state

    def copies() -> int:
        targets = [n.target for n in recent_plans()[-1].scheduled.graph_module.graph.nodes]
        return targets.count(aten.clone.default)

    left, _ = wholes(cell)
    assert left == 6  # of the states, each sliced alone
    assert copies() == 6
    assert wholes(lambda y: torch.cat([y[:, 0], y[:, 1]], 1).tanh()) == (0, 2)  # its own cat, and the join
    assert copies() == 0, "all of it is read"


def test_memory_formats_stay() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(4, 8, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 9, 9).to(memory_format=torch.channels_last)

    def gates(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        run(x).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def gated(x: Tensor) -> Tensor:
        y = model(x)
        return (y[:, :4].sigmoid() * y[:, 4:]).square().sum()

    for one, other in zip(gates(gated), gates(torch.compile(gated, backend="memplan", options=FAST)), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


def test_a_sum_with_something_laid_out_otherwise_stays_where_it_was() -> None:
    """Rotary embeddings: the gradient of both halves, and one of the whole that lies transposed."""

    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 16)
            self.cos = torch.linspace(-1, 1, 48).view(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.linear(x).unflatten(-1, (2, 8)).transpose(1, 2)
            heads = heads * heads.square().mean(-1, keepdim=True).rsqrt()
            kept = heads * self.cos
            turned = torch.cat((-heads[..., 4:], heads[..., :4]), -1) * self.cos.sin()
            return (kept + turned).square().sum()

    torch.compile(Rotated(), backend="memplan", options=FAST)(torch.randn(4, 6, 8)).backward()
    assert not misdescribed(recent_plans()[-1].scheduled.graph_module)


def test_dynamic_lengths_stay_right() -> None:
    model = Sliced(lambda y: y[:, 0].sin() * y[:, -1].exp())
    run = torch.compile(model, backend="memplan", dynamic=True, options=FAST)
    for length in (6, 9):
        x = torch.randn(4, length, 8)
        model.zero_grad(set_to_none=True)
        model(x).backward()
        wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        run(x).backward()
        assert all(
            torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted, strict=True) if p.grad is not None
        )


def test_a_loop_over_time_holds_no_more_than_eagerly() -> None:
    torch.manual_seed(0)

    def scanned(y: Tensor) -> Tensor:
        state = y[:, 0]
        for t in range(1, y.shape[1]):
            state = state * y[:, t]
        return state.sum()

    weight = torch.rand(1, 64, 4096, requires_grad=True)
    data = torch.rand(1, 64, 4096)

    def above(run: Callable[[Tensor], Tensor]) -> int:
        def step() -> None:
            run(weight * data).backward()
            weight.grad = None

        return peak_above(step, warm_ups=2)

    assert above(torch.compile(scanned, backend="memplan", options=FAST)) <= above(scanned)

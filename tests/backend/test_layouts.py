"""Kernels that lay their results out otherwise than torch's fake tensors say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memplan.layouts import FAITHFUL
from memplan.torch_compat import FakeTensorMode
from tests.backend.compare import FAST, compare

aten = torch.ops.aten
WIDTH = 16


class NormedTokens(nn.Module):
    """Batch norms over transposed tokens, between layers that look at all tokens as one matrix."""

    def __init__(self, norm_last: bool) -> None:
        super().__init__()
        self.norm_last = norm_last
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.last = nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)
        tokens = self.second(tokens).reshape(x.shape).relu().transpose(1, 2)
        normed: Tensor = self.last(tokens)
        return normed if self.norm_last else normed.transpose(1, 2).reshape(-1, WIDTH)


@pytest.mark.parametrize("norm_last", (True, False))
@pytest.mark.parametrize("train", (True, False))
def test_batch_norm_over_transposed_tokens(train: bool, norm_last: bool) -> None:
    x = torch.randn(8, 24, WIDTH, generator=torch.Generator().manual_seed(0))
    compare(lambda: NormedTokens(norm_last).train(train), (x,))


@pytest.mark.parametrize("order", ((0, 2, 1), (0, 1, 2), (0, 3, 1, 2), (2, 3, 0, 1), (1, 0, 2, 3)))
@pytest.mark.parametrize("gradient_order", ("as input", "dense"))
def test_fake_tensors_are_right_once_operands_are_dense(order: tuple[int, ...], gradient_order: str) -> None:
    def strides() -> list[tuple[int, ...]]:
        x = torch.ones(4, 5, 6, 7)[(..., *[0] * (4 - len(order)))].permute(order)
        gradient = torch.ones(x.shape) if gradient_order == "dense" else torch.ones_like(x)
        channels = torch.ones(x.shape[1])
        forward = (x, *[channels] * 4, 0.1, 1e-5)
        backward = (gradient, x, *[channels] * 5, True, 1e-5, [True] * 3)
        return [
            run(aten._native_batch_norm_legit_no_training.default, forward).stride(),
            run(aten.native_batch_norm_backward.default, backward).stride(),
        ]

    def run(target: torch._ops.OpOverload, args: tuple[object, ...]) -> Tensor:
        results = FAITHFUL[target](*args)
        first: Tensor = (target(*args) if results is NotImplemented else results)[0]
        return first

    real = strides()
    with FakeTensorMode():
        assert strides() == real


@pytest.mark.parametrize("turned", ((True, False), (False, True), (True, True)))
@pytest.mark.parametrize(
    ("target", "arguments"),
    (
        (aten._log_softmax_backward_data.default, lambda x, y: (x, y, 1, torch.float32)),
        (aten.binary_cross_entropy_backward.default, lambda x, y: (torch.ones(2, 5, 3), x, y)),
        (aten.copysign.Tensor, lambda x, y: (x, y)),
        (aten.elu_backward.default, lambda x, y: (x, 1, 1, 1, False, y)),
        (aten.floor_divide.default, lambda x, y: (x, y)),
        (aten.glu_backward.default, lambda x, y: (x, torch.cat((y, y), 1), 1)),
        (aten.hardsigmoid_backward.default, lambda x, y: (x, y)),
        (aten.hardswish_backward.default, lambda x, y: (x, y)),
        (aten.hardtanh_backward.default, lambda x, y: (x, y, -1, 1)),
        (aten.huber_loss_backward.default, lambda x, y: (torch.ones(2, 5, 3), x, y, 1, 1.0)),
        (aten.log_sigmoid_backward.default, lambda x, y: (torch.ones(()).expand(2, 5, 3), x, y)),
        (aten.log_sigmoid_forward.default, lambda x, y: (x,)),
        (aten.logit_backward.default, lambda x, y: (x, y)),
        (aten.mse_loss_backward.default, lambda x, y: (torch.ones(()), x, y, 1)),
        (aten.native_dropout_backward.default, lambda x, y: (x, y > 0.5, 2.0)),
        (aten.rrelu_with_noise_backward.default, lambda x, y: (torch.ones(2, 5, 3), x, y, 0.1, 0.3, True, False)),
        (aten.smooth_l1_loss_backward.default, lambda x, y: (torch.ones(()).expand(2, 5, 3), x, y, 1, 1.0)),
        (aten.softplus_backward.default, lambda x, y: (x, y, 1, 20)),
        (aten.special_xlog1py.default, lambda x, y: (x, y)),
        (aten.xlogy.Tensor, lambda x, y: (x, y)),
    ),
)
def test_operands_that_lie_otherwise_than_contiguously(
    target: torch._ops.OpOverload,
    arguments: Callable[[Tensor, Tensor], tuple[object, ...]],
    turned: tuple[bool, bool],
) -> None:
    """Fake results lie as the kernel's do, whose numbers stay."""

    def run(table: bool) -> list[Tensor]:
        operands = (
            torch.full((2, 3, 5), 0.25 + 0.5 * k).transpose(1, 2) if turn else torch.full((2, 5, 3), 0.25 + 0.5 * k)
            for k, turn in enumerate(turned)
        )
        given = arguments(*operands)
        result = FAITHFUL[target](*given) if table else NotImplemented
        found = target(*given) if result is NotImplemented else result
        return [found] if isinstance(found, Tensor) else list(found)

    made = run(table=True)
    assert all(map(torch.equal, made, run(table=False)))
    with FakeTensorMode():
        assert [fake.stride() for fake in run(table=True)] == [real.stride() for real in made]


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("name", ("mse_loss", "smooth_l1_loss", "binary_cross_entropy"))
def test_a_loss_holds_one_number(name: str, reduction: str) -> None:
    class Loss(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            loss: Tensor = getattr(nn.functional, name)(x.sigmoid(), y, reduction=reduction)
            return loss

    chance = torch.Generator().manual_seed(0)
    x, y = (torch.rand(32, 64, generator=chance).requires_grad_(k == 0) for k in range(2))
    run = torch.compile(Loss(), backend="memplan", options=FAST)
    loss, wanted = run(x, y), Loss()(x, y)
    assert torch.equal(loss, wanted)
    assert loss.untyped_storage().nbytes() == loss.nbytes
    found, gradient = (torch.autograd.grad(value.sum(), x)[0] for value in (loss, wanted))
    torch.testing.assert_close(found, gradient)

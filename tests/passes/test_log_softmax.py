"""Log-softmax as arithmetic that regions repeat: the kernel's numbers, and no more saved than the logits."""

from __future__ import annotations

import pytest
import torch
from peak import peak_above
from torch import nn
from torch.nn import functional as F

from memplan import torch_compat
from memplan.backend import recent_plans
from memplan.passes.log_softmax import SplitLogSoftmax

aten = torch.ops.aten


def losses(x: torch.Tensor, y: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss's log-probabilities and the gradient of its logits."""
    logs = aten._log_softmax(x, dim, False)
    return logs, aten._log_softmax_backward_data(y, logs, dim, x.dtype)


def captured(x: torch.Tensor, dim: int) -> torch.fx.GraphModule:
    mode = torch_compat.FakeTensorMode()
    return torch_compat.trace_fake(lambda x, y: losses(x, y, dim), [mode.from_tensor(t) for t in (x, x.clone())])


@pytest.mark.parametrize("scale", (1.0, 1e4))
@pytest.mark.parametrize(("shape", "dim"), (((6, 50), 1), ((6, 50), -1), ((3, 9, 4), 1), ((7,), 0)), ids=str)
def test_the_numbers_are_the_kernel_s(shape: tuple[int, ...], dim: int, scale: float) -> None:
    chance = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=chance) for _ in range(2))
    graph = captured(x, dim)
    assert SplitLogSoftmax().apply(graph)
    assert aten._log_softmax.default not in {n.target for n in graph.graph.nodes}
    for found, expected in zip(graph(scale * x, y), losses(scale * x, y, dim), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * scale)


def test_narrow_and_unread_ones_stay_as_they_are() -> None:
    assert not SplitLogSoftmax().apply(captured(torch.randn(6, 50).bfloat16(), 1))
    mode = torch_compat.FakeTensorMode()
    alone = torch_compat.trace_fake(lambda x: aten._log_softmax(x, 1, False), [mode.from_tensor(torch.randn(6, 50))])
    assert not SplitLogSoftmax().apply(alone)


class Classifier(nn.Module):
    """The log-softmax of logits that a product makes in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 4096)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.head(x)
        return F.nll_loss(F.log_softmax(logits.float(), -1), y)  # cross_entropy would run over blocks of tokens


def test_narrow_logits_are_saved_in_place_of_wide_log_probabilities() -> None:
    torch.manual_seed(0)
    model, x, y = Classifier(), torch.randn(256, 64), torch.randint(0, 4096, (256,))
    compiled = torch.compile(model, backend="memplan", options={"fusion.enabled": True})
    loss = compiled(x, y)
    expected = model(x, y)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    (gradient,), (exact,) = (torch.autograd.grad(each, [model.head.weight]) for each in (loss, expected))
    torch.testing.assert_close(gradient, exact, rtol=1e-2, atol=1e-6)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        compiled(x, y).backward()

    planned = recent_plans()[-1]
    wide = 256 * 4096 * 4
    step()
    peak = peak_above(step)
    # the logits, their gradients, and the weights in both widths; no matrix of log-probabilities
    assert peak <= planned.timeline.peak < planned.problem.resident_bytes + 1.75 * wide

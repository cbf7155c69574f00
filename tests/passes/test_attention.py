"""Written-out attention becomes torch's fused one: equal to rounding, no scores, and nothing else is touched."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import memplan
from memplan.passes.attention import FuseAttention
from memplan.runtime.attention import attend
from tests.peak import peak_above

N, E = 12, 8
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()
ADDED = torch.zeros(N, N).masked_fill(~CAUSAL, torch.finfo(torch.float32).min)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(E), dim=-1) @ v


def hugging_face(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.matmul(q, k.transpose(2, 3)) * E**-0.5
    weights = weights + ADDED[None, None]
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = nn.functional.dropout(weights, p=0.0, training=True)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def causal_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.where(CAUSAL, q @ k.mT * 0.3, float("-inf"))
    return scores.softmax(-1) @ v


def causal_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.permute(0, 1, 3, 2)).masked_fill(~CAUSAL, -1e9)
    return nn.functional.softmax(scores, dim=3).matmul(v)


def in_three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q * 0.5, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v)


def hidden_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A row hidden as a whole by a finite number is uniform in eager."""
    scores = (q @ k.mT).masked_fill(torch.arange(N)[:, None] < 3, torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


def _captured(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[torch.fx.GraphModule | None, list[Tensor]]:
    """What the pass makes of dynamo's graph, and what that graph is called with."""
    found: list = []

    def backend(graph_module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        def run(*given: Tensor) -> object:
            found.append((FuseAttention().apply(graph_module), list(given)))
            return graph_module.forward(*given)

        return run

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=False)(*inputs)
    return found[0]


def _inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, N, E, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("function", [plain, hugging_face, causal_where, causal_fill, in_three_dimensions, hidden_rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_pattern_is_found_and_values_stay(function, dtype):
    inputs = _inputs(dtype)
    module, given = _captured(function, *inputs)
    assert module is not None
    assert any(n.target is attend for n in module.graph.nodes)
    assert not any(n.target in (torch.softmax, nn.functional.softmax, "softmax") for n in module.graph.nodes)
    (got,) = module(*given)
    want = function(*inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert got.dtype == want.dtype and got.stride() == want.stride()
    upstream = torch.randn_like(want)
    gradients = torch.autograd.grad(got, inputs, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(want, inputs, upstream), rtol=tolerance, atol=tolerance)


def with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.dropout(torch.softmax(q @ k.mT, dim=-1), 0.1) @ v


def returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT, dim=-1)
    return torch.cat([weights @ v, weights], -1)


def learned_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + k.sum(-1, keepdim=True), dim=-1) @ v


def scaled_after_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT + ADDED) * 0.5, dim=-1) @ v


def weakly_hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT).masked_fill(~CAUSAL, -10.0), dim=-1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, dim=-2) @ v


@pytest.mark.parametrize(
    "function", [with_dropout, returned, learned_mask, scaled_after_the_mask, weakly_hidden, over_queries]
)
def test_anything_else_is_left_alone(function):
    assert _captured(function, *_inputs())[0] is None


class Attention(nn.Module):
    """One head over a sequence that is long for its width: the scores are most of the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unsqueeze(1).chunk(3, -1)
        return (torch.softmax(q @ k.transpose(-2, -1) * 0.25, -1) @ v).square().mean()


def test_the_planner_takes_it_where_only_it_fits():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 256, 16)
    want = torch.autograd.grad(model(x), list(model.parameters()))
    torch._dynamo.reset()
    options = {"fusion.enabled": True, "lowering": "eager", "runtime_estimator": "analytic", "memory_budget": "50%"}
    run = torch.compile(model, backend="memplan", options=options)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(x), list(model.parameters()))

    torch.testing.assert_close(step(), want)
    planned = memplan.recent_plans()[-1]
    assert any("attention" in op.target for op in planned.problem.ops)
    assert peak_above(step) + planned.problem.resident_bytes <= planned.plan.budget

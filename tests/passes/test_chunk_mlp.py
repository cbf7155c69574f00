"""MLPs over blocks of tokens: the same values and gradients, and less memory where a budget asks for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memplan
from memplan.passes.chunk_mlp import ChunkMLP


class Plain(nn.Module):
    """GPT's: products that are modules, GELU between."""

    def __init__(self, width: int = 16, inner: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Gated(Plain):
    """Llama's: a gate of the same source."""

    def __init__(self, width: int = 16, inner: int = 64) -> None:
        super().__init__(width, inner)
        self.gate = nn.Linear(width, inner, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Seen(Plain):
    """The middle is read elsewhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.up(x))
        return self.down(h) + h.mean()


class Dropped(Plain):
    """Dropout in the middle: blocks would draw other masks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.dropout(F.gelu(self.up(x)), 0.5))


class Normed(Plain):
    """The middle is no product's pointwise function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.softmax(self.up(x), 0))


def rewritten(model: nn.Module, x: torch.Tensor) -> tuple[bool, torch.Tensor]:
    """Whether the pass rewrote the model's graph, and what the model then gives."""
    changed = []

    def backend(graph_module: torch.fx.GraphModule, inputs: object) -> object:
        found = ChunkMLP(least_rows=8).apply(graph_module)
        changed.append(found is not None)
        return found or graph_module

    torch._dynamo.reset()
    result = torch.compile(model, backend=backend)(x)
    return changed == [True], result


@pytest.mark.parametrize("kind", [Plain, Gated])
@pytest.mark.parametrize("shape", [(4, 10, 16), (33, 16)])
def test_blocks_give_the_same_values_and_gradients(kind: type[Plain], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    exact = model(x)
    gradients = torch.autograd.grad(exact.square().sum(), [x, *model.parameters()])
    changed, got = rewritten(model, x)
    assert changed
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), [x, *model.parameters()]), gradients)


def test_products_over_flattened_tokens_are_found() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_head=2, resid_pdrop=0.0)
    model, x = GPT2MLP(64, config), torch.randn(2, 40, 16)
    changed, got = rewritten(model, x)
    assert changed
    torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("kind", [Seen, Dropped, Normed])
def test_what_is_no_such_middle_stays(kind: type[Plain]) -> None:
    assert not rewritten(kind(), torch.randn(4, 10, 16))[0]


def test_few_rows_and_narrow_middles_stay() -> None:
    assert not rewritten(Plain(), torch.randn(8, 16))[0]
    assert not rewritten(Plain(32, 16), torch.randn(4, 10, 32))[0]


def test_a_budget_that_only_blocks_keep_is_kept() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Plain(32, 512) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x.square().mean()

    torch.manual_seed(0)
    model, x = Loss(), torch.randn(512, 32)
    options = {"runtime_estimator": "analytic", "objective": "peak"}
    held = []
    for fusion in (False, True):
        torch._dynamo.reset()
        chosen = options | {"fusion.enabled": fusion, "lowering": "eager"}
        torch.compile(model, backend="memplan", options=chosen)(x).backward()
        held.append(memplan.recent_plans()[-1].held)
    assert held[1] < 0.8 * held[0]
    torch._dynamo.reset()
    model.zero_grad()
    tight = {"runtime_estimator": "analytic", "memory_budget": held[0] - 1, "fusion.enabled": True, "lowering": "eager"}
    torch.compile(model, backend="memplan", options=tight)(x).backward()
    assert memplan.recent_plans()[-1].held < held[0]
    expected = torch.autograd.grad(model(x), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))

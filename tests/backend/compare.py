"""Run a model eagerly and through memplan from the same state, and compare everything a user can observe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import memplan

FAST = {"runtime_estimator": "analytic", "solver_work": 0.05}
X = torch.linspace(-2, 2, 32 * 16).reshape(32, 16)


class Deep(nn.Module):
    """Layers of ``block`` between two linear maps, enough of them for recomputation to have something to do."""

    def __init__(self, block: Any, layers: int = 5, width: int = 16) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.maps:
            x = self.block(layer(x))
        return x


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(F.gelu(x)) * 1.5


def train_steps(
    model: torch.nn.Module, run: Callable[..., Any], inputs: tuple[Any, ...], steps: int = 2
) -> list[list[torch.Tensor]]:
    """Losses, gradients and buffers after each of ``steps`` steps; each step draws from its own seed."""
    seen = []
    for k in range(steps):
        torch.manual_seed(100 + k)
        model.zero_grad(set_to_none=True)
        loss = _scalar(run(*inputs))
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        seen.append([loss.detach().clone(), *gradients, *(b.clone() for b in model.buffers())])
    return seen


def _scalar(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value if value.dim() == 0 else value.float().square().mean()
    return sum((_scalar(v) for v in value if isinstance(v, torch.Tensor) and v.is_floating_point()), torch.zeros(()))


def compare(
    build: Callable[[], torch.nn.Module],
    inputs: tuple[Any, ...],
    budget: str | int | None = "60%",
    tolerance: float = 1e-5,
    exact: bool = True,
    **options: Any,
) -> memplan.Plan:
    """Assert that memplan's steps equal eager's to ``tolerance``, and its own unbudgeted ones bit for bit.

    Returns the plan that ran. An infeasible budget is replaced by the smallest feasible one, which must then hold.
    """
    torch.manual_seed(0)
    model = build()
    eager = train_steps(reference := copy.deepcopy(model), reference, inputs)
    free = _compiled(copy.deepcopy(model), inputs, None, options)
    try:
        planned = _compiled(copy.deepcopy(model), inputs, budget, options)
    except memplan.BudgetInfeasibleError as error:
        assert error.smallest is not None
        planned = _compiled(copy.deepcopy(model), inputs, error.smallest, options)
    plan = memplan.recent_plans()[-1].plan
    for step, values in enumerate(zip(eager, free, planned, strict=True)):
        for k, (want, plain, got) in enumerate(zip(*values, strict=True)):
            _assert_close(got, want, tolerance, f"step {step}, value {k}")
            assert not exact or torch.equal(got, plain), f"step {step}, value {k} differs from the unbudgeted run"
    return plan


def _assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def _compiled(
    model: torch.nn.Module, inputs: tuple[Any, ...], budget: str | int | None, options: dict[str, Any]
) -> list[list[torch.Tensor]]:
    torch._dynamo.reset()
    settings = FAST | options | ({"memory_budget": budget} if budget is not None else {})
    return train_steps(model, torch.compile(model, backend="memplan", options=settings), inputs)

"""Norms' statistics under autocast are described, and counted, as the CPU's kernels give them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memplan.backend import recent_plans
from memplan.capture import tensors
from memplan.passes.dtypes import NORMS
from tests.backend.compare import FAST
from tests.peak import peak_above

WIDTH = 8


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Normed(nn.Module):
    """A narrow layer and norms of its result, so narrow that their statistics are a good part of what is saved."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.norms = nn.Linear(WIDTH, WIDTH), nn.ModuleList(norm() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.first(x)
            for norm in self.norms:
                x = F.gelu(norm(x))
            return x.float().square().mean()


@pytest.mark.parametrize(
    "norm",
    (
        lambda: nn.LayerNorm(WIDTH),
        lambda: nn.LayerNorm(WIDTH, bias=False),
        lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
        lambda: nn.GroupNorm(4, WIDTH),
        lambda: nn.BatchNorm1d(WIDTH),
        lambda: nn.BatchNorm1d(WIDTH, affine=False),
    ),
)
@pytest.mark.parametrize("budget", (None, "60%"))
def test_statistics_are_counted_in_their_dtype(norm: Callable[[], nn.Module], budget: str | None) -> None:
    model, x = Normed(norm), torch.randn(40_000, WIDTH)
    run = torch.compile(
        model, backend="memplan", options={"solver_work": 0.05} | ({"memory_budget": budget} if budget else {})
    )

    def step() -> None:
        run(x).backward()
        model.zero_grad(set_to_none=True)

    measured = peak_above(step, warm_ups=2)
    planned = recent_plans()[-1]
    held = planned.problem.resident_bytes + measured
    assert held <= planned.held <= 1.01 * held


@pytest.mark.parametrize(
    "norm", (lambda: nn.LayerNorm(WIDTH), lambda: nn.GroupNorm(4, WIDTH), lambda: nn.BatchNorm1d(WIDTH))
)
@pytest.mark.parametrize("narrow", (False, True))
def test_results_are_described_as_the_kernel_makes_them(norm: Callable[[], nn.Module], narrow: bool) -> None:
    """Under autocast, and for parameters as narrow as the operand."""
    model = Normed(norm)
    if narrow:
        model.norms.bfloat16()
    torch.compile(model, backend="memplan", options=FAST)(torch.randn(64, WIDTH)).backward()
    norms = [n for n in recent_plans()[-1].scheduled.graph_module.graph.nodes if n.target in NORMS]
    assert norms
    for node in norms:
        described = [v.dtype for v in tensors(node.meta["val"])][:3]
        operands = torch.fx.node.map_arg(
            node.args, lambda n: torch.ones(n.meta["val"].shape, dtype=n.meta["val"].dtype)
        )
        assert [v.dtype for v in tensors(node.target(*operands))][:3] == described

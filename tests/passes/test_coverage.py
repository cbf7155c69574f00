"""The bytes that regions take over are counted over ops other than products."""

from __future__ import annotations

import torch
from torch import nn

import memplan
from memplan.passes.coverage import coverage, is_product


def test_everything_between_the_products_of_a_block_is_covered():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x).square().mean()

    torch._dynamo.reset()
    torch.compile(Model(), backend="memplan", options={"runtime_estimator": "analytic"})(torch.randn(128, 32))
    planned = memplan.recent_plans()[-1]
    under_peak = coverage(planned.scheduled, planned.problem)
    assert under_peak.regions > 0 and not under_peak.left_out
    assert under_peak.fused + sum(under_peak.single.values()) + sum(under_peak.apart.values()) == under_peak.total
    assert under_peak.apart  # one region would lift the peak
    found = coverage(planned.scheduled, planned.problem, limit=2**30)
    assert found.total == under_peak.total and not found.apart
    assert found.share == 1.0
    assert f"{found.regions} fused regions" in str(found)


def test_an_op_between_two_products_has_nothing_to_fuse_with():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(nn.functional.gelu(self.first(x)))

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Model(), backend="memplan", options={"runtime_estimator": "analytic"})(torch.randn(128, 32))
    planned = memplan.recent_plans()[-1]
    found = coverage(planned.scheduled, planned.problem)
    assert list(found.single) == ["aten.gelu.default"]
    assert (found.fused_share, found.share) == (0.0, 1.0)


def test_the_plan_of_a_model_tells_its_coverage():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = nn.functional.gelu(layer(x)) + x
            return x.square().mean()

    analysis = memplan.analyze(Model(), (torch.randn(512, 64),), memory_budget="80%")
    assert any("fused regions" in note for note in analysis.notes)


def test_products_are_told_from_the_rest():
    aten = torch.ops.aten
    assert all(map(is_product, (aten.addmm.default, aten.convolution.default, aten.mv.default)))
    assert is_product(aten._scaled_dot_product_flash_attention_for_cpu.default)
    assert not any(map(is_product, (aten.add.Tensor, aten._softmax.default, aten.embedding.default)))

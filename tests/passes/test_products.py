"""Matrix products run in the library that the costs prefer: equal to rounding, and nothing but them is touched."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn

import memplan
from memplan import torch_compat
from memplan.cost import Cost
from memplan.cost.analytic import AnalyticCost, flops
from memplan.cost.measured import measure
from memplan.cost.signature import results, signature
from memplan.devices import profile_for
from memplan.passes.products import ChooseProducts
from tests.peak import peak_above

aten = torch.ops.aten
LINEAR = torch_compat.onednn_linear()

pytestmark = pytest.mark.skipif(LINEAR is None, reason="torch without oneDNN")


@dataclass(frozen=True)
class Prefers:
    """Costs by which one op is twice as fast as any other, and holds ``workspace`` bytes."""

    target: object
    workspace: int = 0

    def cost(self, node: fx.Node) -> Cost:
        return Cost(1.0, self.workspace) if node.target == self.target else Cost(2.0)


def of_inner(x: Tensor, w: Tensor) -> Tensor:
    return aten.mm(x, aten.t(w))


def of_input(g: Tensor, w: Tensor) -> Tensor:
    return aten.mm(g, w)


def of_weight(g: Tensor, x: Tensor) -> Tensor:
    return aten.mm(aten.t(g), x)


def with_bias(b: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return aten.addmm(b, x, aten.t(w))


SHAPES = {
    of_inner: [(37, 19), (23, 19)],
    of_input: [(37, 23), (23, 19)],
    of_weight: [(37, 23), (37, 19)],
    with_bias: [(23,), (37, 19), (23, 19)],
}


def _captured(function, inputs: list[Tensor]) -> fx.GraphModule:
    fakes = torch_compat.fakes_like(inputs)
    return torch_compat.trace_fake(function, fakes)


@pytest.mark.parametrize("function", SHAPES, ids=lambda f: f.__name__)
def test_a_product_by_onednn_is_as_exact_as_torchs(function):
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in SHAPES[function]]
    graph_module = _captured(function, inputs)
    assert ChooseProducts(Prefers(LINEAR)).apply(graph_module)
    assert LINEAR in {node.target for node in graph_module.graph.nodes}
    found, eager = graph_module(*inputs), function(*inputs)
    exact = function(*(tensor.double() for tensor in inputs))
    assert found.stride() == eager.stride()
    # Odd sizes of a few hundred terms: either library is within some units in the last place.
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_speed_is_not_paid_for_with_memory():
    inputs = [torch.randn(shape) for shape in SHAPES[of_weight]]
    assert not ChooseProducts(Prefers(LINEAR, workspace=2**20)).apply(_captured(of_weight, inputs))


def test_long_sums_stay_where_they_are_added_up_in_parts():
    inputs = [torch.randn(8, 1024), torch.randn(8, 1024)]
    assert not ChooseProducts(Prefers(LINEAR)).apply(_captured(of_inner, inputs))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_spreads_as_in_eager(value):
    x, w = torch.randn(8, 8), torch.rand(8, 8) + 0.5
    x[3, 4] = value
    graph_module = _captured(of_inner, [x, w])
    assert ChooseProducts(Prefers(LINEAR)).apply(graph_module)
    assert torch.equal(graph_module(x, w).isfinite(), of_inner(x, w).isfinite())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_stay(dtype):
    inputs = [torch.randn(shape, dtype=dtype) for shape in SHAPES[of_inner]]
    assert not ChooseProducts(Prefers(LINEAR)).apply(_captured(of_inner, inputs))


def test_bias_matrices_and_scaled_ones_stay():
    x, w = torch.randn(8, 4), torch.randn(4, 6)
    whole = _captured(lambda b, x, w: aten.addmm(b, x, w), [torch.randn(8, 6), x, w])
    scaled = _captured(lambda b, x, w: aten.addmm(b, x, w, alpha=2), [torch.randn(6), x, w])
    choose = ChooseProducts(Prefers(LINEAR))
    assert not choose.apply(whole) and not choose.apply(scaled)


def test_an_estimate_that_knows_no_libraries_changes_nothing():
    inputs = [torch.randn(shape) for shape in SHAPES[of_input]]
    graph_module = _captured(of_input, inputs)
    targets = [node.target for node in graph_module.graph.nodes]
    assert not ChooseProducts(AnalyticCost(profile_for("cpu"))).apply(graph_module)
    assert [node.target for node in graph_module.graph.nodes] == targets


def test_both_kernels_count_the_same_operations_and_are_measured_alike():
    inputs = [torch.randn(shape) for shape in SHAPES[with_bias]]
    graph_module = _captured(with_bias, inputs)
    (before,) = (n for n in graph_module.graph.nodes if n.target is aten.addmm.default)
    counted = flops(signature(before), results(before))
    assert ChooseProducts(Prefers(LINEAR)).apply(graph_module)
    (after,) = (n for n in graph_module.graph.nodes if n.target is LINEAR)
    assert flops(signature(after), results(after)) == counted
    assert measure(signature(after), 64).time > 0


def test_a_step_whose_products_were_chosen_holds_what_its_plan_says(monkeypatch):
    monkeypatch.setattr("memplan.backend.cost_model", lambda *_: _Favouring())
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = torch.randn(512, 64)
    compiled = torch.compile(model, backend="memplan", options={"fusion.enabled": True, "lowering": "eager"})

    def step() -> None:
        compiled(x).square().mean().backward()
        model.zero_grad(set_to_none=True)

    step()
    planned = memplan.recent_plans()[-1]
    assert LINEAR in {node.target for node in planned.scheduled.graph_module.graph.nodes}
    own = planned.held - planned.problem.resident_bytes
    # The loss stands outside of the compiled graph: its square and the gradient of that, of the output's size.
    assert peak_above(step) <= own + 2 * 512 * 64 * 4 + 4096


class _Favouring:
    """Measured workspaces, and times by which oneDNN wins."""

    def __init__(self) -> None:
        from memplan.cost import cost_model

        self._measured = cost_model("profile", profile_for("cpu"))

    def cost(self, node: fx.Node) -> Cost:
        found = self._measured.cost(node)
        return Cost(found.time / 1000, found.workspace) if node.target is LINEAR else found

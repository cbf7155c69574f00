"""Products by experts equal those of gathered matrices to rounding, copy no matrix, and leave alone what they cannot
stand in for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memplan
from memplan.cost.measured import measure
from memplan.cost.signature import Signature, describe, layouts
from memplan.cost.workspace import OWN_RULES
from memplan.passes.calls import name_of
from memplan.passes.experts import GroupExperts
from memplan.runtime.experts import multiply_gathered
from tests.peak import peak_above

EXPERTS, ROWS, WIDTH, OUT = 5, 9, 6, 7


def _rewritten(function: Callable[..., object], *inputs: Tensor) -> torch.fx.GraphModule | None:
    """What the pass makes of the graph that dynamo captures."""
    found: list[torch.fx.GraphModule | None] = []

    def backend(graph_module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        found.append(GroupExperts().apply(graph_module))
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=False)(*inputs)
    return found[0]


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    rows, weight = torch.randn(ROWS, WIDTH), torch.randn(EXPERTS, WIDTH, OUT)
    return rows.requires_grad_(), weight.requires_grad_(), torch.randint(0, EXPERTS, (ROWS,))


def from_left(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    return torch.bmm(rows.unsqueeze(1), weight[experts]).squeeze(1)


def from_right(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    return (weight.view(EXPERTS, OUT, WIDTH)[experts,] @ rows[:, :, None])[..., 0]


def selected(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    return rows.unsqueeze(1).matmul(weight.index_select(0, experts)).squeeze(1).add_(1)


@pytest.mark.parametrize("function", [from_left, from_right, selected])
def test_matrices_are_not_gathered_and_values_stay(function):
    inputs = _inputs()
    module = _rewritten(function, *inputs)
    assert module is not None
    assert not any(name_of(n) in ("matmul", "index_select") for n in module.graph.nodes)
    assert sum(n.target is multiply_gathered for n in module.graph.nodes) == 1
    by_name = dict(zip(("L_rows_", "L_weight_", "L_experts_"), inputs, strict=True))
    (made,) = module(*(by_name[str(n.target)] for n in module.graph.nodes if n.op == "placeholder"))
    want = function(*inputs)
    torch.testing.assert_close(made, want)
    upstream = torch.randn_like(want)
    given_gradients = torch.autograd.grad(made, inputs[:2], upstream)
    torch.testing.assert_close(given_gradients, torch.autograd.grad(want, inputs[:2], upstream))
    assert all(g.stride() == i.stride() for g, i in zip(given_gradients, inputs, strict=False))


def read_twice(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    mine = weight[experts]
    return torch.bmm(rows.unsqueeze(1), mine).sum() + mine.square().sum()


def several_vectors(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    return torch.bmm(rows.unsqueeze(1).expand(-1, 2, -1), weight[experts])


def one_matrix_for_all(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    return torch.matmul(rows.unsqueeze(0), weight[experts])


def rows_of_a_matrix(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    return torch.bmm(rows.unsqueeze(1), weight[experts, :, :OUT])


@pytest.mark.parametrize("function", [read_twice, several_vectors, one_matrix_for_all, rows_of_a_matrix])
def test_what_it_cannot_stand_in_for_is_left_alone(function):
    assert _rewritten(function, *_inputs()) is None


@settings(max_examples=40)
@given(
    rows=st.integers(1, 12),
    experts=st.integers(1, 6),
    left=st.booleans(),
    backwards=st.booleans(),
    frozen=st.sampled_from(["", "rows", "weight"]),
    seed=st.integers(0, 9),
)
def test_any_routing_in_double_precision(rows, experts, left, backwards, frozen, seed):
    torch.manual_seed(seed)
    vectors = torch.randn(rows, 3, dtype=torch.float64).requires_grad_(frozen != "rows")
    shape = (experts, 3, 4) if left else (experts, 4, 3)
    weight = torch.randn(shape, dtype=torch.float64).requires_grad_(frozen != "weight")
    ids = torch.randint(0, experts, (rows,)) - (experts if backwards else 0)
    given_vectors = vectors.unsqueeze(1 if left else 2)
    want = given_vectors @ weight[ids] if left else weight[ids] @ given_vectors
    got = multiply_gathered(weight, ids, given_vectors, left, torch.float64)
    torch.testing.assert_close(got, want)
    asked = [t for t in (vectors, weight) if t.requires_grad]
    upstream = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, asked, upstream), torch.autograd.grad(want, asked, upstream))


def test_second_derivatives():
    rows, weight, experts = (t.double() if t.is_floating_point() else t for t in _inputs())
    by = torch.ops.memplan.expert_order(experts, EXPERTS)
    inputs = (rows.detach().requires_grad_(), weight.detach().requires_grad_())
    for transposed in (False, True):
        matrices = (inputs[0], inputs[1].transpose(1, 2) if transposed else inputs[1])
        run = lambda r, w, t=transposed: torch.ops.memplan.expert_products(r, w, by, t)
        assert torch.autograd.gradgradcheck(run, matrices)


@pytest.mark.parametrize("expert", [EXPERTS, -EXPERTS - 1])
def test_an_expert_that_is_not_there_is_an_error(expert):
    rows, weight, experts = _inputs()
    experts[3] = expert
    with pytest.raises(IndexError, match="none of the 5"):
        multiply_gathered(weight, experts, rows.unsqueeze(1), True, torch.float32)


def test_an_expert_without_rows_gets_zeros():
    rows, _, _ = _inputs()
    by = torch.ops.memplan.expert_order(torch.zeros(ROWS, dtype=torch.int64), 2)
    sums = torch.ops.memplan.expert_sums(rows, rows, by, 2)
    torch.testing.assert_close(sums[0], rows.t() @ rows)
    assert not sums[1].any()


@pytest.mark.parametrize("name", ["expert_order", "expert_products", "expert_sums"])
def test_the_ops_are_what_torch_expects_of_ops(name):
    rows, weight, experts = _inputs()
    by = torch.ops.memplan.expert_order(experts, EXPERTS)
    operands = {
        "expert_order": (experts, EXPERTS),
        "expert_products": (rows, weight, by, False),
        "expert_sums": (rows, rows.detach(), by, EXPERTS),
    }
    torch.library.opcheck(getattr(torch.ops.memplan, name).default, operands[name])


class Mixture(nn.Module):
    """Rows that each take one expert's matrices out and back, by copies of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.wide, self.narrow = (nn.Parameter(0.1 * torch.randn(4, *shape)) for shape in ((64, 32), (32, 64)))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).topk(2, -1)
        experts, rows = chosen.reshape(-1), x.repeat_interleave(2, 0)
        middle = torch.bmm(self.wide[experts], rows.unsqueeze(-1)).squeeze(-1).relu()
        out = torch.bmm(self.narrow[experts], middle.unsqueeze(-1)).squeeze(-1)
        return (out * weight.reshape(-1, 1)).view(len(x), 2, -1).sum(1).square().mean()


@pytest.mark.parametrize("estimator", ["analytic", "profile"])
def test_a_mixture_of_experts_takes_a_tenth_of_its_memory(estimator):
    torch.manual_seed(0)
    model, x = Mixture(), torch.randn(96, 32)
    want = torch.autograd.grad(model(x), list(model.parameters()))
    eager = peak_above(lambda: torch.autograd.grad(model(x), list(model.parameters())) and None)
    torch._dynamo.reset()
    options = {"fusion.enabled": True, "lowering": "eager", "runtime_estimator": estimator}
    run = torch.compile(model, backend="memplan", options=options)

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(run(x), list(model.parameters())))

    torch.testing.assert_close(step(), list(want))
    planned = memplan.recent_plans()[-1]
    targets = [op.target for op in planned.problem.ops]
    assert sum("expert_products" in t for t in targets) == 3  # x is no parameter: nothing asks for its gradient
    assert sum("expert_sums" in t for t in targets) == 2
    above = peak_above(lambda: step() and None)
    assert above <= eager / 10
    assert above + planned.problem.resident_bytes <= planned.held


def test_small_products_of_narrow_numbers_are_computed_wide_and_rounded_once() -> None:
    """oneDNN needs longer to begin them than float32 takes; what that holds besides is in the plan."""
    chance = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(40, 24, generator=chance).bfloat16(), torch.randn(4, 24, 16, generator=chance).bfloat16()
    experts = torch.randint(0, 4, (40,), generator=chance)
    by = torch.ops.memplan.expert_order(experts, 4)
    made = torch.ops.memplan.expert_products(rows, weight, by, False)
    wide = torch.einsum("sd,sdn->sn", rows.float(), weight[experts].float())
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made, wide.bfloat16(), rtol=2**-8, atol=1e-5)
    summed = torch.ops.memplan.expert_sums(rows, made, by, 4)
    of_each = torch.einsum("sa,sb->sab", rows.float(), made.float())
    exact = torch.zeros(4, 24, 16).index_add_(0, experts, of_each)
    torch.testing.assert_close(summed, exact.bfloat16(), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("width", (16, 256, 512))
@pytest.mark.parametrize("experts", (1, 4), ids=("all rows with one expert", "rows spread"))
def test_workspaces_are_no_less_than_the_kernels(dtype: torch.dtype, width: int, experts: int) -> None:
    rows, weight = torch.randn(512, width).to(dtype), torch.randn(4, width, 2 * width).to(dtype)
    by = torch.ops.memplan.expert_order(torch.randint(0, experts, (512,)), 4)
    for target, args in (
        (torch.ops.memplan.expert_products.default, (rows, weight, by, False)),
        (torch.ops.memplan.expert_sums.default, (rows, rows, by, 4)),
    ):
        result = target(*args)
        described = Signature(target, tuple(map(describe, args)), ())
        stated = OWN_RULES[target.name()](described, layouts(describe(result)))
        held = peak_above(partial(target, *args)) - result.nbytes
        assert held <= stated + 4096
        assert measure(described, 64).workspace >= stated

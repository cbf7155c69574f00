"""The roofline: FLOPs, bytes, launches, and its order of magnitude."""

from typing import Any

import torch
from graphs import calls, only, trace
from hypothesis import given
from hypothesis import strategies as st

from memplan.cost.analytic import AnalyticCost, flops
from memplan.cost.signature import Layout, Signature, describe, results, signature
from memplan.devices import profile_for

aten = torch.ops.aten
H100 = AnalyticCost(profile_for("h100-80gb"))


def count(node: torch.fx.Node) -> float:
    return flops(signature(node), results(node))


def test_flops_of_products() -> None:
    a, b = torch.rand(32, 48), torch.rand(48, 64)
    product = 2 * 32 * 48 * 64
    assert count(only(aten.mm.default, a, b)) == product
    assert count(only(lambda a, b: aten.addmm.default(b[0], a, b), a, b)) == product
    assert count(only(aten.bmm.default, torch.rand(8, 32, 48), torch.rand(8, 48, 64))) == 8 * product
    assert count(only(aten.mv.default, a, torch.rand(48))) == 2 * 32 * 48
    assert count(only(aten.add.Tensor, a, a)) == 0


def test_each_gradient_of_a_convolution_costs_what_the_forward_does() -> None:
    for groups in (1, 8):
        x, w = torch.rand(4, 16, 20, 20), torch.rand(32, 16 // groups, 3, 3)
        rest = ([1, 1], [1, 1], [1, 1], False, [0, 0], groups)
        forward = count(only(lambda x, w, rest=rest: aten.convolution.default(x, w, None, *rest), x, w))
        assert forward == 2 * 4 * 32 * 400 * (16 // groups) * 9
        for mask, times in (([True, True, False], 2), ([False, True, True], 1)):
            backward = lambda g, x, w, rest=rest, mask=mask: aten.convolution_backward.default(
                g, x, w, [32], *rest, mask
            )
            assert count(only(backward, torch.rand(4, 32, 20, 20), x, w)) == times * forward


def test_flops_of_attention_on_the_cpu() -> None:
    q = torch.rand(2, 4, 64, 32)
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert count(only(lambda q: attention(q, q, q)[0], q)) == 2 * 2 * 2 * 4 * 64 * 64 * 32


def test_views_and_tuples_cost_nothing() -> None:
    graph = trace(lambda x: torch.split(x.t().view(8, 8), 4)[0].unsqueeze(0), torch.rand(8, 8))
    assert {H100.cost(n).time for n in graph.graph.nodes} == {0.0}


def test_a_large_product_runs_near_the_rate_of_its_dtype() -> None:
    for dtype, rate in ((torch.float32, 67e12), (torch.bfloat16, 989e12)):
        a = torch.empty(8192, 8192, dtype=dtype, device="meta")
        time = H100.estimate(signature(only(aten.mm.default, a, a)), [describe(a)]).time
        assert 2 * 8192**3 / rate * 1e6 <= time <= 2 * 8192**3 / rate * 1e6 + 10


def test_a_pointwise_op_runs_at_the_memorys_rate() -> None:
    x = torch.empty(1 << 28, device="meta")
    assert abs(H100.cost(only(aten.add.Tensor, x, x)).time / (3 * 4 * (1 << 28) / 3.35e12 * 1e6) - 1) < 0.01


def test_a_lookup_does_not_read_its_table() -> None:
    table, ids = torch.empty(1 << 20, 1024, device="meta"), torch.empty(128, dtype=torch.int64, device="meta")
    assert H100.cost(only(aten.embedding.default, table, ids)).time < 10


def test_workspace_rules_name_the_known_kernels() -> None:
    cpu = AnalyticCost(profile_for("cpu"))
    x = torch.rand(64, 256)
    assert cpu.cost(only(aten.logsumexp.default, x, [1])).workspace == x.nbytes
    assert cpu.cost(only(aten.add.Tensor, x, x)).workspace == 0
    assert cpu.cost(only(aten.add.Tensor, x, x.double())).workspace == 2 * x.nbytes
    assert cpu.cost(only(aten.gelu_backward.default, x.t(), x.t())).workspace >= 2 * x.nbytes
    source, weight = torch.rand(2, 16, 32, 32), torch.rand(16, 16, 3, 3)
    convolve = lambda x, w: aten.convolution.default(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert cpu.cost(only(convolve, source, weight)).workspace > source.nbytes


def test_every_op_of_a_training_step_has_a_price() -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def step(x: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
        names = dict(zip(dict(layer.named_parameters()), weights, strict=True))
        loss = torch.func.functional_call(layer, names, (x,)).square().mean()
        return list(torch.autograd.grad(loss, weights))

    weights = [p.detach().requires_grad_() for p in layer.parameters()]
    nodes = calls(trace(step, torch.rand(2, 16, 32), *weights))
    assert len(nodes) > 40
    for name in ("cpu", "h100-80gb", "rtx4090-24gb"):
        model = AnalyticCost(profile_for(name))
        costs = [model.cost(node) for node in nodes]
        assert all(0 <= c.time < 1e4 and c.workspace % model.profile.granularity == 0 for c in costs)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), max_size=4))
def test_extent_is_what_as_strided_needs(sizes_and_strides: list[tuple[int, int]]) -> None:
    shape, stride = tuple(s for s, _ in sizes_and_strides), tuple(t for _, t in sizes_and_strides)
    layout = Layout(torch.float32, shape, stride, "cpu")
    storage = torch.zeros(layout.extent)
    view = storage.as_strided(shape, stride)
    assert view.numel() == layout.numel
    assert layout.numel == 0 or storage.untyped_storage().nbytes() == 4 * layout.extent


def test_symbolic_sizes_are_taken_at_their_hint() -> None:
    node = only(lambda a, b: aten.mm.default(a, b), torch.rand(24, 48), torch.rand(48, 64), symbolic=True)
    assert [layout.shape for layout in signature(node).operands()] == [(24, 48), (48, 64)]
    assert all(type(size) is int for layout in results(node) for size in layout.shape)
    hash(signature(node))


def test_arguments_by_name_count_as_by_position() -> None:
    x, w = torch.rand(2, 4, 8, 8), torch.rand(8, 4, 3, 3)
    graph = torch.fx.Graph()
    source, weight = graph.placeholder("x"), graph.placeholder("w")
    source.meta["val"], weight.meta["val"] = x, w
    rest = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "transposed": False}
    named: dict[str, Any] = {
        "input": source,
        "weight": weight,
        "bias": None,
        **rest,
        "output_padding": [0, 0],
        "groups": 1,
    }
    by_name = graph.call_function(aten.convolution.default, (), named)
    by_position = graph.call_function(aten.convolution.default, tuple(named.values()))
    assert signature(by_name) == signature(by_position)


def test_attention_with_heads_behind_tokens() -> None:
    q = torch.empty(2, 64, 4, 32, dtype=torch.bfloat16, device="meta")
    described = describe(q)
    forward = Signature(aten._flash_attention_forward.default, (described,) * 3, ())
    backward = Signature(aten._flash_attention_backward.default, (described,) * 4, ())
    assert flops(forward, []) == 4 * (2 * 4 * 64 * 64 * 32)
    assert flops(backward, []) == 10 * (2 * 4 * 64 * 64 * 32)

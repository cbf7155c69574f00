"""Views of views: the same elements by fewer calls, whatever is looked at."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from memplan.backend import recent_plans
from memplan.passes.views import MergeViews
from tests.backend.compare import compare

aten = torch.ops.aten


def traced(function: Callable[[Tensor], Any], x: Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(x)


def calls(graph_module: fx.GraphModule) -> list[object]:
    return [n.target for n in graph_module.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    ("views", "left"),
    [
        (lambda x: x.t().t(), 0),
        (lambda x: x.transpose(0, 1).permute(1, 0), 0),
        (lambda x: x.view(2, 2, 6).view(3, 8).view(4, 6), 0),
        (lambda x: x.view(2, 2, 6).view(3, 8), 1),
        (lambda x: x.expand(4, 6), 0),
        (lambda x: x[:, :], 0),
        (lambda x: x.unsqueeze(0).squeeze(0), 0),
        (lambda x: x.detach().t(), 1),
        (lambda x: x[1:].t().t(), 1),
        (lambda x: x[1:][:], 1),
        (lambda x: x.t(), 1),
        (lambda x: x.view(6, 4), 1),
        (lambda x: x.as_strided((6, 4), (4, 1)).view(4, 6), 2),  # its elements follow from strides
    ],
)
def test_what_is_left_of_views(views: Callable[[Tensor], Tensor], left: int) -> None:
    x = torch.arange(24.0).view(4, 6)
    graph_module = traced(lambda x: views(x) * 2, x)
    before = len(calls(graph_module))
    changed = MergeViews().apply(graph_module)
    assert len(calls(graph_module)) == left + 1
    assert changed == (left + 1 < before)
    assert torch.equal(graph_module(x), views(x) * 2)


def test_results_stay_tensors_of_their_own() -> None:
    x = torch.ones(3, 4)
    graph_module = traced(lambda x: x.t().t(), x)
    assert not MergeViews().apply(graph_module)
    assert graph_module(x) is not x

    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y.t().t(), y.detach()

    graph_module = traced(twice, x)
    assert MergeViews().apply(graph_module)
    assert calls(graph_module) == [aten.mul.Tensor, aten.detach.default]


def test_dynamic_sizes_are_left_alone() -> None:
    graph_module = make_fx(lambda x: x.view(-1).view(x.shape) * 2, tracing_mode="symbolic")(torch.ones(3, 4))
    MergeViews().apply(graph_module)
    assert torch.equal(graph_module(torch.ones(5, 7)), torch.full((5, 7), 2.0))


@given(st.data(), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_random_views_show_what_they_showed(data: st.DataObject, shape: list[int]) -> None:
    size = math.prod(shape)
    shapes = [[size], [1, size], [size, 1], shape, shape[::-1]]
    kinds = st.sampled_from(["reshape", "permute", "expand", "slice", "detach", "squeeze"])
    steps = data.draw(st.lists(kinds, min_size=1, max_size=6))
    choices = [data.draw(st.sampled_from(shapes)) for _ in steps]
    orders = [data.draw(st.permutations(range(4))) for _ in steps]

    def views(x: Tensor) -> Tensor:
        for kind, other, order in zip(steps, choices, orders, strict=True):
            if kind == "reshape" and x.is_contiguous() and x.numel() == size:
                x = x.view(other)
            elif kind == "permute":
                x = x.permute([d for d in order if d < x.dim()])
            elif kind == "expand" and x.numel() == size:
                x = x.expand(order[0] + 1, *x.shape)[0] if order[0] else x.expand(x.shape)
            elif kind == "slice" and x.dim():
                x = x[:, None] if order[0] == 0 else x[: order[0] + 1]
            elif kind == "detach":
                x = x.detach()
            elif kind == "squeeze":
                x = x.squeeze()
        return x

    x = torch.arange(float(size)).view(shape)
    graph_module = traced(lambda x: views(x) + 1, x)
    before = len(calls(graph_module))
    MergeViews().apply(graph_module)
    graph_module.graph.lint()
    assert len(calls(graph_module)) <= before
    assert torch.equal(graph_module(x), views(x) + 1)
    elsewhere = torch.empty(2, *shape)[1].copy_(x)
    assert torch.equal(graph_module(elsewhere), views(x) + 1)


def test_a_step_transposes_no_weight_twice() -> None:
    class Linears(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x).square().sum()

    compare(lambda: Linears(*(nn.Linear(8, 8) for _ in range(3))), (torch.randn(2, 5, 8),))
    nodes = [n for n in recent_plans()[-1].scheduled.graph_module.graph.nodes if n.target is aten.t.default]
    assert nodes and not [n for n in nodes if n.args[0].target is aten.t.default]

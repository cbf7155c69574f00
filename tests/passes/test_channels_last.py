"""Convolutions work channels-last: equal to rounding, results lie as they did, and what is written to stays a view."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from memplan.backend import recent_plans
from memplan.codegen.lowering import default_lowering
from memplan.passes.channels_last import ChannelsLast
from memplan.runtime.norms import without_statistics

WEIGHT = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(1))
SECOND = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(2))


def _captured(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule | None:
    found: list[fx.GraphModule | None] = []

    def backend(graph_module: fx.GraphModule, _: object) -> Callable[..., object]:
        found.append(ChannelsLast().apply(graph_module))
        return found[-1] or graph_module

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return found[0]


def convolved(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(x, w, padding=1).relu(), v)


def pooled(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(convolved(x, w, v), 1).flatten(1)


def tokens(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.layer_norm(convolved(x, w, v).flatten(2).transpose(1, 2), (8,))


def in_place(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.conv2d(F.relu(F.conv2d(x, w), inplace=True), v).add_(1.0)


@pytest.mark.parametrize("function", [convolved, pooled, tokens, in_place])
def test_values_and_gradients_are_equal_to_rounding_and_lie_as_they_did(function):
    x = torch.randn(4, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    assert _captured(function, x, WEIGHT, SECOND) is not None
    leaves = [t.clone().requires_grad_() for t in (x, WEIGHT, SECOND)]
    others = [t.clone().requires_grad_() for t in (x, WEIGHT, SECOND)]
    torch._dynamo.reset()
    found = torch.compile(function, backend=lambda g, _: ChannelsLast().apply(g) or g, fullgraph=True)(*leaves)
    eager = function(*others)
    assert found.stride() == eager.stride()
    torch.testing.assert_close(found, eager)
    found.square().sum().backward()
    eager.square().sum().backward()
    for one, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-3)


def test_images_are_copied_once():
    rewritten = _captured(convolved, torch.randn(4, 3, 9, 11), WEIGHT, SECOND)
    assert rewritten is not None
    layouts: list[bool] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and n.op == "call_function":
                layouts.append(value.is_contiguous(memory_format=torch.channels_last))
            return value

    placeholders = [n for n in rewritten.graph.nodes if n.op == "placeholder"]
    shapes = [tuple(n.meta["example_value"].shape) for n in placeholders]
    Watch(rewritten).run(*(torch.randn(shape) for shape in shapes))
    assert all(layouts[:-1]) and not layouts[-1]  # the result is laid out as it was


def written_through(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    out = F.conv2d(x, w)
    out.flatten(1).mul_(2.0)
    return F.conv2d(out, v)


def a_view_that_needs_rows(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return convolved(x, w, v).view(x.shape[0], -1) * 2


def without_convolutions(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return x.relu() + w.sum() + v.sum()


@pytest.mark.parametrize("function", [written_through, a_view_that_needs_rows, without_convolutions])
def test_what_another_layout_would_change_is_left_alone(function):
    assert _captured(function, torch.randn(4, 3, 9, 11), WEIGHT, SECOND) is None


def test_a_planned_step_keeps_eagers_gradients_to_rounding():
    """Whatever the costs of this machine choose."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
    )
    x = torch.randn(8, 3, 16, 16)
    options = {"fusion.enabled": True, "lowering": "eager"}
    torch.compile(model, backend="memplan", options=options)(x).square().mean().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().mean().backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        assert one.stride() == parameter.grad.stride()
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(default_lowering("cpu") != "inductor", reason="no C++ compiler")
@pytest.mark.parametrize("budget", (None, "75%"))
def test_norms_of_channels_inside_are_regions_however_often_they_run(budget):
    """Torch's own kernel sums such images up in single precision; statistics of a norm are updated once."""
    torch.manual_seed(0)
    layers = [(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(4)]
    net = nn.Sequential(*(layer for group in layers for layer in group), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    twin, images = copy.deepcopy(net), torch.randn(4, 4, 16, 16).contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    options = {"fusion.enabled": True, "memory_budget": budget, "runtime_estimator": "analytic"}
    run = torch.compile(net, backend="memplan", options=options)
    for _ in range(2):
        found, eager = run(images), twin(images)
        found.square().mean().backward()
        eager.square().mean().backward()
    planned = recent_plans()[-1]
    nodes = planned.scheduled.graph_module.graph.nodes
    assert not any(n.meta["val"].is_contiguous() for n in nodes if n.target is torch.ops.aten.convolution.default)
    kernels = [str(n.target) for n in nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert not any("batch_norm" in kernel for kernel in kernels)
    assert not any(n.target is without_statistics for n in nodes)
    assert (planned.plan.recomputed > 0) == (budget is not None)
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
    for one, other in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other)

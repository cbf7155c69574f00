"""What Inductor's C++ computes by decompositions of ours, against float64 and torch's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from memplan.codegen.decompositions import loss_backward, paired
from memplan.codegen.lowering import FusedRegion, default_lowering
from memplan.codegen.ops import is_thin_product
from memplan.codegen.region import Region
from memplan.torch_compat import FakeTensorMode, trace_fake

aten = torch.ops.aten
EPSILON, MOMENTUM = 1e-5, 0.1
ROUNDING = 1.5  # times the error of torch's kernel for images that lie one channel after the other

pytestmark = pytest.mark.skipif(default_lowering("cpu") != "inductor", reason="no C++ compiler")


def forward(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
    return aten._native_batch_norm_legit_functional(x, weight, bias, mean, variance, True, MOMENTUM, EPSILON)


def forward_again(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
    return aten._native_batch_norm_legit.no_stats(x, weight, bias, True, MOMENTUM, EPSILON)


def backward(gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return aten.native_batch_norm_backward(gradient, x, weight, None, None, mean, scale, True, EPSILON, [True] * 3)


def compiled(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Sequence[Tensor]:
    mode = FakeTensorMode()
    graph = trace_fake(lambda *given: tuple(function(*given)), [mode.from_tensor(t) for t in inputs])
    results = FusedRegion(Region.from_graph_module(graph), "inductor")(*inputs)
    return (results,) if isinstance(results, Tensor) else results


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("inside", (True, False), ids=("channels inside", "channels outside"))
@pytest.mark.parametrize("shape", ((8, 16, 24, 24), (4, 5, 7, 9), (16, 8, 30)), ids=str)
@pytest.mark.parametrize("offset", (0.0, 30.0))
def test_batch_norms_round_as_torch_does_with_double_sums(shape: tuple[int, ...], offset: float, inside: bool) -> None:
    chance = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(shape, generator=chance) for _ in range(2))
    x = x * 2 + offset
    x[(0, slice(None), *[0] * (x.dim() - 2))] = 25 + offset  # an outlier where each channel begins
    channels = shape[1]
    weight, bias = torch.rand(channels, generator=chance) + 0.5, torch.randn(channels, generator=chance)
    running = torch.zeros(channels), torch.ones(channels)
    given = (x, weight, bias, *running)
    exact = forward(*(t.double() for t in given))
    later = (gradient, x, weight, exact[1].float(), exact[2].float())
    exact_later = backward(*(t.double() for t in later[:3]), *exact[1:3])
    plain = errors(forward(*given), exact), errors(backward(*later), exact_later)
    if inside:
        if x.dim() != 4:
            pytest.skip("torch has no such layout")
        x, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (x, gradient))
        given, later = (x, *given[1:]), (gradient, x, *later[2:])
    ours = errors(compiled(forward, *given), exact), errors(compiled(backward, *later), exact_later)
    again = errors(compiled(forward_again, *given), exact[:3])
    for error, limit in zip((*ours[0], *ours[1], *again), (*plain[0], *plain[1], *plain[0][:3]), strict=True):
        assert error <= ROUNDING * limit + torch.finfo(torch.float32).eps


def test_a_norm_of_doubles_is_one_of_doubles() -> None:
    x = torch.randn(4, 6, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(6, dtype=torch.float64)
    found, wanted = compiled(forward, x, ones, ones, ones, ones), forward(x, ones, ones, ones, ones)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_without_weights_and_wanted_gradients() -> None:
    x = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )

    def norm(x: Tensor) -> tuple[Tensor, ...]:
        return aten._native_batch_norm_legit.no_stats(x, None, None, True, MOMENTUM, EPSILON)

    def first_gradient(x: Tensor) -> tuple[Tensor, ...]:
        _, mean, scale = norm(x)
        wanted = [True, False, False]
        return aten.native_batch_norm_backward(x.sin(), x, None, None, None, mean, scale, True, EPSILON, wanted)[:1]

    for function in (norm, first_gradient):
        for found, wanted in zip(compiled(function, x), function(x.contiguous()), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("biased", (True, False))
def test_a_layer_norm_over_two_dtypes_is_the_kernel_s(biased: bool) -> None:
    """A narrow operand, float32 parameters and statistics; the backward reads those."""
    chance = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(6, 5, 24, generator=chance).bfloat16() for _ in range(2))
    parameters = [torch.rand(24, generator=chance) + 0.5 for _ in range(1 + biased)]

    def norm(x: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        return aten.native_layer_norm(x, [24], weight, bias[0] if bias else None, 1e-5)

    found, wanted = compiled(norm, x, *parameters), norm(x, *parameters)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)

    def back(gradient: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, *bias: Tensor) -> list[Tensor]:
        given, needed = bias[0] if bias else None, [True, True, biased]
        made = aten.native_layer_norm_backward(gradient, x, [24], mean, scale, weight, given, needed)
        return [t for t in made if t is not None]

    later = (gradient, x, *wanted[1:], *parameters)
    for one, other in zip(compiled(back, *later), back(*later), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("sizes", ((1, 9, 20), (20, 9, 1), (7, 1, 20), (1, 1, 1)), ids=str)
@pytest.mark.parametrize("batched", (True, False), ids=("bmm", "mm"))
def test_products_by_a_row_or_a_column(sizes: tuple[int, int, int], batched: bool, dtype: torch.dtype) -> None:
    rows, terms, columns = sizes
    chance = torch.Generator().manual_seed(0)
    batch = (3,) if batched else ()
    left = torch.randn((*batch, terms, rows), generator=chance).to(dtype).transpose(-1, -2)
    right = torch.randn((*batch, terms, columns), generator=chance).to(dtype)
    (found,) = compiled(lambda a, b: [torch.bmm(a, b) if batched else torch.mm(a, b)], left, right)
    exact = left.double() @ right.double()
    assert found.dtype == dtype and found.is_contiguous()
    torch.testing.assert_close(found.double(), exact, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_only_products_shorter_than_their_call_are_thin() -> None:
    def thin(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
        mode = FakeTensorMode()
        operands = [mode.from_tensor(torch.empty(shape)) for shape in (left, right)]
        graph = trace_fake(lambda a, b: (torch.bmm(a, b) if a.dim() == 3 else torch.mm(a, b),), operands)
        return any(is_thin_product(n) for n in graph.graph.nodes)

    assert thin((3, 1, 9), (3, 9, 4)) and thin((5, 1), (1, 7))
    assert not thin((3, 2, 9), (3, 9, 4)) and not thin((1, 4096), (4096, 4096))


@pytest.mark.parametrize("reduction", (0, 1, 2), ids=("rows", "mean", "sum"))
@pytest.mark.parametrize("ignore", (-100, 3))
def test_a_loss_s_backward_sums_no_rows_up(reduction: int, ignore: int) -> None:
    """The two ops of a cross-entropy's backward as one pass over its logits, to the bit."""
    chance = torch.Generator().manual_seed(0)
    logits, classes = torch.randn(9, 50, generator=chance), torch.randint(0, 50, (9,), generator=chance)
    classes[::4] = ignore
    logs = torch.log_softmax(logits, 1)
    loss, total = aten.nll_loss_forward(logs, classes, None, reduction, ignore)
    gradient = torch.randn(loss.shape, generator=chance)

    def backward(gradient: Tensor, logs: Tensor, classes: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        of_logs = aten.nll_loss_backward(gradient, logs, classes, None, reduction, ignore, total)
        return (aten._log_softmax_backward_data(of_logs, logs, 1, logs.dtype),)

    given = gradient, logs, classes, total
    mode = FakeTensorMode()
    graph = trace_fake(lambda *given: backward(*given), [mode.from_tensor(t) for t in given]).graph
    assert loss_backward in {n.target for n in paired(graph).nodes}
    exact = backward(*(t.double() if t.is_floating_point() else t for t in given))
    (found,), (kernel,) = (errors(results, exact) for results in (compiled(backward, *given), backward(*given)))
    assert found <= ROUNDING * kernel + 1e-9

"""Views without their ops: the same values, whatever the arguments look like and whatever tracing said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.runtime.execute import Executable
from tests.runtime.test_execute import executable

aten = torch.ops.aten

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "first half": lambda x: x[: max(1, x.shape[0] // 2)],
    "every second": lambda x: x[..., ::2],
    "last row": lambda x: x[-1] if x.dim() > 1 else x,
    "turned": lambda x: x.transpose(0, -1),
    "one more": lambda x: x.unsqueeze(1),
    "fewer": lambda x: x.squeeze(),
    "diagonal": lambda x: x.diagonal() if x.dim() > 1 else x,
    "windows": lambda x: x.unfold(0, 1, 1),
    "expanded": lambda x: x.unsqueeze(0).expand(3, *x.shape),
    "a part": lambda x: x.split(1, dim=0)[-1],
    "parts": lambda x: torch.cat([p.transpose(0, -1) for p in x.chunk(2, dim=-1)]) if x.shape[-1] > 1 else x,
    "itself": lambda x: x.detach(),
}


def traced(function: Callable[..., Tensor], x: Tensor, mode: str = "fake", wrong: Any = None) -> Executable:
    """``wrong``: a view's target, of which tracing is made to say that it is contiguous."""
    module = make_fx(function, tracing_mode=mode)(x)
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=wrong) if wrong is not None else ():
        node.meta["val"] = torch.empty_like(node.meta["val"], memory_format=torch.contiguous_format)
    graph.output_node().args = ([graph.output_node().args[0]],)
    return executable(graph, module)


class Ops(TorchDispatchMode):
    """Which ops are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def ops(run: Executable, x: Tensor) -> list[Any]:
    """Those of a run after the first."""
    with Ops() as called:
        run([x])
    return called.seen


@settings(max_examples=60)
@given(st.lists(st.sampled_from(sorted(VIEWS)), min_size=1, max_size=5), st.integers(0, 5), st.booleans())
def test_a_view_of_views_is_what_its_ops_would_make(names: list[str], dropped: int, of_input: bool) -> None:
    def function(x: Tensor) -> Tensor:
        y = x if of_input else x.neg()
        for name in names:
            y = VIEWS[name](y)
        return y.exp()

    x = torch.arange(6 * 30.0)[dropped * 30 :][:30].view(2, 5, 3).transpose(0, 1)  # neither dense nor from the start
    run = traced(function, x)
    for _ in range(3):
        assert torch.equal(run([x])[0], function(x))
    copies = [aten.cat.default] * names.count("parts")
    assert [op for op in ops(run, x) if op not in copies] == [aten.neg.default] * (not of_input) + [aten.exp.default]


def test_arguments_may_lie_otherwise_the_next_time() -> None:
    run = traced(lambda x: x.transpose(0, 1).unsqueeze(0).neg(), torch.randn(4, 6))
    for x in (torch.randn(4, 6), torch.randn(6, 4).t(), torch.randn(4, 12)[:, ::2], torch.randn(40)[16:].view(4, 6)):
        for _ in range(2):
            assert torch.equal(run([x])[0], x.t().neg().unsqueeze(0))


def test_what_tracing_got_wrong_stays_with_its_op() -> None:
    x = torch.randn(4, 6)
    run = traced(lambda x: x.neg().transpose(0, 1).unsqueeze(0).exp(), x, wrong=aten.transpose.int)
    assert all(torch.equal(run([x])[0], x.neg().t().unsqueeze(0).exp()) for _ in range(3))
    assert ops(run, x) == [aten.neg.default, aten.exp.default]  # nobody reads the one that is wrong
    run = traced(lambda x: x.neg().transpose(0, 1).exp(), x, wrong=aten.transpose.int)
    assert all(torch.equal(run([x])[0], x.neg().t().exp()) for _ in range(3))
    assert ops(run, x) == [aten.neg.default, aten.transpose.int, aten.exp.default]


@pytest.mark.parametrize(
    ("view", "dtype"),
    [
        (lambda x: x.view(torch.int32).bitwise_not(), torch.float32),
        (lambda x: torch.view_as_real(x).neg(), torch.complex64),
        (lambda x: x.conj().neg(), torch.complex64),
        (lambda x: x.conj().imag.exp(), torch.complex64),
    ],
)
def test_views_of_another_kind_stay_with_their_ops(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(4, dtype=dtype)
    run = traced(view, x)
    assert all(torch.equal(run([x])[0], view(x)) for _ in range(2))


def test_dynamic_sizes_stay_with_their_ops() -> None:
    def function(x: Tensor) -> Tensor:
        return x.neg().view(-1, 2).transpose(0, 1).neg()

    run = traced(function, torch.randn(4, 6), mode="symbolic")
    for rows in (4, 7, 4):
        x = torch.randn(rows, 6)
        assert torch.equal(run([x])[0], function(x))


def test_a_result_that_is_a_view_is_one() -> None:
    x = torch.randn(4, 6)
    run = traced(lambda x: x[1:].transpose(0, 1), x)
    for _ in range(2):
        (result,) = run([x])
        assert result is not x and result.data_ptr() == x[1:].data_ptr() and result.stride() == (1, 6)


def test_a_result_that_shows_a_kernel_s_value_needs_no_op() -> None:
    x = torch.randn(4, 6)
    run = traced(lambda x: x.neg().split(2, dim=1)[1].transpose(0, 1), x)
    for _ in range(2):
        (result,) = run([x])
        assert torch.equal(result, x.neg()[:, 2:4].t()) and result.stride() == (1, 6)
    assert ops(run, x) == [aten.neg.default]

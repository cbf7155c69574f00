"""The IR: canonical, content-addressed, legal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from memplan import torch_compat
from memplan.codegen.eager import compile_eager
from memplan.codegen.inductor_cpu import compile_inductor
from memplan.codegen.lowering import FusedRegion, compile_region
from memplan.codegen.region import Region
from memplan.errors import OptionError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parent))
from regions import ZOO, Arg, build, region_of

aten = torch.ops.aten


def traced(function: object, *shapes: tuple[int, ...]) -> torch.fx.GraphModule:
    with torch_compat.FakeTensorMode():
        inputs = [torch.empty(shape) for shape in shapes]
    return torch_compat.trace_fake(function, inputs)  # type: ignore[arg-type]


def test_names_do_not_count_and_dead_nodes_are_gone() -> None:
    def one(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
        x.sin()
        return (x.exp() * y.tanh(),)

    def other(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
        second, first = y.tanh(), x.exp()
        return (first * second,)

    a, b = (Region.from_graph_module(traced(f, (4, 8), (4, 8))) for f in (one, other))
    assert a.key == b.key and a == b and "sin" not in a.text


def test_shape_stride_dtype_and_constants_count() -> None:
    cases = [
        (lambda x: (x * 2).exp(), Arg((4, 8))),
        (lambda x: (x * 3).exp(), Arg((4, 8))),
        (lambda x: (x * 2).exp(), Arg((8, 4))),
        (lambda x: (x * 2).exp(), Arg((4, 8), stride=(1, 4))),
        (lambda x: (x * 2).exp(), Arg((4, 8), torch.float64)),
    ]
    assert len({region_of(function, (argument,)).key for function, argument in cases}) == len(cases)


def test_compulsory_bytes_count_expanded_inputs_once() -> None:
    region = region_of(lambda x, y: x + y, (Arg((16, 32)), Arg((32,))))
    assert region.compulsory_bytes == 4 * (2 * 16 * 32 + 32)
    assert region_of(lambda x: x + 1, (Arg((16, 32), stride=(0, 1)),)).compulsory_bytes == 4 * (32 + 16 * 32)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: (torch.rand_like(x) + x,), "random"),
        (lambda x: (x.t(),), "only views"),
        (lambda x: (x.exp(), x),  "only views"),
        (lambda x: [(y := x.exp()), y.view(-1)], "only views"),
        (lambda x: (x.exp().sum(0).expand(4, 8),), "expanded"),
    ],
)  # fmt: skip
def test_what_is_no_region(function: object, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        Region.from_graph_module(traced(function, (4, 8)))


def test_an_unknown_lowering_is_an_error() -> None:
    with pytest.raises(OptionError, match="eager"):
        compile_region(region_of(*ZOO["add"]), "metal")


def test_a_fused_region_answers_fake_tensors() -> None:
    region, inputs = build(ZOO["layer_norm"])
    call = FusedRegion(region, "eager")
    mode = torch_compat.FakeTensorMode()
    with mode:
        fake = call(*(mode.from_tensor(t) for t in inputs))
    real = call(*inputs)
    assert [(t.shape, t.stride()) for t in fake] == [(t.shape, t.stride()) for t in real]


@pytest.mark.parametrize("name", ["layer_norm_gelu", "cross_entropy_backward", "rotary", "batch_norm_relu"])
def test_inductor_agrees_with_eager(name: str) -> None:
    region, inputs = build(ZOO[name])
    compiled = compile_inductor(region)
    assert compiled.lowering == "inductor" and compile_inductor(region) is compiled
    before = [t.clone() for t in inputs]
    for found, expected, kind in zip(compiled(inputs), compile_eager(region)(inputs), region.outputs):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (tuple(found.shape), found.stride(), found.dtype) == (kind.shape, kind.stride, kind.dtype)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs))


def test_workspace_is_what_the_allocator_sees() -> None:
    """Two reductions over different axes: Inductor keeps a buffer in between; the wrapper's text tells its size."""

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = torch.softmax(x, 0)
        return torch.softmax(y * w, 1)

    region = region_of(function, (Arg((256, 512)), Arg((512,))))
    compiled = compile_inductor(region)
    inputs = [torch.randn(256, 512), torch.randn(512)]
    compiled(inputs)
    with torch.profiler.profile(profile_memory=True) as profile:
        results = compiled(inputs)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    outputs = sum(t.untyped_storage().nbytes() for t in results)
    assert 0 <= compiled.workspace - (peak - outputs) <= 64 * 8  # the allocator rounds each buffer to 64 bytes

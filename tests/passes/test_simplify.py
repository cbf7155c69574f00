"""What every captured graph goes through: the same bits, less held, no more computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memplan import torch_compat
from memplan.backend import recent_plans
from memplan.passes.heads import GroupedHeads
from memplan.passes.masks import what_is_hidden
from tests.backend.compare import FAST, compare
from tests.peak import peak_above

aten = torch.ops.aten
BATCH, HEADS, LENGTH, WIDTH = 2, 4, 24, 8


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def targets() -> list[Any]:
    """What the last plan's Program calls."""
    return [n.target for n in recent_plans()[-1].scheduled.graph_module.graph.nodes if n.op == "call_function"]


class Attention(nn.Module):
    """Layers of attention under the mask that ``mask(length)`` makes anew in each, key heads repeated for ``groups``."""

    def __init__(self, mask: Callable[[int], Tensor], groups: int = HEADS, layers: int = 2) -> None:
        super().__init__()
        self.mask, self.groups = mask, groups
        width = HEADS * WIDTH
        self.query = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.keys = nn.ModuleList(nn.Linear(width, 2 * groups * WIDTH) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        for query, keys in zip(self.query, self.keys, strict=True):
            q = query(x).view(batch, length, HEADS, WIDTH).transpose(1, 2)
            k, v = keys(x).view(batch, length, 2, self.groups, WIDTH).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v), self.mask(length))
            x = x + out.transpose(1, 2).reshape(x.shape)
        return x

    def repeat(self, heads: Tensor) -> Tensor:
        batch, groups, length, width = heads.shape
        if groups == HEADS:
            return heads
        every = heads[:, :, None].expand(batch, groups, HEADS // groups, length, width)
        return every.reshape(batch, HEADS, length, width)


def causal(length: int) -> Tensor:
    positions = torch.arange(length)
    return positions[None, :] <= positions[:, None]


def window(length: int) -> Tensor:
    positions = torch.arange(length)
    return causal(length) & (positions[:, None] - positions[None, :] < 5)


def everything(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool)


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randn(BATCH, length, HEADS * WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mask", [causal, everything])
def test_a_mask_known_beforehand_is_the_kernels_own(mask: Callable[[int], Tensor]) -> None:
    compare(lambda: Attention(mask), (tokens(),))
    forwards = [n for n in recent_plans()[-1].scheduled.graph_module.graph.nodes if "flash" in str(n.target)]
    assert forwards and all("attn_mask" not in n.kwargs or n.kwargs["attn_mask"] is None for n in forwards)
    assert aten.where.self not in targets()


def test_any_other_mask_is_made_and_saved_once() -> None:
    compare(lambda: Attention(window, layers=3), (tokens(),), budget=None)
    assert targets().count(aten.where.self) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, 64, 129, 600])
def test_the_kernels_own_mask_gives_the_same_bits(dtype: torch.dtype, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v, gradient = (torch.randn(2, 3, length, 16, dtype=dtype, generator=generator) for _ in range(4))
    later = torch.zeros(length, length, dtype=dtype).masked_fill(~causal(length), float("-inf"))
    found = []
    for given in ({"attn_mask": later}, {"is_causal": True}):
        out, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **given)
        back = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, out, sums, 0.0, given.get("is_causal", False), attn_mask=given.get("attn_mask")
        )
        found.append((out, sums, *back))
    for masked, own in zip(*found, strict=True):
        assert torch.equal(masked, own)


def test_what_masks_hide() -> None:
    later = torch.zeros(5, 5).masked_fill(~causal(5), float("-inf"))
    assert what_is_hidden(torch.zeros(2, 1, 5, 7)) == "nothing"
    assert what_is_hidden(later) == what_is_hidden(later.expand(3, 1, 5, 5)) == "later"
    assert what_is_hidden(later.clamp(min=torch.finfo(torch.float32).min)) == "later"
    assert what_is_hidden(later.clamp(min=-1e4)) == ""  # weighs little, not nothing
    assert what_is_hidden(later + torch.eye(5)) == ""
    assert what_is_hidden(later[:, :4]) == what_is_hidden(later.T) == ""
    assert what_is_hidden(torch.stack([later, later.T])) == ""
    assert what_is_hidden(None) == ""


def test_a_mask_that_inputs_decide_stays() -> None:
    class Padded(Attention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            seen = x[:, :, 0] > -10
            self.mask = lambda length: causal(length) & seen[:, None, None, :]
            return super().forward(x)

    compare(lambda: Padded(causal), (tokens(),))
    assert aten.where.self in targets()


@pytest.mark.parametrize(("groups", "mask"), [(1, causal), (2, window)])
def test_key_heads_are_not_repeated(groups: int, mask: Callable[[int], Tensor]) -> None:
    compare(lambda: Attention(mask, groups), (tokens(),))
    attention = [n for n in recent_plans()[-1].scheduled.graph_module.graph.nodes if "_flash_" in str(n.target)]
    keys = [n.args[2 if "backward" in str(n.target) else 1] for n in attention]
    assert keys and all(k.meta["val"].shape[1] == groups for k in keys)


def test_repeated_heads_by_any_spelling() -> None:
    spellings: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.repeat_interleave(2, dim=1),
        lambda t: torch.repeat_interleave(t, 2, 1),
        lambda t: t.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(BATCH, HEADS, LENGTH, WIDTH),
        lambda t: t[:, :, None].expand(BATCH, 2, 2, LENGTH, WIDTH).flatten(1, 2),
    ]
    others: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.repeat(1, 2, 1, 1),  # the heads in another order
        lambda t: t[:, None].expand(BATCH, 2, 2, LENGTH, WIDTH).reshape(BATCH, HEADS, LENGTH, WIDTH),
    ]
    for k, spelling in enumerate([*spellings, *others]):
        assert rewritten(spelling) == (k < len(spellings)), k


def test_what_changes_in_place_outlives_a_rewrite() -> None:
    class Counted(Attention):
        def __init__(self) -> None:
            super().__init__(causal, groups=1, layers=1)
            self.norm = nn.BatchNorm1d(LENGTH)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)  # nobody reads what this returns
            return super().forward(self.norm(x))

    torch.manual_seed(0)
    model = Counted()
    run = torch.compile(model, backend="memplan", options=FAST)
    for step in (1, 2):
        run(tokens()).sum().backward()
        assert int(model.calls) == int(model.norm.num_batches_tracked) == step
    attention = [n for n in recent_plans()[-1].scheduled.graph_module.graph.nodes if "_flash_" in str(n.target)]
    assert attention[0].args[1].meta["val"].shape[1] == 1, "and its heads are grouped"


def rewritten(repeat: Callable[[Tensor], Tensor]) -> bool:
    """Whether the pass regroups an attention whose heads are repeated so; its values are then eager's."""
    found = []

    def backend(graph_module: Any, inputs: Any) -> Any:
        found.append(GroupedHeads().apply(graph_module))
        return found[-1] or graph_module

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)

    torch._dynamo.reset()
    q, k, v = (torch.randn(BATCH, heads, LENGTH, WIDTH) for heads in (HEADS, 2, 2))
    torch.testing.assert_close(torch.compile(attention, backend=backend)(q, k, v), attention(q, k, v))
    return found[0] is not None


def test_heads_are_grouped_under_autocast_where_keys_and_values_differ_in_dtype() -> None:
    class Rotated(nn.Module):
        """As rotary embeddings do it: queries and keys become float32 again, values stay narrow; autocast narrows all."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, heads * WIDTH) for heads in (HEADS, 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                q, k, v = (f(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
                q, k = q * torch.cos(q.float()), k * torch.cos(k.float())
                k, v = (t.repeat_interleave(HEADS // 2, 1) for t in (k, v))
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).float()

    compare(Rotated, (torch.randn(BATCH, LENGTH, WIDTH),), tolerance=2e-2)
    attention = [n for n in recent_plans()[-1].scheduled.graph_module.graph.nodes if "_flash_" in str(n.target)]
    assert attention[0].args[1].meta["val"].shape[1] == 2, "its heads are grouped"
    assert attention[0].args[1].meta["val"].dtype == torch.bfloat16


def test_results_keep_storages_of_their_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.linear(x)
            return torch.exp(y), torch.exp(y)

    model = Twice()
    first, second = torch.compile(model, backend="memplan", options=FAST)(torch.randn(4, 8))
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_what_a_change_lies_between_is_not_merged() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("count", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.linear(x) * torch.cos(self.count))
            self.count.add_(1)
            return (y * torch.cos(self.count)).sum()

    compare(Counter, (torch.randn(4, 8),))


def test_random_ops_are_not_merged() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return ((self.linear(x) + torch.rand(8)) * torch.rand(8)).sum()

    compare(Noise, (torch.randn(4, 8),))


def test_no_duplicate_is_held_for_its_second_reader_alone() -> None:
    """Without a backward, each mask dies with its layer."""
    model = Attention(window, layers=3)
    x = tokens()
    with torch.no_grad():
        run = torch.compile(model, backend="memplan", options=FAST)
        assert torch.equal(run(x), model(x))
    assert targets().count(aten.where.self) == 3


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv2d(16, 24, 3, padding=1), (4, 16, 20, 20)),
        (nn.Conv2d(16, 16, 3, stride=2, groups=16), (4, 16, 21, 21)),
        (nn.Conv1d(16, 8, 5), (4, 16, 60)),
        (nn.ConvTranspose2d(16, 8, 3, stride=2), (4, 16, 9, 9)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_convolution_s_gradients_are_two_kernels_with_the_bits_of_one(
    convolution: nn.Module, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.LayerNorm(shape[-1]), convolution)  # the first one's input needs a gradient

    def step(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        run(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = step(model)
    found = step(torch.compile(model, backend="memplan", options=FAST))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert targets().count(aten.convolution_backward.default) == 2


def test_a_convolution_s_input_is_given_up_before_its_gradient_is_made() -> None:
    class Convolutions(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x).square().sum()

    torch.manual_seed(0)
    model = Convolutions(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    x = torch.randn(16, 8, 64, 64)

    def above(run: Callable[[Tensor], Tensor]) -> int:
        def step() -> None:
            run(x).backward()
            model.zero_grad(set_to_none=True)

        return peak_above(step, warm_ups=2)

    eager = above(model)
    planned = above(torch.compile(model, backend="memplan", options=FAST))
    assert planned < eager - x.nbytes // 2


def test_attention_that_drops_nothing_draws_nothing() -> None:
    compare(lambda: Attention(window), (tokens(),), budget=None)
    assert not [t for t in targets() if "draw" in str(t) or "rng_state" in str(t)]
    attention = [op for op in recent_plans()[-1].built.problem.ops if "scaled_dot_product" in op.target]
    assert attention and not any(op.once for op in attention), "what draws nothing can run again"


def test_dynamic_lengths_stay_right() -> None:
    model = Attention(causal)
    run = torch.compile(model, backend="memplan", dynamic=True, options=FAST)
    for length in (24, 40):
        torch.testing.assert_close(run(tokens(length)), model(tokens(length)))


def test_constants_are_not_computed_with_fake_tensors() -> None:
    """The compile's modes are off while a mask is looked at, and on again afterwards."""
    with torch_compat.FakeTensorMode():
        torch.empty(3)
        with torch_compat.disable_current_modes():
            mask = torch.zeros(4, 4)
        assert what_is_hidden(mask) == "nothing"
        assert isinstance(torch.empty(3), torch_compat.FakeTensor)

"""What is known to break such tools, each case compared with eager and, bit for bit, with the unbudgeted run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.arbitrary import arbitrary_plans
from tests.backend.compare import Deep, X, compare, gelu_tanh


def test_recomputes_and_stays_exact():
    plan = compare(lambda: Deep(gelu_tanh, layers=8), (X,), budget="70%")
    assert plan.recomputed > 0 and plan.peak <= 0.7 * plan.unplanned_peak


def test_dropout_draws_the_same_mask_again():
    plan = compare(lambda: Deep(lambda x: F.dropout(gelu_tanh(x), 0.3), layers=8), (X,), budget="70%")
    assert plan.peak <= 0.7 * plan.unplanned_peak


def test_other_random_ops_leave_the_stream_as_eager_does():
    def noisy(x: torch.Tensor) -> torch.Tensor:
        return gelu_tanh(x + 0.1 * torch.rand_like(x)) * torch.bernoulli(torch.full_like(x, 0.9))

    compare(lambda: Deep(noisy, layers=6), (X,), budget="70%")


class Normalised(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))
        self.norms = nn.ModuleList(norm(4) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x))) + x
        return x


def test_batch_norm_statistics_change_once():
    compare(lambda: Normalised(nn.BatchNorm2d), (X.reshape(4, 4, 4, 8),), budget="70%")


def test_instance_norm_statistics_change_once():
    """An image's running statistics are repeated for the batch: they are results, which a plan holds and counts."""
    norm = functools.partial(nn.InstanceNorm2d, affine=True, track_running_stats=True)
    compare(lambda: Normalised(norm), (X.reshape(4, 4, 4, 8),), budget="70%")
    for seed in range(3):
        with arbitrary_plans(seed):
            compare(lambda: Normalised(norm), (X.reshape(4, 4, 4, 8),), budget=None)


def test_views_alias_one_storage():
    def views(x: torch.Tensor) -> torch.Tensor:
        a, b = x.view(2, 16, 16).transpose(0, 1).chunk(2, dim=2)
        return torch.cat([a * 2, b.sigmoid()], dim=2).transpose(0, 1).reshape(32, 16)

    compare(lambda: Deep(views), (X,), budget="75%")


def test_inputs_mutated_in_place():
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Deep(gelu_tanh)
            self.register_buffer("seen", torch.zeros(16))
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            before = self.seen * 2
            self.seen.add_(x.mean(0))
            self.calls += 1
            return self.net(x + before) * self.seen.sigmoid()

    compare(Counter, (X,), budget="75%")


def test_checkpoint_regions_inside_the_model():
    compare(lambda: Deep(lambda x: checkpoint(gelu_tanh, x, use_reentrant=False)), (X,), budget="75%")


def test_checkpoint_with_dropout_inside_the_model():
    def block(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda y: F.dropout(gelu_tanh(y), 0.3), x, use_reentrant=False)

    compare(lambda: Deep(block), (X,), budget="75%")


def save_products(_, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpoint_with_dropout_inside_the_model():
    contexts = functools.partial(create_selective_checkpoint_contexts, save_products)

    def block(x: torch.Tensor) -> torch.Tensor:
        def region(y: torch.Tensor) -> torch.Tensor:
            return F.dropout(gelu_tanh((y @ y.T).softmax(-1) @ y), 0.3)

        return checkpoint(region, x, use_reentrant=False, context_fn=contexts)

    compare(lambda: Deep(block), (X,), budget="75%")


def test_graph_breaks():
    def broken(x: torch.Tensor) -> torch.Tensor:
        x = gelu_tanh(x)
        torch._dynamo.graph_break()
        return x.sin()

    compare(lambda: Deep(broken, layers=3), (X,), budget=10**6)


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            self.net = Deep(gelu_tanh)
            self.head = nn.Linear(16, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.head(self.net(self.embed(tokens))).flatten(0, 1), tokens.flatten())

    compare(Tied, (torch.arange(24).reshape(4, 6) % 11,), budget="70%")


def test_autocast():
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Deep(gelu_tanh)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x).float()

    compare(Cast, (X,), budget="75%", tolerance=2e-2)


def test_many_dtypes_and_odd_tensors():
    def odd(x: torch.Tensor) -> torch.Tensor:
        z = torch.complex(x, x.sin()).abs()
        mask = (x > 0) & (x.long() % 2 == 0)
        empty = x[:0].sum() + x.new_zeros(0, 4).sum()
        return torch.where(mask, z, x) + empty

    compare(lambda: Deep(odd), (X,), budget="80%")


EXPANDS = not torch.__version__.startswith("2.12")  # whose AOTAutograd cannot take the gradient of such an output


def test_non_contiguous_and_several_outputs():
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Deep(gelu_tanh)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = self.net(x)
            wide = (y * 2).expand(2, 32, 16)
            return y.t(), y[::2], x, y.argmax(1), wide if EXPANDS else wide.clone()

    compare(Many, (X,), budget="90%")


def test_custom_op():
    @torch.library.custom_op("memplan_tests::halve", mutates_args=())
    def halve(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    halve.register_fake(lambda x: torch.empty_like(x))
    halve.register_autograd(lambda ctx, grad: grad / 2)
    compare(lambda: Deep(lambda x: halve(gelu_tanh(x))), (X,), budget="75%")


def test_frozen_parameters_and_inputs_with_gradients():
    def frozen() -> nn.Module:
        net = Deep(gelu_tanh)
        for p in net.maps[0].parameters():
            p.requires_grad_(False)
        return net

    compare(frozen, (X.clone().requires_grad_(),), budget="75%")

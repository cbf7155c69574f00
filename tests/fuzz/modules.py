"""What a random model is made of, part three: modules with parameters and buffers, of the same form as the functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tests.fuzz.functions import Tensor, earlier

Module = Callable[[int, int], nn.Module]  # (width, k) → module with forward(x, past)
MODULES: dict[str, Module] = {}


def module(make: type[nn.Module]) -> type[nn.Module]:
    MODULES[make.__name__] = make
    return make


class On(nn.Module):
    """A module of torch's on x, transposed to (batch, width, length) where it wants channels first."""

    def __init__(self, inner: nn.Module, channels_first: bool = False) -> None:
        super().__init__()
        self.inner, self.channels_first = inner, channels_first

    def forward(self, x: Tensor, past: Sequence[Tensor]) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2) if self.channels_first else self.inner(x)


class Pair(nn.Module):
    """A module of torch's on the rows of two values."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, past: Sequence[Tensor]) -> Tensor:
        return self.inner(x.flatten(0, 1), earlier(past, 1).flatten(0, 1)).view(x.shape)


MODULES |= {
    "linear": lambda width, k: On(nn.Linear(width, width, bias=k != 3)),
    "feed_forward": lambda width, k: On(
        nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1 * k), nn.Linear(2 * width, width))
    ),
    "layer_norm": lambda width, k: On(nn.LayerNorm(width, elementwise_affine=k != 3)),
    "rms_norm": lambda width, k: On(nn.RMSNorm(width)),
    "group_norm": lambda width, k: On(nn.GroupNorm(2, width), channels_first=True),
    "instance_norm": lambda width, k: On(nn.InstanceNorm1d(width, affine=k % 2 == 0), channels_first=True),
    "batch_norm": lambda width, k: On(
        nn.BatchNorm1d(width, momentum=None if k == 1 else 0.1, track_running_stats=k != 2), channels_first=True
    ),
    "batch_norm_frozen": lambda width, k: On(nn.BatchNorm1d(width).eval(), channels_first=True),
    "conv": lambda width, k: On(nn.Conv1d(width, width, 3, padding=1, groups=(1, 2, width, 1)[k]), channels_first=True),
    "conv_transpose": lambda width, k: On(nn.ConvTranspose1d(width, width, 3, padding=1), channels_first=True),
    "prelu": lambda width, k: On(nn.PReLU(), channels_first=False),
    "encoder_layer": lambda width, k: On(
        nn.TransformerEncoderLayer(width, 2, 2 * width, 0.1 * (k % 2), batch_first=True, norm_first=k > 1)
    ),
    "bilinear": lambda width, k: Pair(nn.Bilinear(width, width, width)),
    "cell": lambda width, k: Pair((nn.GRUCell if k % 2 else nn.RNNCell)(width, width)),
    "spectral_norm": lambda width, k: On(nn.utils.parametrizations.spectral_norm(nn.Linear(width, width))),
    "weight_norm": lambda width, k: On(nn.utils.parametrizations.weight_norm(nn.Linear(width, width))),
}


@module
class Conv2d(nn.Module):
    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.last = k > 1

    def forward(self, x: Tensor, past: Sequence[Tensor]) -> Tensor:
        image = x.unsqueeze(1)
        if self.last:
            image = image.contiguous(memory_format=torch.channels_last)
        return F.relu(self.norm(self.conv(image))).mean(1)


@module
class Attention(nn.Module):
    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1 * k, batch_first=True)
        self.k = k

    def forward(self, x: Tensor, past: Sequence[Tensor]) -> Tensor:
        y, weights = self.attention(x, earlier(past, self.k), x, need_weights=self.k % 2 == 0)
        return y if weights is None else y + weights.mean()


@module
class Embedding(nn.Module):
    """Looked up by what the values are rounded to; an EmbeddingBag for odd k."""

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(7, width, mode="sum") if k % 2 else nn.Embedding(7, width, padding_idx=k or None)

    def forward(self, x: Tensor, past: Sequence[Tensor]) -> Tensor:
        tokens = (x.detach()[..., 0] * 5).long().remainder(7)
        found = self.table(tokens)
        return x + (found.unsqueeze(1) if isinstance(self.table, nn.EmbeddingBag) else found)


@module
class Tied(nn.Module):
    """One weight, used twice, as it is and transposed."""

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.same = nn.Linear(width, width, bias=False)
        self.same.weight = self.weight

    def forward(self, x: Tensor, past: Sequence[Tensor]) -> Tensor:
        return F.linear(self.same(x).tanh(), self.weight.t())


@module
class Repeated(nn.Module):
    """One block, run several times: its weights' gradients add up, and its dropout draws anew each time."""

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.1 * (k % 2)))
        self.times = 2 + k // 2

    def forward(self, x: Tensor, past: Sequence[Tensor]) -> Tensor:
        for _ in range(self.times):
            x = x + self.block(x)
        return x


@module
class Counter(nn.Module):
    """Buffers that change in place while values computed from them, before and after, are still to be read."""

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.k = k

    def forward(self, x: Tensor, past: Sequence[Tensor]) -> Tensor:
        before = self.mean * 2
        if self.k % 2:
            self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        else:
            self.mean.copy_(x.detach().mean((0, 1)))
        self.calls += 1
        y = x * (self.mean + 1).sigmoid() + before
        if self.k > 1:
            self.mean[0] = 0.5
        return y / self.calls.clamp(max=2)


@module
class Unused(nn.Module):
    """A parameter that nothing reads, one that is frozen, one of which a part is read."""

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)
        self.part = nn.Parameter(torch.ones(3, width))

    def forward(self, x: Tensor, past: Sequence[Tensor]) -> Tensor:
        return x * self.frozen + self.part[1]


@module
class Moving(nn.Module):
    """Updates a parameter under no_grad while it runs, as spectral norms and target networks do."""

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.target = nn.Parameter(torch.eye(width), requires_grad=False)
        self.live = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, past: Sequence[Tensor]) -> Tensor:
        y = x.detach() @ self.target
        with torch.no_grad():
            self.target.lerp_(self.live.weight, 0.1)
        return self.live(y) + x @ self.target


@module
class Experts(nn.Module):
    """Tokens go to one of two linear maps each: as one sum, or as batched products from the left or the right."""

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.router, self.experts = nn.Linear(width, 2), nn.Parameter(torch.randn(2, width, width) / width**0.5)

    def forward(self, x: Tensor, past: Sequence[Tensor]) -> Tensor:
        weight, which = self.router(x).softmax(-1).max(-1)
        if self.k % 2 == 0:
            return torch.einsum("bnd,bnde->bne", x, self.experts[which]) * weight.unsqueeze(-1)
        rows, mine = x.reshape(-1, x.shape[-1]), self.experts[which.reshape(-1)]
        y = (
            torch.bmm(rows.unsqueeze(1), mine).squeeze(1)
            if self.k == 1
            else torch.bmm(mine, rows.unsqueeze(2)).squeeze(2)
        )
        return y.view_as(x) * weight.unsqueeze(-1)

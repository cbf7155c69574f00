"""What a random model is made of, part one: functions of ``x`` (batch, length, width), earlier values and a number ``k``.

Each returns a tensor of x's shape and about its scale. ``k`` in 0..3 chooses an axis, an earlier value or a variant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Tensor = torch.Tensor
Function = Callable[[Tensor, Sequence[Tensor], int], Tensor]
FUNCTIONS: dict[str, Function] = {}


def function(f: Function) -> Function:
    FUNCTIONS[f.__name__] = f
    return f


def earlier(past: Sequence[Tensor], k: int) -> Tensor:
    return past[-1 - k % len(past)]


@function
def activation(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    return (F.gelu, F.silu, torch.tanh, F.softplus)[k](x) * 1.5


@function
def residual(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    return 0.5 * (x + earlier(past, k))


@function
def gate(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    return x * earlier(past, k).sigmoid()


@function
def residual_in_place(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = x.mul(0.5)
    y += earlier(past, k)
    y.tanh_()
    return y


@function
def relu_in_place(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    return F.relu(x + 0.3, inplace=True)


@function
def in_place_on_a_view(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = x.clone()
    (y[:, ::2], y[..., 0], y.transpose(0, 2), y.view(-1)[:3])[k].mul_(0.5).add_(0.1)
    return y


@function
def fill_a_new_tensor(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = torch.zeros_like(x)
    y[..., : x.shape[-1] // 2] = x[..., x.shape[-1] // 2 :].sin()
    y[:, k % x.shape[1]].copy_(x[:, 0])
    return y + 0.1 * x


@function
def reshapes(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    b, n, d = x.shape
    y = x.view(b, n, 2, d // 2).transpose(1, 2)
    y = (y.contiguous().sin(), y.reshape(b * 2, n, d // 2).cos().view_as(y), y.permute(0, 1, 3, 2).mT, y * 0.7)[k]
    return y.transpose(1, 2).reshape(b, n, d)


@function
def halves(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    a, b = x.chunk(2, dim=-1) if k % 2 else x.split(x.shape[-1] // 2, dim=-1)
    return torch.cat([b, a.sin()], dim=-1) if k < 2 else torch.cat([a * b, b], dim=-1)


@function
def rows(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    parts = x.unbind(1)
    return torch.stack([p * (1 + 0.1 * j) for j, p in enumerate(parts[k % 2 :] + parts[: k % 2])], dim=1)


@function
def slices(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = x[:, 1:] - x[:, :-1]
    return F.pad(y, (0, 0, k % 2, 1 - k % 2)) * 0.7


@function
def reflected(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    return F.pad(x, (1, 2), mode=("reflect", "replicate", "circular", "constant")[k])[..., 1:-2] * 0.9


@function
def expanded(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    wide = x.mean(k % 3, keepdim=True).expand_as(x)
    return 0.5 * (x + wide) if k < 2 else x - wide


@function
def where(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    other = earlier(past, k)
    return torch.where((x > 0) ^ (other > 0.5), x, other * 0.5)


@function
def masked(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    mask = torch.ones(x.shape[1:], dtype=torch.bool, device=x.device).triu(k - 1)
    return x.masked_fill(mask, 0.25) if k % 2 else x.clone().masked_fill_(mask, 0.25)


@function
def indexed(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    at = (torch.arange(x.shape[1]) * 3 + k) % x.shape[1]
    rows = x.detach().argsort(1)
    return (x[:, at], x.index_select(1, at), x.gather(1, rows), x.take_along_dim(rows, 1))[k]


@function
def index_put(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    at = (torch.arange(x.shape[1]) * 2) % x.shape[1]
    y = x * 0.5
    values = earlier(past, k) * 0.25
    if k % 2:
        y.index_put_((torch.zeros_like(at), at), values[0], accumulate=True)
    else:
        y = y.index_add(1, at, values)
    return y


@function
def scattered(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    at = x.detach().argsort(-1)
    if k % 2:
        return torch.zeros_like(x).scatter_add(-1, at, x.cos())
    return x.scatter(-1, at[..., :1], 0.3)


@function
def dropout(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = x * 1.1
    return (
        F.dropout(y, 0.3),
        F.dropout(y, 0.5, inplace=True),
        F.dropout1d(y, 0.4),
        F.alpha_dropout(y, 0.2),
    )[k]


@function
def noise(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    return (
        x + 0.1 * torch.rand_like(x),
        x * torch.bernoulli(torch.full_like(x, 0.9)),
        x + torch.randn(x.shape[-1]) * 0.1,
        x[:, torch.randperm(x.shape[1])] + 0.01 * torch.empty_like(x).uniform_(),
    )[k]


@function
def sampled(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    chances = x.detach().flatten(1).softmax(-1)
    at = torch.multinomial(chances, x[0].numel(), replacement=True)
    return x + 0.1 * x.flatten(1).gather(1, at).view_as(x)


@function
def softmaxes(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    return (x.softmax(-1) * 3, x.log_softmax(1) * 0.3, x - x.logsumexp(-1, keepdim=True), F.glu(torch.cat([x, x], -1)))[
        k
    ]


@function
def autocast(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=k < 3):
        y = x @ earlier(past, k).mT @ x
        return (F.layer_norm(y.float(), y.shape[-1:])).to(x.dtype)


@function
def casts(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    return x.to((torch.float64, torch.bfloat16, torch.float16, torch.float64)[k]).sin().to(x.dtype)


@function
def checkpointed(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    def region(y: Tensor) -> Tensor:
        y = F.gelu(y).sin()
        return F.dropout(y, 0.3).tanh() if k % 2 else y.exp().sigmoid()

    if k < 2:
        return checkpoint(region, x, use_reentrant=False)
    return checkpoint(lambda y: checkpoint(region, y * 2, use_reentrant=False).cos(), x, use_reentrant=False)


def _save_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    matmul = op == torch.ops.aten.bmm.default
    return CheckpointPolicy.MUST_SAVE if matmul else CheckpointPolicy.PREFER_RECOMPUTE


@function
def selective_checkpoint(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    def region(y: Tensor) -> Tensor:
        y = (y @ y.mT).softmax(-1) @ y
        return F.dropout(y.sin(), 0.2) if k % 2 else y.sin()

    contexts = functools.partial(create_selective_checkpoint_contexts, _save_products)
    return checkpoint(region, x, use_reentrant=False, context_fn=contexts)


@function
def without_gradient(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    with torch.no_grad():
        scale = x.square().mean(-1, keepdim=True).sqrt() + 0.5
        if k % 2:
            scale.mul_(1.5)
    return x / scale


@function
def detached(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = x.detach() if k % 2 else earlier(past, k).detach()
    return (x + (y.round() - y) * 0.5) if k < 2 else x * y.sigmoid()


@function
def graph_break(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    torch._dynamo.graph_break()
    return x.sin() if k else x


@function
def data_dependent(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    chosen = x[x > 0.1 * k]
    return x + chosen.sum() / x.numel()


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.clamp(-limit, limit)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() < ctx.limit, gradient, 0.1 * gradient), None


@function
def hooked(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 0.5)
    return y * x if k % 2 else y


@function
def own_function(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    return _Clamp.apply(x, 0.5 + k)


@function
def integers(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    counts = (x.detach() * 4).long() % 5
    hot = F.one_hot(counts[..., 0] % x.shape[-1], x.shape[-1])
    odd = (counts & 1).bool() | (counts > 3)
    return x * odd + hot.to(x.dtype) * (counts.sum() % 3)


@function
def attention(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    b, n, d = x.shape
    q, key, v = (t.view(b, n, 2, d // 2).transpose(1, 2) for t in (x, earlier(past, k), x * 0.5))
    mask = torch.ones(n, n, dtype=torch.bool).tril() if k == 2 else None
    y = F.scaled_dot_product_attention(q, key, v, mask, dropout_p=0.2 if k == 3 else 0.0, is_causal=k == 1)
    return y.transpose(1, 2).reshape(b, n, d)


@function
def moved(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    return (x.flip(1), x.roll(1, -1), x.rot90(2, (1, 2)), x.unfold(1, 1, 1).squeeze(-1))[k] * 0.9


@function
def zero_sized(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    empty = x[:0] if k % 2 else x.new_zeros(0, *x.shape[1:])
    return torch.cat([empty, x.sin()]) + empty.sum()


@function
def resampled(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    mode = ("nearest", "linear", "nearest-exact", "area")[k]
    corners = {"align_corners": True} if mode == "linear" else {}
    return F.interpolate(F.interpolate(x, scale_factor=2, mode=mode, **corners), size=x.shape[-1], mode=mode, **corners)


@function
def pooled(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    pool = (
        lambda t: F.max_pool1d(t, 2),
        lambda t: F.avg_pool1d(t, 2),
        lambda t: F.adaptive_avg_pool1d(t, t.shape[-1] // 2),
        lambda t: F.adaptive_max_pool1d(t, t.shape[-1] // 2),
    )[k]
    return pool(x).repeat_interleave(2, dim=-1)


@function
def mapped(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    if k == 3:
        return torch.func.grad(lambda y: y.tanh().sum())(x)
    return torch.func.vmap(lambda row: row * row.softmax(-1), in_dims=1, out_dims=1)(x) * 2


@torch.library.custom_op("memplan_fuzz::scale", mutates_args=())
def scale(x: Tensor, by: float) -> Tensor:
    return x * by


scale.register_fake(lambda x, by: torch.empty_like(x))
scale.register_autograd(
    lambda ctx, gradient: (gradient * ctx.by, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "by", inputs[1]),
)


@torch.library.custom_op("memplan_fuzz::shift_", mutates_args=("x",))
def shift_(x: Tensor, by: float) -> None:
    x.add_(by)


@function
def custom_op(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    if k % 2:
        with torch.no_grad():
            offset = x.detach().clone()
            shift_(offset, 0.5)
        return x + 0.1 * offset
    return scale(x, 0.7 + 0.1 * k)

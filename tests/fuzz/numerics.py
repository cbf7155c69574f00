"""What a random model is made of, part two: arithmetic, reductions and linear algebra, of the form of part one's functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tests.fuzz.functions import Tensor, earlier, function


@function
def cumulated(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = x.tanh()
    return (y.cumsum(1) * 0.5, (1 + 0.1 * y).cumprod(1), y.cummax(1).values, y.logcumsumexp(-1) * 0.3)[k]


@function
def ordered(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    if k == 0:
        return x.sort(1).values
    if k == 1:
        values, at = x.topk(x.shape[-1] // 2, dim=-1)
        return torch.zeros_like(x).scatter(-1, at, values)
    if k == 2:
        return x - x.max(1, keepdim=True).values + x.median(-1, keepdim=True).values
    return x - x.amin(-1, keepdim=True) * 0.5


@function
def products(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = earlier(past, k)
    n = x.shape[1] * x.shape[2]
    if k == 0:
        return torch.einsum("bnd,bmd->bnm", x, y).softmax(-1) @ x
    if k == 1:
        return torch.bmm(x, torch.bmm(x.mT, y)) / n
    if k == 2:
        return torch.einsum("bnd,bne->bnd", x, y) / x.shape[2]
    return torch.baddbmm(x, x @ y.mT, x, beta=0.5, alpha=1 / n)


@function
def complex_numbers(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    if k == 0:
        return torch.complex(x, x.sin()).abs()
    if k == 1:
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * z.conj() + 1j * z).flatten(2)
    if k == 2:
        return torch.fft.irfft(torch.fft.rfft(x, dim=1), n=x.shape[1], dim=1) * 0.8
    return torch.polar(x.tanh(), x).real


@function
def statistics(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    if k == 0:
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1)
    if k == 1:
        return F.normalize(x, dim=-1)
    if k == 2:
        return x / (1 + torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True))
    variance, mean = torch.var_mean(x, dim=1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1)


@function
def triangles(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    return x.triu(k - 1) + 0.1 * x.tril() if k % 2 else x * torch.outer(x[0, :, 0], x[0, 0]).sigmoid()


@function
def bounded(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    return (x.clamp(-1, 1), x.abs().sqrt(), torch.maximum(x, earlier(past, k)), F.hardtanh(x, inplace=False))[k] * 0.9


@function
def losses(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = earlier(past, k).detach()
    if k == 0:
        return x * F.mse_loss(x, y).sigmoid()
    if k == 1:
        return x * F.cross_entropy(x.flatten(0, 1), y.argmax(-1).flatten(), label_smoothing=0.1).tanh()
    if k == 2:
        return x + F.smooth_l1_loss(x, y, reduction="none")
    return x * F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="batchmean").tanh()


@function
def elementwise(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = earlier(past, k)
    return (
        torch.addcmul(x, y, y.tanh(), value=0.1) * 0.9,
        torch.lerp(x, y, x.sigmoid()),
        torch.addcdiv(x, y, 2 + x.square(), value=0.5) * 0.9,
        torch.nan_to_num(torch.xlogy(x.abs(), y.abs())) * 0.3,
    )[k]


@function
def divided(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = earlier(past, k).detach().abs() + 0.5
    return (x - 0.1 * torch.div(x, y, rounding_mode="floor"), x.remainder(2.0), x / y.clamp(min=1), torch.atan2(x, y))[
        k
    ]


@function
def written_slices(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = earlier(past, k) * 0.5
    return (
        lambda: torch.slice_scatter(x, y[:, ::2], dim=1, step=2),
        lambda: torch.select_scatter(x, y[:, 0], 1, -1),
        lambda: torch.diagonal_scatter(x, torch.diagonal(y, 0, 1, 2), 0, 1, 2),
        lambda: x.index_copy(1, torch.arange(x.shape[1]).flip(0), y),
    )[k]()


@function
def diagonals(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    if k == 0:
        return x + 0.1 * x.diagonal(0, 1, 2).sum(-1)[:, None, None]
    if k == 1:
        return torch.diag_embed(x).sum(-2) * 0.9
    if k == 2:
        y = x.clone()
        y.diagonal(0, 1, 2).mul_(0.5)
        return y
    return x.contiguous().as_strided(x.shape, (x.shape[1] * x.shape[2], 1, x.shape[1])) * 0.9


@function
def reduced_by_index(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    at = (torch.arange(x.shape[1]) // 2).view(1, -1, 1).expand(x.shape)
    if k < 2:
        return torch.zeros_like(x).scatter_reduce(1, at, x, ("mean", "amax")[k], include_self=False)
    edges = torch.linspace(-1, 1, x.shape[2])
    found = torch.bucketize(x.detach(), edges).clamp(max=x.shape[2] - 1)
    return x + 0.1 * (edges[found] if k == 2 else x.gather(-1, found))


@function
def truths(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    positive = x > 0
    rows = positive.any(-1, keepdim=True) & ~positive.all(-1, keepdim=True)
    count = positive.sum(1, keepdim=True)
    return (x * rows, torch.where(rows, x, -0.5 * x), x / (1 + count), x.masked_fill(count % 2 == 0, 0.5))[k]


@function
def solved(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    gram = x.tanh() @ x.tanh().mT / x.shape[2] + torch.eye(x.shape[1])
    if k == 0:
        return torch.linalg.solve(gram, x)
    if k == 1:
        return torch.linalg.inv(gram) @ x
    if k == 2:
        return torch.linalg.cholesky(gram).mT @ x * 0.5
    return x * torch.linalg.slogdet(gram).logabsdet[:, None, None].sigmoid()


@function
def distances(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = earlier(past, k) + 0.1
    if k == 0:
        return x + 0.1 * torch.cdist(x, y.flip(1) + 0.5).mean(-1, keepdim=True)
    if k == 1:
        return x * F.cosine_similarity(x, y, dim=-1).unsqueeze(-1)
    if k == 2:
        return torch.tensordot(x, y.mean(0), dims=([2], [1])).softmax(-1) @ y * 0.9
    return x + 0.1 * torch.kron(x[0, :, :1], y[0, :1]).tanh()


@function
def several_at_once(x: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    y = earlier(past, k)
    if k < 2:
        a, b = torch._foreach_mul([x, y], 0.5)
        return a + b.tanh() if k else a.sin()  # for k = 0 one of the results is not read
    least, most = torch.aminmax(x, dim=-1, keepdim=True)
    return (x - least) / (1 + most - least) if k == 2 else x + 0.1 * torch.frexp(y).exponent.to(x.dtype)

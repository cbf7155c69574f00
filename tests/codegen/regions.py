"""Regions as models make them: what the codegen tests and the GPU benchmark run. Small enough for Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from memplan import torch_compat
from memplan.codegen.region import Region

aten = torch.ops.aten
f16, bf16, f32, f64, i64, b1 = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool


@dataclass(frozen=True)
class Arg:
    """One input. ``stride`` None: row-major. ``high``: whole numbers below it. ``positive``: values above 0.1."""

    shape: tuple[int, ...]
    dtype: torch.dtype = f32
    stride: tuple[int, ...] | None = None
    high: int = 0
    positive: bool = False

    def empty(self, device: str = "cpu") -> torch.Tensor:
        if self.stride is None:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        if self.high:
            value = torch.randint(self.high, self.shape, generator=generator, dtype=i64)
        else:
            value = torch.randn(self.shape, generator=generator, dtype=f64)
        if self.positive:
            value = value.abs() + 0.1
        value = (value > 0) if self.dtype == b1 else value.to(self.dtype)
        return self.empty().copy_(value)


Case = tuple[Callable[..., object], tuple[Arg, ...]]


def build(case: Case, device: str = "cpu") -> tuple[Region, list[torch.Tensor]]:
    """The region and inputs for it; the values are the same on every device."""
    function, arguments = case
    generator = torch.Generator().manual_seed(0)
    inputs = [a.empty(device).copy_(a.draw(generator)) for a in arguments]
    return region_of(function, arguments, device), inputs


def region_of(function: Callable[..., object], arguments: tuple[Arg, ...], device: str = "cpu") -> Region:
    with torch_compat.FakeTensorMode():
        fake = [a.empty(device) for a in arguments]

    def flat(*values: torch.Tensor) -> tuple[object, ...]:
        result = function(*values)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    return Region.from_graph_module(torch_compat.trace_fake(flat, fake))


def _a(*shape: int, dtype: torch.dtype = f32, **more: object) -> Arg:
    return Arg(shape, dtype, **more)  # type: ignore[arg-type]


def _layer_norm(x, w, b):
    return aten.native_layer_norm(x, [x.shape[-1]], w, b, 1e-5)


def _layer_norm_backward(g, x, mean, rstd, w, b):
    return aten.native_layer_norm_backward(g, x, [x.shape[-1]], mean, rstd, w, b, [True, True, True])


def _rms_norm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def _rms_norm_low(x, w):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def _rms_norm_backward(g, x, w):
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    hat = x * rstd
    inner = (g * w * hat).mean(-1, keepdim=True)
    return rstd * (g * w - hat * inner), (g * hat).sum(0)


def _batch_norm(x, w, b, mean, var):
    return aten._native_batch_norm_legit_functional(x, w, b, mean, var, True, 0.1, 1e-5)


def _batch_norm_relu(x, w, b, mean, var):
    out, save_mean, save_rstd, new_mean, new_var = _batch_norm(x, w, b, mean, var)
    return torch.relu(out), save_mean, save_rstd, new_mean, new_var


def _batch_norm_backward(g, x, w, mean, rstd):
    return aten.native_batch_norm_backward(g, x, w, None, None, mean, rstd, True, 1e-5, [True, True, True])


def _group_norm(x, w, b):
    n, c, s = x.shape
    return aten.native_group_norm(x, w, b, n, c, s, 4, 1e-5)


def _cross_entropy(x, y):
    return aten.nll_loss_forward(aten._log_softmax(x, 1, False), y, None, 1, -100)


def _cross_entropy_kept(x, y):
    logs = aten._log_softmax(x, 1, False)
    return (*aten.nll_loss_forward(logs, y, None, 1, -100), logs)


def _cross_entropy_backward(g, logs, y, total):
    inner = aten.nll_loss_backward(g, logs, y, None, 1, -100, total)
    return aten._log_softmax_backward_data(inner, logs, 1, logs.dtype)


def _rotary(q, cos, sin):
    q = q.view(2, 24, 4, 16).transpose(1, 2)
    half = torch.cat([-q[..., 8:], q[..., :8]], -1)
    return q * cos + half * sin


def _rotary_backward(g, cos, sin):
    turned = g * sin
    half = torch.cat([turned[..., 8:], -turned[..., :8]], -1)
    return (g * cos + half).transpose(1, 2).reshape(2, 24, 64)


def _masked_softmax(x, mask):
    return torch.softmax(x.masked_fill(mask, float("-inf")), -1)


def _causal_softmax(x):
    n = x.shape[-1]
    at = torch.arange(n, device=x.device)
    keep = at.unsqueeze(1) >= at.unsqueeze(0)
    return torch.softmax(torch.where(keep, x * 0.125, float("-inf")), -1)


def _dropout_residual_norm(x, residual, mask, w, b):
    total = residual + x * mask * (1 / 0.9)
    return (total, *_layer_norm(total, w, b))


def _gelu_backward_bias(g, x):
    inner = aten.gelu_backward(g, x)
    return inner, inner.sum(0)


def _swiglu(x):
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


def _adam(p, g, m, v):
    m = m * 0.9 + g * 0.1
    v = v * 0.999 + g * g * 0.001
    return p - 1e-3 * (m / (1 - 0.9**3)) / ((v / (1 - 0.999**3)).sqrt() + 1e-8), m, v


def _modulate(x, shift, scale):
    out, mean, rstd = aten.native_layer_norm(x, [x.shape[-1]], None, None, 1e-6)
    return out * (1 + scale[:, None]) + shift[:, None], mean, rstd


ZOO: dict[str, Case] = {
    # pointwise
    "add": (lambda x, y: x + y, (_a(100, 70), _a(100, 70))),
    "add_alpha": (lambda x, y: torch.add(x, y, alpha=0.5), (_a(777), _a(777))),
    "scale_shift_bf16": (lambda x, w, b: x * w + b, (_a(48, 96, dtype=bf16), _a(96, dtype=bf16), _a(96, dtype=bf16))),
    "bias_gelu": (lambda x, b: F.gelu(x + b), (_a(64, 130), _a(130))),
    "bias_gelu_bf16": (lambda x, b: F.gelu(x + b), (_a(64, 130, dtype=bf16), _a(130, dtype=bf16))),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), (_a(64, 100),)),
    "gelu_tanh_f16": (lambda x: F.gelu(x, approximate="tanh"), (_a(64, 100, dtype=f16),)),
    "gelu_backward": (lambda g, x: aten.gelu_backward(g, x), (_a(64, 100), _a(64, 100))),
    "gelu_tanh_backward": (
        lambda g, x: aten.gelu_backward(g, x, approximate="tanh"), (_a(64, 100, dtype=f16), _a(64, 100, dtype=f16))),
    "silu": (lambda x: F.silu(x), (_a(64, 100),)),
    "silu_backward": (lambda g, x: aten.silu_backward(g, x), (_a(64, 100), _a(64, 100))),
    "swiglu": (_swiglu, (_a(40, 128),)),
    "swiglu_bf16": (_swiglu, (_a(40, 128, dtype=bf16),)),
    "relu_backward": (lambda g, x: aten.threshold_backward(g, x, 0), (_a(64, 99), _a(64, 99))),
    "relu_residual": (lambda x, y: torch.relu(x + y), (_a(4, 8, 9, 11), _a(4, 8, 9, 11))),
    "tanh_backward": (lambda g, y: aten.tanh_backward(g, y), (_a(1000), _a(1000))),
    "sigmoid_gate": (lambda x, y: torch.sigmoid(x) * y, (_a(33, 65), _a(33, 65))),
    "softplus": (lambda x: F.softplus(x), (_a(1001),)),
    "elu_leaky": (lambda x, y: F.elu(x) + F.leaky_relu(y, 0.1), (_a(500), _a(500))),
    "hardswish": (lambda x: F.hardswish(x), (_a(500),)),
    "clamp": (lambda x: x.clamp(-0.5, 0.75), (_a(500),)),
    "power_mix": (lambda x: x.pow(2) + x.pow(3) - x.sqrt() + x.pow(-0.5) + x.pow(1.7), (_a(500, positive=True),)),
    "logs": (lambda x: x.log() + x.log1p() + x.log2() + x.expm1(), (_a(500, positive=True),)),
    "trigonometry": (lambda x: x.sin() * x.cos() + torch.erf(x), (_a(500),)),
    "compare_where": (lambda x, y: torch.where(x > y, x, y * 2), (_a(60, 50), _a(60, 50))),
    "logical": (lambda x, y: (x > 0) & ~(y > 0), (_a(500), _a(500))),
    "dropout_apply": (lambda x, m: x * m * (1 / 0.9), (_a(64, 64), _a(64, 64, dtype=b1))),
    "promote_half_float": (lambda x, y: x + y, (_a(64, 64, dtype=f16), _a(64, 64))),
    "promote_int_float": (lambda x, y: x * y, (_a(500, dtype=i64, high=9), _a(500))),
    "double": (lambda x, y: torch.exp(x) * y + 0.1, (_a(300, dtype=f64), _a(300, dtype=f64))),
    "cast_round_trip": (lambda x: x.to(bf16).float() - x, (_a(500),)),
    "multi_output": (lambda x, y: (x + y, x - y, x * y), (_a(50, 40), _a(50, 40))),
    "adam": (_adam, (_a(900), _a(900), _a(900), _a(900, positive=True))),
    "sgd_momentum": (lambda p, g, m: (p - 0.1 * (0.9 * m + g), 0.9 * m + g), (_a(900), _a(900), _a(900))),
    "division": (lambda x, y: x / y + x / 3.0, (_a(500), _a(500, positive=True))),
    "scalar_tensor_scale": (lambda x, s: x * s, (_a(64, 65), _a())),
    "maximum_minimum": (lambda x, y: torch.maximum(x, y) - torch.minimum(x, y), (_a(500), _a(500))),
    # layout
    "transpose_copy": (lambda x: x.t().contiguous(), (_a(70, 90),)),
    "transposed_input": (lambda x, y: x + y, (_a(64, 96, stride=(1, 64)), _a(64, 96))),
    "channels_last_relu": (lambda x: torch.relu(x) * 2, (_a(2, 8, 6, 7, stride=(336, 1, 56, 8)),)),
    "split_heads": (lambda x: x.view(2, 24, 4, 16).transpose(1, 2).clone(memory_format=torch.contiguous_format), (_a(2, 24, 64),)),
    "merge_heads_bias": (lambda x, b: x.transpose(1, 2).reshape(2, 24, 64) + b, (_a(2, 4, 24, 16), _a(64))),
    "rotary": (_rotary, (_a(2, 24, 64), _a(24, 16), _a(24, 16))),
    "rotary_bf16": (_rotary, (_a(2, 24, 64, dtype=bf16), _a(24, 16, dtype=bf16), _a(24, 16, dtype=bf16))),
    "rotary_backward": (_rotary_backward, (_a(2, 4, 24, 16), _a(24, 16), _a(24, 16))),
    "cat_gradients": (lambda a, b, c: torch.cat([a, b, c], -1), (_a(30, 20), _a(30, 20), _a(30, 20))),
    "cat_uneven": (lambda a, b: torch.cat([a, b.relu()], 1), (_a(30, 20), _a(30, 13))),
    "pad": (lambda x: F.pad(x * 2, (1, 2, 3, 0)), (_a(20, 30),)),
    "slice_backward": (lambda g: aten.slice_backward(g, [20, 40], 1, 8, 24, 1) + 1, (_a(20, 16),)),
    "expand_add": (lambda x, y: x[:, None, :] + y[None, :, :], (_a(12, 33), _a(17, 33))),
    "strided_slice": (lambda x: x[:, ::2] * x[:, 1::2], (_a(40, 64),)),
    # rows
    "softmax": (lambda x: torch.softmax(x, -1), (_a(40, 129),)),
    "softmax_bf16": (lambda x: torch.softmax(x, -1), (_a(40, 129, dtype=bf16),)),
    "softmax_masked": (_masked_softmax, (_a(2, 3, 16, 33), _a(2, 1, 16, 33, dtype=b1))),
    "softmax_causal": (_causal_softmax, (_a(2, 3, 32, 32),)),
    "softmax_middle": (lambda x: torch.softmax(x, 1), (_a(6, 40, 15),)),
    "softmax_backward": (lambda g, y: aten._softmax_backward_data(g, y, -1, f32), (_a(40, 129), _a(40, 129))),
    "softmax_long": (lambda x: torch.softmax(x, -1), (_a(2, 20001),)),
    "log_softmax": (lambda x: torch.log_softmax(x, -1), (_a(40, 130),)),
    "layer_norm": (_layer_norm, (_a(50, 96), _a(96), _a(96))),
    "layer_norm_bf16": (_layer_norm, (_a(50, 96, dtype=bf16), _a(96, dtype=bf16), _a(96, dtype=bf16))),
    "layer_norm_long": (_layer_norm, (_a(2, 17000), _a(17000), _a(17000))),
    "layer_norm_modulate": (_modulate, (_a(3, 20, 96), _a(3, 96), _a(3, 96))),
    "layer_norm_dropout_residual": (
        _dropout_residual_norm, (_a(50, 96), _a(50, 96), _a(50, 96, dtype=b1), _a(96), _a(96))),
    "layer_norm_gelu": (lambda x, w, b: F.gelu(_layer_norm(x, w, b)[0]), (_a(50, 96), _a(96), _a(96))),
    "rms_norm": (_rms_norm, (_a(50, 100), _a(100))),
    "rms_norm_bf16": (_rms_norm_low, (_a(50, 100, dtype=bf16), _a(100, dtype=bf16))),
    "group_norm": (_group_norm, (_a(4, 16, 25), _a(16), _a(16))),
    "row_sum_scale": (lambda x: x / x.sum(-1, keepdim=True), (_a(50, 77, positive=True),)),
    "row_max_min": (lambda x: (x.amax(-1), x.amin(-1)), (_a(50, 77),)),
    "row_any": (lambda x: (x > 2).any(-1), (_a(50, 77),)),
    "variance": (lambda x: (x.var(-1), x.mean(-1)), (_a(50, 77),)),
    "cross_entropy": (_cross_entropy, (_a(40, 200), _a(40, dtype=i64, high=200))),
    "cross_entropy_kept": (_cross_entropy_kept, (_a(40, 200), _a(40, dtype=i64, high=200))),
    "cross_entropy_backward": (
        _cross_entropy_backward, (_a(), _a(40, 200), _a(40, dtype=i64, high=200), _a(positive=True))),
    "l2_normalise": (lambda x: x / torch.linalg.vector_norm(x, 2, -1, keepdim=True), (_a(50, 77),)),
    # columns, and both
    "bias_gradient": (lambda g: g.sum(0), (_a(300, 70),)),
    "bias_gradient_bf16": (lambda g: g.sum(0), (_a(300, 70, dtype=bf16),)),
    "bias_gradient_4d": (lambda g: g.sum((0, 2, 3)), (_a(4, 12, 9, 9),)),
    "gelu_backward_bias": (_gelu_backward_bias, (_a(150, 66), _a(150, 66))),
    "layer_norm_backward": (
        _layer_norm_backward, (_a(150, 96), _a(150, 96), _a(150, 1), _a(150, 1, positive=True), _a(96), _a(96))),
    "rms_norm_backward": (_rms_norm_backward, (_a(150, 96), _a(150, 96), _a(96))),
    "batch_norm": (_batch_norm, (_a(4, 8, 9, 9), _a(8), _a(8), _a(8), _a(8, positive=True))),
    "batch_norm_relu": (_batch_norm_relu, (_a(4, 8, 9, 9), _a(8), _a(8), _a(8), _a(8, positive=True))),
    "batch_norm_backward": (
        _batch_norm_backward, (_a(4, 8, 9, 9), _a(4, 8, 9, 9), _a(8), _a(8), _a(8, positive=True))),
    "mean_all": (lambda x: x.mean(), (_a(90, 101),)),
    "mse": (lambda x, y: aten.mse_loss(x, y), (_a(90, 101), _a(90, 101))),
    "global_pool": (lambda x: x.mean((2, 3)), (_a(4, 8, 9, 9),)),
    "column_max": (lambda x: x.amax(0), (_a(90, 101),)),
}  # fmt: skip

# The same at sizes well beyond a GPU's L2, where bytes moved are what counts.
LARGE: dict[str, tuple[Arg, ...]] = {
    "bias_gelu": (Arg((4096, 4096)), Arg((4096,))),
    "layer_norm": (Arg((8192, 1024)), Arg((1024,)), Arg((1024,))),
    "layer_norm_bf16": (Arg((8192, 4096), bf16), Arg((4096,), bf16), Arg((4096,), bf16)),
    "softmax": (Arg((8192, 2048)),),
    "rms_norm_backward": (Arg((8192, 2048)), Arg((8192, 2048)), Arg((2048,))),
    "layer_norm_backward": (
        Arg((8192, 1024)), Arg((8192, 1024)), Arg((8192, 1)), Arg((8192, 1)), Arg((1024,)), Arg((1024,))),
    "gelu_backward_bias": (Arg((8192, 4096)), Arg((8192, 4096))),
    "bias_gradient": (Arg((16384, 1024)),),
    "cross_entropy": (Arg((4096, 8192)), Arg((4096,), i64, high=8192)),
}  # fmt: skip

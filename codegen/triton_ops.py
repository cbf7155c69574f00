"""Elementwise aten ops as Triton expressions, in the type that eager PyTorch computes in."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

aten = torch.ops.aten
prims = torch.ops.prims

NAMES = {
    torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16", torch.float32: "tl.float32",
    torch.float64: "tl.float64", torch.int8: "tl.int8", torch.int16: "tl.int16", torch.int32: "tl.int32",
    torch.int64: "tl.int64", torch.uint8: "tl.uint8", torch.bool: "tl.int1",
}  # fmt: skip


def register_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a value has in registers: half precision is computed in float32, and rounded after every op."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def literal(value: object) -> str:
    """A Python number as Triton source."""
    if isinstance(value, (bool, int)):
        return repr(value)
    assert isinstance(value, float)
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _libdevice(name: str) -> Callable[..., str]:
    return lambda *args: f"libdevice.{name}({', '.join(args)})"


def _call(name: str) -> Callable[..., str]:
    return lambda *args: f"{name}({', '.join(args)})"


def _infix(symbol: str) -> Callable[..., str]:
    return lambda a, b: f"{a} {symbol} {b}"


# Arithmetic: operands are brought to the result's register type first.
ARITHMETIC: dict[object, Callable[..., str]] = {
    aten.mul.Tensor: _infix("*"), aten.mul.Scalar: _infix("*"), prims.mul.default: _infix("*"),
    aten.neg.default: lambda a: f"-{a}", aten.abs.default: _call("tl.abs"),
    aten.exp.default: _call("tl.exp"), aten.exp2.default: _call("tl.exp2"), aten.log.default: _call("tl.log"),
    aten.log2.default: _call("tl.log2"), aten.sqrt.default: _call("tl.sqrt_rn"), aten.rsqrt.default: _call("tl.rsqrt"),
    aten.sin.default: _call("tl.sin"), aten.cos.default: _call("tl.cos"), aten.erf.default: _call("tl.erf"),
    aten.sigmoid.default: lambda a: f"1.0 / (1.0 + tl.exp(-{a}))",
    aten.tanh.default: _libdevice("tanh"), aten.expm1.default: _libdevice("expm1"),
    aten.log1p.default: _libdevice("log1p"), aten.floor.default: _call("tl.floor"), aten.ceil.default: _call("tl.ceil"),
    aten.trunc.default: _libdevice("trunc"), aten.round.default: _libdevice("nearbyint"),
    aten.reciprocal.default: lambda a: f"1.0 / {a}", aten.relu.default: lambda a: f"tl.where({a} < 0, 0.0, {a})",
    aten.maximum.default: _call("maximum"), aten.minimum.default: _call("minimum"),
    aten.clamp_min.default: _call("maximum"), aten.clamp_max.default: _call("minimum"),
    aten.sign.default: lambda a: f"tl.where({a} > 0, 1.0, tl.where({a} < 0, -1.0, {a} * 0.0))",
    aten.square.default: lambda a: f"{a} * {a}",
    aten.bitwise_and.Tensor: _infix("&"), aten.bitwise_or.Tensor: _infix("|"), aten.bitwise_xor.Tensor: _infix("^"),
    aten.logical_and.default: _infix("&"), aten.logical_or.default: _infix("|"), aten.logical_xor.default: _infix("!="),
    aten.pow.Tensor_Tensor: _libdevice("pow"), aten.pow.Scalar: _libdevice("pow"),
    aten.bitwise_not.default: lambda a: f"~{a}", aten.fmod.Tensor: _libdevice("fmod"), aten.fmod.Scalar: _libdevice("fmod"),
}  # fmt: skip

# Comparisons: operands are brought to their common type; the result is a mask.
COMPARISONS: dict[object, Callable[..., str]] = {
    getattr(getattr(aten, name), overload): _infix(symbol)
    for name, symbol in (("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="))
    for overload in ("Tensor", "Scalar")
} | {
    aten.isnan.default: lambda a: f"{a} != {a}",
    aten.isinf.default: lambda a: f"tl.abs({a}) == float('inf')",
    aten.logical_not.default: lambda a: f"{a} == 0",
}

SUMS = {aten.add.Tensor: "+", aten.add.Scalar: "+", aten.sub.Tensor: "-", aten.sub.Scalar: "-", prims.sub.default: "-"}
DIVISIONS = {aten.div.Tensor, aten.div.Scalar, prims.div.default}


def power(base: str, exponent: float) -> str | None:
    """Small whole and half powers as multiplications, as eager does; None for others."""
    if exponent == 0.5:
        return f"tl.sqrt_rn({base})"
    if exponent == -0.5:
        return f"tl.rsqrt({base})"
    if exponent in (2, 3):
        return " * ".join([base] * int(exponent))
    if exponent == -1:
        return f"1.0 / {base}"
    if exponent == -2:
        return f"1.0 / ({base} * {base})"
    return None

"""What generated kernels call beyond triton.language: reductions and comparisons that keep NaN, as eager PyTorch does."""

# ruff: noqa: PLR0124 - NaN is what differs from itself

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def maximum(a, b):
    """The larger; NaN if either is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def minimum(a, b):
    """The smaller; NaN if either is."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def row_max(v):
    """Maximum over axis 1, kept as one column; NaN where the row has one."""
    lost = tl.max((v != v).to(tl.int32), axis=1, keep_dims=True)
    return tl.where(lost > 0, float("nan"), tl.max(v, axis=1, keep_dims=True))


@triton.jit
def row_min(v):
    """Minimum over axis 1, kept as one column; NaN where the row has one."""
    lost = tl.max((v != v).to(tl.int32), axis=1, keep_dims=True)
    return tl.where(lost > 0, float("nan"), tl.min(v, axis=1, keep_dims=True))


@triton.jit
def column_max(v):
    """Maximum over axis 0, kept as one row; NaN where the column has one."""
    lost = tl.max((v != v).to(tl.int32), axis=0, keep_dims=True)
    return tl.where(lost > 0, float("nan"), tl.max(v, axis=0, keep_dims=True))


@triton.jit
def column_min(v):
    """Minimum over axis 0, kept as one row; NaN where the column has one."""
    lost = tl.max((v != v).to(tl.int32), axis=0, keep_dims=True)
    return tl.where(lost > 0, float("nan"), tl.min(v, axis=0, keep_dims=True))


@triton.jit
def exp_step(a, b):
    """exp(a - b), the factor that brings a sum of exponentials from maximum a to maximum b; 1 where they are equal."""
    return tl.where(a == b, 1.0, tl.exp(a - b))

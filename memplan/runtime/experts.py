"""Products of each row with the matrix of its own expert, rows sorted by expert: one matrix product an expert, and no
copy of a matrix for every row (MegaBlocks, Gale et al., MLSys 2023, section 3, without its padding or its sparsity)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memplan.runtime.own import kernel

_ops = torch.ops.memplan

# Of a product on a CPU core: half of what float32 does while oneDNN begins a product of narrower numbers, 13 us. Those are
# added up in float32 in either case.
_SMALL = 1 << 19


def working_dtype(dtype: torch.dtype, device_type: str, terms: int) -> torch.dtype:
    """What products of ``terms`` multiplications each, all experts alike, are computed in."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow and device_type == "cpu" and terms <= _SMALL else dtype


@kernel("expert_order(Tensor experts, SymInt count) -> Tensor")
def _order(experts: Tensor, count: int) -> Tensor:
    """[2, S]: ``experts`` [S], integers, counted from 0 (negative ones count from the end), and the rows in order of their
    experts. Raises IndexError where one names none of ``count`` experts."""
    lowest, highest = (int(n) for n in experts.aminmax()) if len(experts) else (0, -1)
    if not -count <= lowest or not highest < count:
        raise IndexError(f"a row names an expert that is none of the {count}")
    experts = torch.where(experts < 0, experts + count, experts) if lowest < 0 else experts
    return torch.stack((experts, experts.argsort(stable=True)))


@kernel("expert_products(Tensor rows, Tensor weight, Tensor by, bool transposed) -> Tensor")
def _products(rows: Tensor, weight: Tensor, by: Tensor, transposed: bool) -> Tensor:
    """Row s of ``rows`` [S, D] times matrix experts[s] of ``weight``: [S, N].

    ``weight``: [E, D, N], ``transposed`` [E, N, D]. ``by``: what ``expert_order`` makes of ``experts``. Beside the result,
    both operands of the products are held sorted.
    """
    experts, order = by
    counts = experts.bincount(minlength=len(weight)).tolist()
    dtype = working_dtype(rows.dtype, rows.device.type, len(rows) * weight[0].numel() // len(weight))
    ordered, weight = rows.index_select(0, order).to(dtype), weight.to(dtype)
    matrices = weight.transpose(1, 2) if transposed else weight
    made = ordered.new_empty(len(rows), matrices.shape[2])
    for some, matrix, out in zip(ordered.split(counts), matrices.unbind(), made.split(counts)):
        if len(some):
            torch.mm(some, matrix, out=out)
    made = made.to(rows.dtype)
    return torch.empty_like(made).index_copy_(0, order, made)


@kernel("expert_sums(Tensor left, Tensor right, Tensor by, SymInt count) -> Tensor")
def _sums(left: Tensor, right: Tensor, by: Tensor, count: int) -> Tensor:
    """The sum over an expert's rows of the outer products of ``left`` [S, A] and ``right`` [S, B]: [count, A, B], zero for
    an expert without rows."""
    experts, order = by
    counts = experts.bincount(minlength=count).tolist()
    dtype = working_dtype(left.dtype, left.device.type, len(left) * left.shape[1] * right.shape[1] // count)
    sorted_left, sorted_right = (rows.index_select(0, order).to(dtype) for rows in (left, right))
    made = sorted_left.new_empty(count, left.shape[1], right.shape[1])
    for some, other, total in zip(sorted_left.split(counts), sorted_right.split(counts), made.unbind()):
        torch.mm(some.t(), other, out=total)  # zeros where there are no rows
    return made.to(left.dtype)


@torch.library.register_fake("memplan::expert_order")
def _(experts: Tensor, count: int) -> Tensor:
    return experts.new_empty((2, *experts.shape), dtype=torch.int64)


@torch.library.register_fake("memplan::expert_products")
def _(rows: Tensor, weight: Tensor, by: Tensor, transposed: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1 if transposed else 2])


@torch.library.register_fake("memplan::expert_sums")
def _(left: Tensor, right: Tensor, by: Tensor, count: int) -> Tensor:
    return left.new_empty(count, left.shape[1], right.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *kept, ctx.last = inputs
    ctx.save_for_backward(*kept)


def _products_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, by = ctx.saved_tensors
    of_rows = of_weight = None
    if ctx.needs_input_grad[0]:
        of_rows = _ops.expert_products(gradient, weight, by, not ctx.last)
    if ctx.needs_input_grad[1]:
        of_weight = _ops.expert_sums(*((gradient, rows) if ctx.last else (rows, gradient)), by, len(weight))
    return of_rows, of_weight, None, None


def _sums_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    left, right, by = ctx.saved_tensors
    of_left = _ops.expert_products(right, gradient, by, True) if ctx.needs_input_grad[0] else None
    of_right = _ops.expert_products(left, gradient, by, False) if ctx.needs_input_grad[1] else None
    return of_left, of_right, None, None


torch.library.register_autograd("memplan::expert_products", _products_backward, setup_context=_save)
torch.library.register_autograd("memplan::expert_sums", _sums_backward, setup_context=_save)


@register_flop_formula(_ops.expert_products)
def _product_flops(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


@register_flop_formula(_ops.expert_sums)
def _sum_flops(left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def multiply_gathered(weight: Tensor, experts: Tensor, vectors: Tensor, from_left: bool, dtype: torch.dtype) -> Tensor:
    """``weight[experts] @ vectors`` with vectors [S, D, 1]; ``from_left``: ``vectors @ weight[experts]`` with [S, 1, D].

    ``dtype``: of the product, which autocast may have narrowed.
    """
    dimension = 1 if from_left else 2
    rows = vectors.squeeze(dimension).to(dtype)
    made = _ops.expert_products(rows, weight.to(dtype), _ops.expert_order(experts, len(weight)), not from_left)
    return made.unsqueeze(dimension)

"""Products of each row with the matrix of its own expert, rows sorted by expert: one matrix product an expert, and no
copy of a matrix for every row (MegaBlocks, Gale et al., MLSys 2023, section 3, without its padding or its sparsity)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("memplan::expert_products", mutates_args=())
def expert_products(rows: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
    """Row s of ``rows`` [S, D] times matrix experts[s] of ``weight``: [S, N].

    ``weight``: [E, D, N], ``transposed`` [E, N, D]. ``experts`` [S]: integers, negative ones count from the end. Raises
    IndexError where one names no expert. Beside the result, both operands of the products are held sorted.
    """
    order, counts = _by_expert(experts, len(weight))
    grouped = rows[order]
    matrices = weight.transpose(1, 2) if transposed else weight
    made = rows.new_empty(len(rows), matrices.shape[2])
    start = 0
    for matrix, count in zip(matrices, counts, strict=True):
        if count:
            here = slice(start, start + count)
            torch.mm(grouped[here], matrix, out=made[here])
            start += count
    return torch.empty_like(made).index_copy_(0, order, made)


@torch.library.custom_op("memplan::expert_sums", mutates_args=())
def expert_sums(left: Tensor, right: Tensor, experts: Tensor, count: int) -> Tensor:
    """The sum over an expert's rows of the outer products of ``left`` [S, A] and ``right`` [S, B]: [count, A, B], zero for
    an expert without rows."""
    order, counts = _by_expert(experts, count)
    left, right = left[order], right[order]
    made = left.new_empty(count, left.shape[1], right.shape[1])
    start = 0
    for total, rows in zip(made, counts, strict=True):
        here = slice(start, start + rows)
        if rows:
            torch.mm(left[here].t(), right[here], out=total)
        else:
            total.zero_()
        start += rows
    return made


def _by_expert(experts: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """The rows in order of their experts, and how many each has."""
    experts = torch.where(experts < 0, experts + count, experts)
    if len(experts) and not (0 <= int(experts.min()) and int(experts.max()) < count):
        raise IndexError(f"a row names an expert that is none of the {count}")
    return experts.argsort(stable=True), experts.bincount(minlength=count).tolist()


@expert_products.register_fake
def _(rows: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1 if transposed else 2])


@expert_sums.register_fake
def _(left: Tensor, right: Tensor, experts: Tensor, count: int) -> Tensor:
    return left.new_empty(count, left.shape[1], right.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, experts, ctx.transposed = inputs
    ctx.save_for_backward(rows, weight, experts)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    rows, weight, experts = ctx.saved_tensors
    of_rows = of_weight = None
    if ctx.needs_input_grad[0]:
        of_rows = torch.ops.memplan.expert_products(gradient, weight, experts, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        operands = (gradient, rows) if ctx.transposed else (rows, gradient)
        of_weight = torch.ops.memplan.expert_sums(*operands, experts, len(weight))
    return of_rows, of_weight, None, None


expert_products.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.memplan.expert_products)
def _product_flops(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.memplan.expert_sums)
def _sum_flops(left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def multiply_gathered(weight: Tensor, experts: Tensor, vectors: Tensor, from_left: bool, dtype: torch.dtype) -> Tensor:
    """``weight[experts] @ vectors`` with vectors [S, D, 1]; ``from_left``: ``vectors @ weight[experts]`` with [S, 1, D].

    ``dtype``: of the product, which autocast may have narrowed.
    """
    dimension = 1 if from_left else 2
    rows = vectors.squeeze(dimension).to(dtype)
    made = torch.ops.memplan.expert_products(rows, weight.to(dtype), experts, not from_left)
    return made.unsqueeze(dimension)

"""A vocabulary projection and its cross-entropy over blocks of rows, so that no more than one block of logits exists.

The gradients of a row's logits need nothing but that row, so they are made and used up in the forward, block by block
(Liger-Kernel, section "FusedLinearCrossEntropy"); the backward only multiplies by what comes from behind the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("memplan::blocked_loss", mutates_args=())
def blocked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignored: int,
    mean: bool,
    rows: int,
    wanted: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (a scalar of ``dtype``) and its gradients of hidden [N, D], weight [V, D] and bias [V], ``wanted`` or empty.

    ``target`` [N]: classes, ``ignored`` where a row does not count. ``mean`` over the rows that count, else their sum.
    ``rows``: of a block. Logits are worked on, and weight gradients added up, in float32 at least.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    valid = target != ignored
    classes = torch.where(valid, target, 0)
    scale = torch.where(valid, 1.0 / valid.sum() if mean else 1.0, 0.0).to(wide)
    losses = hidden.new_empty(len(hidden), dtype=wide)
    of_hidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
    of_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else weight.new_empty(0)
    of_bias = weight.new_zeros(len(weight) if wanted[2] else 0, dtype=wide)
    for start in range(0, len(hidden), rows):
        block = slice(start, start + rows)
        inner, own = hidden[block], classes[block, None]
        logits = torch.nn.functional.linear(inner, weight, bias).to(wide)
        logits.sub_(logits.amax(1, keepdim=True))
        chosen = logits.gather(1, own)
        total = logits.exp_().sum(1, keepdim=True)
        losses[block] = (total.log() - chosen)[:, 0]
        logits.mul_(scale[block, None] / total)
        logits.scatter_add_(1, own, -scale[block, None])
        if wanted[2]:
            of_bias += logits.sum(0)
        logits = logits.to(hidden.dtype)
        if wanted[0]:
            torch.mm(logits, weight, out=of_hidden[block])
        if wanted[1]:
            _add_product(of_weight, logits, inner)
    loss = torch.where(valid, losses, 0.0).sum()
    loss = loss / valid.sum() if mean else loss
    return loss.to(dtype), of_hidden, of_weight.to(weight.dtype), of_bias.to(weight.dtype)


def _add_product(total: Tensor, logits: Tensor, inner: Tensor) -> None:
    if total.dtype == inner.dtype:
        total.addmm_(logits.t(), inner)
    else:
        total += logits.t() @ inner


@blocked_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignored: int,
    mean: bool,
    rows: int,
    wanted: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=dtype),
        torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0),
        torch.empty_like(weight) if wanted[1] else weight.new_empty(0),
        weight.new_empty(len(weight) if wanted[2] else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted = inputs[7]
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _scale(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    kept = zip(ctx.wanted, ctx.saved_tensors, strict=True)
    given = [g * upstream if wanted and upstream is not None else None for wanted, g in kept]
    return (*given, None, None, None, None, None, None)


blocked_loss.register_autograd(_scale, setup_context=_save)


@register_flop_formula(torch.ops.memplan.blocked_loss)
def _flops(
    hidden: Any,
    weight: Any,
    bias: Any,
    target: Any,
    ignored: Any,
    mean: Any,
    rows: Any,
    wanted: Any,
    *_: Any,
    **__: Any,
) -> int:
    """A product forward, and one for each of two gradients."""
    return 2 * hidden[0] * hidden[1] * weight[0] * (1 + wanted[0] + wanted[1])


def loss_of_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignored: int, mean: bool, rows: int,
    computed: torch.dtype, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``cross_entropy(linear(hidden, weight, bias), target)`` with [..., D] hidden and as many targets as it has rows.

    ``computed``: dtype of the product, which autocast may have narrowed; ``dtype``: of the loss.
    """
    flat = hidden.reshape(-1, hidden.shape[-1]).to(computed)
    weight, bias = weight.to(computed), None if bias is None else bias.to(computed)
    grad = torch.is_grad_enabled()
    wanted = [grad and t is not None and t.requires_grad for t in (flat, weight, bias)]
    return torch.ops.memplan.blocked_loss(flat, weight, bias, target.reshape(-1), ignored, mean, rows, wanted, dtype)[0]

"""Kernels whose results lie otherwise in memory than torch's fake tensors say: others that do the same take their place.

A loss that is averaged or summed is computed element by element into what becomes the result's storage: the one number,
and with it the caller, holds as many bytes as an operand. The two halves as ops of their own give the same bits.

On the CPU a batch norm's results are dense in the layout that its input suggests; the fake kernel gives them the strides
of what it computes them from. The two differ where tokens are transposed before the norm: every later view and every
measured workspace then rests on a layout that is not there, and views fail (under torch's ``aot_eager``, too). The same
holds for kernels of one element at a time whose fake ones compute by way of others, where two operands lie differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memplan.torch_compat import suggest_memory_format

aten = torch.ops.aten


def _densely(target: torch._ops.OpOverload, *places: int) -> Callable[..., Any]:
    """``target`` with its operands at ``places`` copied where they are not dense in the layout that the last suggests."""

    def dense(*args: Any, **kwargs: Any) -> Any:
        layout = suggest_memory_format(args[places[-1]])
        loose = [k for k in places if not args[k].is_contiguous(memory_format=layout)]
        if not loose:
            return NotImplemented
        copies = {k: args[k].clone(memory_format=layout) for k in loose}
        return target(*(copies.get(k, argument) for k, argument in enumerate(args)), **kwargs)

    return dense


def _contiguously(target: torch._ops.OpOverload, where_they_differ: bool = False) -> Callable[..., Any]:
    """``target`` with its operands made contiguous, or only where two of one shape lie differently in memory."""

    def contiguous(*args: Any, **kwargs: Any) -> Any:
        given = [a for a in args if isinstance(a, torch.Tensor)]
        shape = max(given, key=torch.Tensor.dim).shape
        # What is expanded as a whole, such as the gradient of a sum, decides no layout.
        deciding = [a for a in given if any(a.stride()) and (a.shape == shape or not where_they_differ)]
        alike = where_they_differ and len({a.stride() for a in deciding}) < 2
        if alike or all(a.is_contiguous() for a in deciding):
            return NotImplemented
        return target(*(a.contiguous() if isinstance(a, torch.Tensor) else a for a in args), **kwargs)

    return contiguous


def _in_halves(target: torch._ops.OpOverload) -> Callable[..., Any]:
    """A loss whose elements get a storage of their own, which dies once they are averaged or summed."""
    names = [argument.name for argument in target._schema.arguments]

    def halves(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        reduction = given.get("reduction", _MEAN)
        if reduction not in _REDUCTIONS:
            return NotImplemented
        return _REDUCTIONS[reduction](target(**given | {"reduction": _NONE}))

    return halves


_NONE, _MEAN, _SUM = range(3)  # at::Reduction
_REDUCTIONS = {_MEAN: aten.mean.default, _SUM: aten.sum.default}

_NORMS = (
    (aten._native_batch_norm_legit.default, 0),
    (aten._native_batch_norm_legit.no_stats, 0),
    (aten._native_batch_norm_legit_functional.default, 0),
    (aten._native_batch_norm_legit_no_training.default, 0),
    (aten.native_batch_norm.default, 0),
    (aten.native_batch_norm_backward.default, 0, 1),
)
_CONTIGUOUS = (  # these copy inside, or make contiguous results whatever they are given
    aten._log_softmax_backward_data.default,
    aten.glu_backward.default,
    aten.huber_loss_backward.default,
    aten.log_sigmoid_backward.default,
    aten.log_sigmoid_forward.default,
    aten.mse_loss_backward.default,
    aten.native_dropout_backward.default,
    aten.rrelu_with_noise_backward.default,
    aten.smooth_l1_loss_backward.default,
)
_BY_THE_FIRST = (
    aten.binary_cross_entropy_backward.default,
    aten.copysign.Tensor,
    aten.elu_backward.default,
    aten.floor_divide.default,
    aten.hardsigmoid_backward.default,
    aten.hardswish_backward.default,
    aten.hardtanh_backward.default,
    aten.logit_backward.default,
    aten.softplus_backward.default,
    aten.special_xlog1py.default,
    aten.xlogy.Tensor,
)
_LOSSES = (
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.binary_cross_entropy.default,
)

# A decomposition table for AOTAutograd: what stands for a kernel lies in memory as its fake results say.
FAITHFUL: dict[Any, Callable[..., Any]] = {
    **{target: _densely(target, *places) for target, *places in _NORMS},
    **{target: _contiguously(target) for target in _CONTIGUOUS},
    **{target: _contiguously(target, where_they_differ=True) for target in _BY_THE_FIRST},
    **{target: _in_halves(target) for target in _LOSSES},
}

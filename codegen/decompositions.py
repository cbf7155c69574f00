"""How Inductor's C++ computes a few ops that its own table computes less exactly, or in more memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from memplan import torch_compat

aten = torch.ops.aten


def cpu_decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's table with those ops replaced; what a replacement does not cover stays with the table."""
    table = torch_compat.inductor_decompositions()
    return table | {target: _or(ours, table.get(target)) for target, ours in _OURS.items()}


def _or(ours: Callable[..., Any], stock: Callable[..., Any] | None) -> Callable[..., Any]:
    def decomposed(*args: Any, **kwargs: Any) -> Any:
        found = ours(*args, **kwargs)
        return stock(*args, **kwargs) if found is NotImplemented and stock is not None else found

    return decomposed


def _nll_loss_backward(
    grad: Tensor, logs: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: int, total: Tensor
) -> Any:
    """The gradient of the cross-entropy without a scatter, which would make the whole matrix of zeros."""
    if weight is not None or logs.dim() != 2:
        return NotImplemented
    classes = torch.arange(logs.shape[1], device=logs.device)
    return torch.where(classes == target.unsqueeze(1), _share(grad, target, reduction, ignore, total), 0.0).to(
        logs.dtype
    )


def _share(grad: Tensor, target: Tensor, reduction: int, ignore: int, total: Tensor) -> Tensor:
    """The gradient of each row's chosen log-probability, a column: all that its row of gradients sums up to."""
    share = -(grad / total if reduction == 1 else grad)  # 1: the mean over the targets that count
    return torch.where(target != ignore, share, 0.0).unsqueeze(1)


def loss_backward(
    grad: Tensor, logs: Tensor, target: Tensor, reduction: int, ignore: int, total: Tensor, again: Tensor
) -> Tensor:
    """The gradient of a cross-entropy's logits, of which ``logs`` and ``again`` are the log-probabilities: what the
    decompositions of its two ops give, to the bit, and no row summed up."""
    share = _share(grad, target, reduction, ignore, total)
    return _nll_loss_backward(grad, logs, target, None, reduction, ignore, total) - again.exp() * share


def paired(graph: fx.Graph) -> fx.Graph:
    """A copy of a region's graph in which pairs of ops that cost less together are one call."""
    result = fx.Graph()
    result.output(result.graph_copy(graph, {}))
    for node in list(result.nodes):
        if node.target is not aten._log_softmax_backward_data.default:
            continue
        first, again, dimension, dtype = node.args
        if isinstance(first, fx.Node) and first.target is aten.nll_loss_backward.default and _is_loss(first, dimension):
            grad, logs, target, _, *rest = first.args
            with result.inserting_before(node):
                both = result.call_function(loss_backward, (grad, logs, target, *rest, again))
                node.replace_all_uses_with(result.call_function(aten._to_copy.default, (both,), {"dtype": dtype}))
            result.erase_node(node)
    result.eliminate_dead_code()
    return result


def _is_loss(backward: fx.Node, dimension: Any) -> bool:
    """Whether a loss's backward is of rows without weights, along which the log-softmax was taken."""
    value, narrow = backward.meta["val"], (torch.float16, torch.bfloat16)
    return backward.args[3] is None and value.dim() == 2 and dimension in (1, -1) and value.dtype not in narrow


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    epsilon: float,
) -> Any:
    """Batch norm in training, its statistics of rows first and of their means then (Chan, Golub and LeVeque 1979,
    section 2).

    One sum for all images and positions rounds the more the longer it is; torch's kernel avoids it with sums in double
    precision, except where channels lie innermost. Here no chain of sums is longer than a row, in either layout.
    """
    if not training or not _has_rows(x):
        return NotImplemented
    rows = x.mean(-1, keepdim=True)
    spread = (x - rows).square().mean(-1, keepdim=True)
    mean = _overall(rows)
    variance = _overall(spread + (rows - mean).square())
    mean, variance, scale = (t.to(x.dtype) for t in (mean, variance, torch.rsqrt(variance + epsilon)))
    result = (x - mean) * scale
    if weight is not None:
        result = result * _a_channel(weight, x)
    if bias is not None:
        result = result + _a_channel(bias, x)
    mean, variance, scale = (t.flatten() for t in (mean, variance, scale))
    if running_mean is not None:
        running_mean = torch.lerp(running_mean, mean, momentum)
    if running_var is not None:
        count = x.numel() // x.shape[1]
        running_var = torch.lerp(running_var, variance * (count / max(1, count - 1)), momentum)
    return result, mean, scale, running_mean, running_var


def _has_rows(x: Tensor) -> bool:
    return x.dim() > 2 and x.dtype in (torch.float32, torch.float64)


def _overall(rows: Tensor) -> Tensor:
    """From means of rows, (images, channels, ..., 1), to means of channels in double precision, one dimension after the
    other: rows are few."""
    rows = rows.double()
    for dimension in (*range(rows.dim() - 2, 1, -1), 0):
        rows = rows.mean(dimension, keepdim=True)
    return rows


def _a_channel(values: Tensor, x: Tensor) -> Tensor:
    """One value for each channel of x."""
    return values.view(-1, *[1] * (x.dim() - 2))


def _norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    training: bool,
    epsilon: float,
    wanted: list[bool],
) -> Any:
    """The gradients of that; what they sum up is summed by rows, too."""
    if not training or mean is None or scale is None or not _has_rows(x):
        return NotImplemented
    mean, scale = _a_channel(mean, x), _a_channel(scale, x)
    normal = (x - mean) * scale
    count = x.numel() // x.shape[1]
    total, along = (_overall(t.mean(-1, keepdim=True)).to(x.dtype) for t in (gradient, gradient * normal))
    factor = scale if weight is None else scale * _a_channel(weight, x)
    first = (gradient - total - normal * along) * factor if wanted[0] else None
    second, third = (t.flatten() * count if want else None for t, want in zip((along, total), wanted[1:], strict=True))
    return first, second, third


def _norm_again(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, epsilon: float
) -> Any:
    """The same without running statistics."""
    found = _norm(x, weight, bias, None, None, training, momentum, epsilon)
    return found if found is NotImplemented else found[:3]


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Any:
    """A narrow operand beside float32 parameters, as under autocast: statistics as wide as those, which is what torch's
    kernel returns and its backward reads."""
    parameters = [p for p in (weight, bias) if p is not None]
    if not parameters or parameters[0].dtype == x.dtype:
        return NotImplemented
    wide = x.to(parameters[0].dtype)
    within = list(range(x.dim() - len(shape), x.dim()))
    mean = wide.mean(within, keepdim=True)
    scale = torch.rsqrt((wide - mean).square().mean(within, keepdim=True) + epsilon)
    result = (wide - mean) * scale
    if weight is not None:
        result = result * weight
    if bias is not None:
        result = result + bias
    return result.to(x.dtype), mean, scale


def _thin_product(left: Tensor, right: Tensor) -> Any:
    """A product by a row or a column, which no tiles would make faster; narrow operands are added up in float32."""
    wide = torch.promote_types(left.dtype, torch.float32) if left.is_floating_point() else left.dtype
    left_, right_ = left.to(wide), right.to(wide)
    if left.shape[-1] == 1:
        return (left_ * right_).to(left.dtype)
    return (left_.unsqueeze(-1) * right_.unsqueeze(-3)).sum(-2).to(left.dtype)


_OURS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _thin_product,
    aten.bmm.default: _thin_product,
    aten.nll_loss_backward.default: _nll_loss_backward,
    aten.native_layer_norm.default: _layer_norm,
    aten._native_batch_norm_legit_functional.default: _norm,
    aten._native_batch_norm_legit.no_stats: _norm_again,
    aten.native_batch_norm_backward.default: _norm_backward,
}

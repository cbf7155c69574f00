"""Workspace rules: bytes that kernels hold while they run, beyond operands and results.

Two tables. ``workspace`` is the analytic model's estimate of all of it. ``unseen`` is the part that kernels take
straight from malloc, so that no torch allocator event shows it; measured workspaces are exact once it is added. Both
were read off a malloc interposer on torch 2.13 (one and two threads, float32 and bfloat16, contiguous and channels-last).
"""

from __future__ import annotations

from typing import Any

import torch

from memplan.cost.signature import Layout, Signature

aten = torch.ops.aten

# oneDNN's descriptors and memory objects of one call: 4 to 36 KB were seen, whatever the shapes.
ONEDNN_CALL = 36 * 1024

_ONEDNN = {aten.convolution, aten.convolution_backward, aten.gelu, aten.gelu_backward}
_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.linear}
_PRODUCTS |= {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}


def unseen(described: Signature, threads: int) -> int:
    """Bytes an aten op's CPU kernel holds that torch's allocator does not hand out."""
    packet, operands = described.target.overloadpacket, described.operands()
    if not operands or any(layout.device != "cpu" for layout in operands):
        return 0
    first, reduced = operands[0], operands[0].dtype in (torch.bfloat16, torch.float16)
    if packet in _ONEDNN or (packet in _PRODUCTS and reduced):
        return ONEDNN_CALL
    if packet is aten.topk:  # a (value, index) queue of one row for each thread
        return 16 * _size(first, described.args[2] if len(described.args) > 2 else -1) * threads
    if packet is aten.index_add:
        return 40 * operands[1].numel
    if packet is aten.embedding_dense_backward and described.args[4]:  # counts for scale_grad_by_freq
        return 8 * described.args[2]
    return 0


def workspace(described: Signature, made: list[Layout], kind: str, threads: int) -> int:
    """Bytes an aten op holds on a device of ``kind`` beyond its operands and results, as the rules know them."""
    rule = _RULES.get(described.target.overloadpacket)
    held = rule(described, made, kind) if rule else 0
    return held + (unseen(described, threads) if kind == "cpu" else 0)


def _convolution(described: Signature, made: list[Layout], kind: str) -> int:
    """oneDNN blocks the weight always, and input and result unless they come channels-last."""
    source, weight = described.operands()[:2]
    if kind != "cpu":
        return 0
    if _plain_product(weight, source):
        return 0
    if _channels_last(source):
        return weight.nbytes
    return max(source.nbytes + weight.nbytes, made[0].nbytes)


def _convolution_backward(described: Signature, made: list[Layout], kind: str) -> int:
    gradient, source, weight = described.operands()[:3]
    if kind != "cpu" or _plain_product(weight, source):
        return 0
    if _channels_last(source) and _channels_last(gradient):
        return 3 * weight.nbytes
    strided = any(step > 1 for step in described.args[4]) and described.args[-1][0]
    return gradient.nbytes + source.nbytes * (2 if strided else 1)


def _first_operand(described: Signature, made: list[Layout], kind: str) -> int:
    return described.operands()[0].nbytes


def _first_result(described: Signature, made: list[Layout], kind: str) -> int:
    return made[0].nbytes


def _contiguous_resize(described: Signature, made: list[Layout], kind: str) -> int:
    """The CPU kernels turn contiguous images into channels-last ones and back."""
    source = described.operands()[0]
    return source.nbytes + made[0].nbytes if kind == "cpu" and not _channels_last(source) else 0


def _attention_backward(described: Signature, made: list[Layout], kind: str) -> int:
    """On a CPU a dense copy of the gradient; on a GPU its accumulator in float32 and the row sums (FlashAttention-2)."""
    query = described.operands()[1]
    if kind == "cpu":
        return query.nbytes
    rows = query.numel // max(1, query.shape[-1])
    return 4 * (query.numel + rows)


_RULES: dict[Any, Any] = {
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten.native_batch_norm_backward: _first_result,
    aten.native_dropout: _first_result,
    aten.logsumexp: _first_operand,
    aten.mse_loss: _first_operand,
    aten.upsample_nearest2d: _contiguous_resize,
    aten.upsample_bilinear2d: _contiguous_resize,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
}


def _plain_product(weight: Layout, source: Layout) -> bool:
    """A float32 convolution with a 1x1 kernel runs as a BLAS product, without oneDNN."""
    return source.dtype == torch.float32 and all(size == 1 for size in weight.shape[2:])


def _channels_last(layout: Layout) -> bool:
    return len(layout.stride) > 2 and layout.stride[1] == 1 and layout.shape[1] > 1


def _size(layout: Layout, dimension: int) -> int:
    return layout.shape[dimension] if layout.shape else 1

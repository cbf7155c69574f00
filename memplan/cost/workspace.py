"""Workspace rules: bytes that kernels hold while they run, beyond operands and results.

Two tables. ``workspace`` is the analytic model's estimate of all of it. ``unseen`` is the part that CPU kernels take
straight from malloc, so that no event of torch's allocator shows it: measured workspaces are complete once it is added.
Both were read off a malloc interposer on torch 2.13 over 280 calls (float32 and bfloat16, contiguous and channels-last,
one and two threads). oneDNN's scratch is no concern here: torch hands oneDNN its own allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from memplan.cost.signature import Layout, Signature

aten = torch.ops.aten

# oneDNN's descriptors and memory objects of one call: 4 to 36 KB were seen, whatever the shapes.
_ONEDNN_CALL = 36 * 1024
# A softmax over an inner dimension works on blocks of this many bytes a thread (at most seen: float32, and narrower).
_SOFTMAX_BLOCK = {True: 576 * 1024, False: 66 * 1024}

_ONEDNN = {aten.convolution, aten.convolution_backward, aten.gelu, aten.gelu_backward}
_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.linear}
_PRODUCTS |= {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}
_SOFTMAX = {aten._softmax, aten._log_softmax, aten._softmax_backward_data, aten._log_softmax_backward_data}
_RESIZE_BACKWARD = {aten.upsample_nearest2d_backward, aten.upsample_bilinear2d_backward}


def unseen(described: Signature, threads: int) -> int:
    """Bytes an aten op's CPU kernel holds that torch's allocator does not hand out: exact, or a bound for softmax."""
    packet, args, operands = described.target.overloadpacket, described.args, described.operands()
    if not operands or any(layout.device != "cpu" for layout in operands):
        return 0
    first = operands[0]
    narrow = first.dtype in (torch.bfloat16, torch.float16)
    if packet is aten.convolution_backward and is_plain_product(described, threads):
        source = operands[1]
        return source.nbytes // source.shape[0] if args[-1][0] else 0  # one image's gradient, before it is added
    if packet in _ONEDNN or (packet in _PRODUCTS and narrow):
        return _ONEDNN_CALL
    if packet in _SOFTMAX and first.shape:
        dimension = args[2] if packet in (aten._softmax_backward_data, aten._log_softmax_backward_data) else args[1]
        size = first.shape[dimension]
        if dimension % len(first.shape) == len(first.shape) - 1:
            return 4 * size * threads if narrow else 0
        return max(_SOFTMAX_BLOCK[narrow], 256 * size if narrow else 0) * threads
    if packet in _RESIZE_BACKWARD and narrow and is_channels_last(first):
        return 4 * prod(args[2][1:]) * threads  # one image's gradient in float32
    if packet is aten.topk and first.shape:  # a queue of (value, index) over one row
        return 16 * first.shape[args[2] if len(args) > 2 else -1] * threads
    if packet is aten.index_add:
        return 40 * operands[1].numel
    if packet is aten.embedding_dense_backward and args[4]:  # counts for scale_grad_by_freq
        return 8 * args[2]
    return 0


def workspace(described: Signature, made: list[Layout], kind: str, threads: int) -> int:
    """Bytes an aten op holds on a device of ``kind`` ("cpu", "cuda") beyond operands and results, by rule."""
    if kind != "cpu":
        rule = _GPU_RULES.get(described.target.overloadpacket)
        return rule(described, made) if rule else 0
    held = unseen(described, threads)
    if described.target.overloadpacket in _CONVOLUTIONS and is_plain_product(described, threads):
        return held
    rule = _CPU_RULES.get(described.target.overloadpacket)
    if rule is None and torch.Tag.pointwise in described.target.tags:
        rule = _promoted
    return held + (rule(described, made) if rule else 0)


def is_plain_product(described: Signature, threads: int) -> bool:
    """Whether torch runs a convolution as BLAS products instead of oneDNN (aten's ConvParams.use_mkldnn)."""
    backward = described.target.overloadpacket is aten.convolution_backward
    source, weight = described.operands()[1:3] if backward else described.operands()[:2]
    steps = described.args[4 if backward else 3]
    unit = all(size == 1 for size in weight.shape[2:]) and all(step == 1 for step in steps)
    return source.dtype == torch.float32 and unit and source.shape[0] < 16 and threads == 1


def is_channels_last(layout: Layout) -> bool:
    return len(layout.stride) > 2 and layout.stride[1] == 1 and layout.shape[1] > 1


def _convolution(described: Signature, made: list[Layout]) -> int:
    """oneDNN blocks the weight always, and input and result unless they come channels-last."""
    source, weight = described.operands()[:2]
    if is_channels_last(source):
        return weight.nbytes
    return max(source.nbytes + weight.nbytes, made[0].nbytes)


def _convolution_backward(described: Signature, made: list[Layout]) -> int:
    gradient, source, weight = described.operands()[:3]
    if is_channels_last(source) and is_channels_last(gradient):
        return 3 * weight.nbytes
    strided = any(step > 1 for step in described.args[4]) and described.args[-1][0]
    return gradient.nbytes + source.nbytes * (2 if strided else 1)


def _first_operand(described: Signature, made: list[Layout]) -> int:
    return described.operands()[0].nbytes


def _first_result(described: Signature, made: list[Layout]) -> int:
    return made[0].nbytes


def _promoted(described: Signature, made: list[Layout]) -> int:
    """The CPU's TensorIterator widens, as a whole, every operand narrower than the widest."""
    floats = [layout for layout in described.operands() if layout.dtype.is_floating_point and layout.shape]
    widest = max((layout.dtype.itemsize for layout in floats), default=0)
    return sum(layout.numel * widest for layout in floats if layout.dtype.itemsize < widest)


def _widened(described: Signature, made: list[Layout]) -> int:
    source = described.operands()[0]
    return 4 * source.numel if source.dtype.itemsize == 2 else 0


def _contiguous_resize(described: Signature, made: list[Layout]) -> int:
    """The CPU kernels turn contiguous images into channels-last ones and back."""
    source = described.operands()[0]
    return 0 if is_channels_last(source) else source.nbytes + made[0].nbytes


def _attention_copy(described: Signature, made: list[Layout]) -> int:
    """A dense copy of one operand whose heads do not lie as the others'."""
    return described.operands()[1].nbytes


def _attention_accumulator(described: Signature, made: list[Layout]) -> int:
    """The query's gradient in float32 and one row sum a query (FlashAttention-2, algorithm 2)."""
    query = described.operands()[1]
    return 4 * (query.numel + query.numel // max(1, query.shape[-1]))


_Rule = Callable[[Signature, list[Layout]], int]

_CONVOLUTIONS = {aten.convolution, aten.convolution_backward}
_CPU_RULES: dict[Any, _Rule] = {
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten.native_batch_norm_backward: _first_result,
    aten.native_dropout: _first_result,
    aten.logsumexp: _first_operand,
    aten.mse_loss: _first_operand,
    aten.mean: _widened,
    aten.upsample_nearest2d: _contiguous_resize,
    aten.upsample_bilinear2d: _contiguous_resize,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_copy,
}
_GPU_RULES: dict[Any, _Rule] = {
    aten.logsumexp: _first_operand,
    aten._scaled_dot_product_flash_attention_backward: _attention_accumulator,
    aten._scaled_dot_product_efficient_attention_backward: _attention_accumulator,
}

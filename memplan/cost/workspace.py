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
from memplan.runtime.experts import working_dtype

aten = torch.ops.aten
BLOCKED_LOSS = "memplan::blocked_loss"  # memplan/runtime/loss.py
EXPERT_PRODUCTS, EXPERT_SUMS = "memplan::expert_products", "memplan::expert_sums"  # memplan/runtime/experts.py
ONEDNN_LINEAR = "mkldnn::_linear_pointwise"  # passes/products.py

# oneDNN's descriptors and memory objects of one call: 4 to 36 KB were seen, whatever the shapes.
_ONEDNN_CALL = 36 * 1024
# A softmax over an inner dimension works on blocks of up to this many bytes a thread; narrow: of 2-byte elements.
_SOFTMAX_BLOCK, _NARROW_SOFTMAX_BLOCK = 66 * 1024, 576 * 1024
_NARROW = (torch.bfloat16, torch.float16)


def unseen(described: Signature, threads: int) -> int:
    """Bytes an aten op's CPU kernel takes straight from malloc: exact, or a bound for oneDNN's objects and softmax.

    Known to be missing: LAPACK's own arrays in singular value decompositions, and oneDNN's in padded 1x1 convolutions.
    """
    operands = described.operands()
    rule = _onednn if described.target.name() == ONEDNN_LINEAR else _UNSEEN.get(described.target.overloadpacket)
    if rule is None or not operands or any(layout.device != "cpu" for layout in operands):
        return 0
    return rule(described, threads)


def masked_positions(described: Signature) -> int:
    """An index that is a mask becomes the positions of its ones, 8 bytes a dimension and element at most: no made-up mask
    shows how many there will be."""
    if described.target.overloadpacket not in _INDEXED:
        return 0
    masks = [index for index in described.args[1] if isinstance(index, Layout) and index.dtype == torch.bool]
    return sum(8 * len(mask.shape) * mask.numel for mask in masks)


def _onednn(described: Signature, threads: int) -> int:
    return _ONEDNN_CALL


def _narrow_onednn(described: Signature, threads: int) -> int:
    return _ONEDNN_CALL if described.operands()[0].dtype in _NARROW else 0


def _one_image(described: Signature, threads: int) -> int:
    """Products compute an image's gradient beside the result and then add it."""
    if not is_plain_product(described, threads):
        return _ONEDNN_CALL
    source = described.operands()[1]
    return source.nbytes // max(1, source.shape[0]) if described.args[-1][0] else 0


def _softmax(position: int) -> _Unseen:
    def rule(described: Signature, threads: int) -> int:
        first, dimension = described.operands()[0], described.args[position]
        if not first.shape:
            return 0
        size, narrow = first.shape[dimension], first.dtype in _NARROW
        if dimension % len(first.shape) == len(first.shape) - 1:
            return 4 * size * threads if narrow else 0
        return (max(_NARROW_SOFTMAX_BLOCK, 256 * size) if narrow else _SOFTMAX_BLOCK) * threads

    return rule


def _float_image(described: Signature, threads: int) -> int:
    """Channels-last gradients of 2-byte elements are summed in float32, an image at a time."""
    first = described.operands()[0]
    return 4 * prod(described.args[2][1:]) * threads if first.dtype in _NARROW and is_channels_last(first) else 0


def _row(bytes_per_element: int, position: int | None = None) -> _Unseen:
    """A copy of one row, along the dimension that the argument at ``position`` names."""

    def rule(described: Signature, threads: int) -> int:
        shape, args = described.operands()[0].shape, described.args
        dimension = -1 if position is None or len(args) <= position else args[position]
        return bytes_per_element * shape[dimension] * threads if shape else 0

    return rule


def _transform(described: Signature, threads: int) -> int:
    """MKL's buffer for the longest of the transformed dimensions."""
    shape = described.operands()[0].shape
    return 16 * 1024 + 20 * max((shape[k] for k in described.args[1]), default=0) * threads


def _counts(described: Signature, threads: int) -> int:
    """One count a word where gradients are scaled by frequency."""
    return 8 * described.args[2] if described.args[4] else 0


def _index_lists(described: Signature, threads: int) -> int:
    return 40 * described.operands()[1].numel


def _packed_right(described: Signature, threads: int) -> int:
    return described.operands()[1].nbytes + _ONEDNN_CALL


_INDEXED = {aten.index, aten._unsafe_index, aten.index_put, aten._unsafe_index_put}
_Unseen = Callable[[Signature, int], int]
_UNSEEN: dict[Any, _Unseen] = {
    aten.convolution: _onednn,
    aten.convolution_backward: _one_image,
    aten.gelu: _onednn,
    aten.gelu_backward: _onednn,
    aten.mm: _narrow_onednn,
    aten.mv: _narrow_onednn,
    aten.addmm: _narrow_onednn,
    aten.bmm: _narrow_onednn,
    aten.baddbmm: _narrow_onednn,
    aten.linear: _narrow_onednn,
    aten._int_mm: _packed_right,
    aten._scaled_dot_product_flash_attention_for_cpu: _narrow_onednn,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _narrow_onednn,
    aten._softmax: _softmax(1),
    aten._log_softmax: _softmax(1),
    aten._softmax_backward_data: _softmax(2),
    aten._log_softmax_backward_data: _softmax(2),
    aten.upsample_nearest2d_backward: _float_image,
    aten.upsample_bilinear2d_backward: _float_image,
    aten.topk: _row(16, 2),
    aten.median: _row(8, 1),
    aten.mode: _row(16, 1),
    aten.multinomial: _row(16),
    aten.index_add: _index_lists,
    aten.embedding_dense_backward: _counts,
    aten._fft_r2c: _transform,
    aten._fft_c2c: _transform,
    aten._fft_c2r: _transform,
}


def workspace(described: Signature, made: list[Layout], kind: str, threads: int) -> int:
    """Bytes an aten op holds on a device of ``kind`` ("cpu", "cuda") beyond operands and results, by rule."""
    if kind != "cpu":
        rule = OWN_RULES.get(described.target.name()) or _GPU_RULES.get(described.target.overloadpacket)
        return masked_positions(described) + (rule(described, made) if rule else 0)
    held = unseen(described, threads) + masked_positions(described)
    if described.target.overloadpacket in _CONVOLUTIONS and is_plain_product(described, threads):
        return held
    rule = OWN_RULES.get(described.target.name()) or _CPU_RULES.get(described.target.overloadpacket)
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


def _masked_select(described: Signature, made: list[Layout]) -> int:
    """The mask as it counts its ones, four bytes an element, beside the longest result."""
    return 4 * described.operands()[1].numel + 64


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


def _loss_block(described: Signature, made: list[Layout]) -> int:
    """A block of logits, its copy in a narrow dtype, and the sum of such a weight gradient in float32."""
    hidden, weight = described.operands()[:2]
    classes, narrow = weight.shape[0], hidden.dtype.itemsize < 4
    block = described.args[6] * classes * (4 + (hidden.dtype.itemsize if narrow else 0))
    return block + (3 * weight.nbytes if narrow and described.args[7][1] else 0)


def _sorted_rows(described: Signature, made: list[Layout]) -> int:
    """The rows of two matrices, sorted: both operands, or an operand and the result; and how many there are of each.
    Small products of narrow numbers have everything in float32 besides; of large ones oneDNN copies operands."""
    first, second = described.operands()[:2]
    products = described.target.name() == EXPERT_PRODUCTS
    other, third = (made[0], second) if products else (second, made[0])
    counts = third.shape[0]
    dtype = working_dtype(first.dtype, first.device, first.shape[0] * third.numel // counts**2)
    more = 0
    if dtype != first.dtype:
        more = dtype.itemsize * (first.numel + other.numel + third.numel)
    elif first.dtype in _NARROW and first.device == "cpu":
        more = 3 * first.nbytes + 2 * _ONEDNN_CALL  # at most, all rows with one expert: 2.8 times were seen
    return first.nbytes + other.nbytes + more + 8 * counts


def _dense_copies(described: Signature, made: list[Layout]) -> int:
    """oneDNN's GELU takes dense rows: an operand that is expanded or transposed is copied, and the result with it."""
    strided = [x for x in described.operands() if x.shape and x.numel > 1 and (x.stride[-1] != 1 or x.extent < x.numel)]
    return 2 * made[0].nbytes if strided else 0


_Rule = Callable[[Signature, list[Layout]], int]

# Of memplan's own ops, on every device.
OWN_RULES: dict[str, _Rule] = {
    BLOCKED_LOSS: _loss_block,
    EXPERT_PRODUCTS: _sorted_rows,
    EXPERT_SUMS: _sorted_rows,
}
_CONVOLUTIONS = {aten.convolution, aten.convolution_backward}
_CPU_RULES: dict[Any, _Rule] = {
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten.native_batch_norm_backward: _first_result,
    aten.native_dropout: _first_result,
    aten.gelu: _dense_copies,
    aten.gelu_backward: _dense_copies,
    aten.logsumexp: _first_operand,
    aten.mse_loss: _first_operand,
    aten.masked_select: _masked_select,
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

"""Which aten ops a fused region may hold."""

from __future__ import annotations

import torch
from torch import fx

from memplan.codegen.region import TensorType
from memplan.errors import UnsupportedError

# Named by overload packet; what torch tags as pointwise need not be listed.
_REDUCTIONS = [
    "sum",
    "mean",
    "amax",
    "amin",
    "var",
    "var_mean",
    "std",
    "any",
    "all",
    "logsumexp",
    "linalg_vector_norm",
    "_softmax",
    "_safe_softmax",
    "_softmax_backward_data",
    "_log_softmax",
    "_log_softmax_backward_data",
    "native_layer_norm",
    "native_layer_norm_backward",
    "_fused_rms_norm",
    "_fused_rms_norm_backward",
    "native_group_norm",
    "native_group_norm_backward",
    "native_batch_norm",
    "native_batch_norm_backward",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training",
    "batch_norm_backward",
    "_batch_norm_with_update_functional",
    "nll_loss_forward",
    "nll_loss_backward",
    "nll_loss2d_forward",
    "nll_loss2d_backward",
    "mse_loss",
    "mse_loss_backward",
    "smooth_l1_loss",
    "smooth_l1_loss_backward",
    "binary_cross_entropy",
    "binary_cross_entropy_backward",
]
_CREATIONS = [
    "full",
    "zeros",
    "ones",
    "full_like",
    "zeros_like",
    "ones_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "scalar_tensor",
    "arange",
    "iota",
]
_MOVES = [
    "clone",
    "_to_copy",
    "convert_element_type",
    "copy",
    "lift_fresh_copy",
    "cat",
    "stack",
    "constant_pad_nd",
    "slice_backward",
    "select_backward",
    "slice_scatter",
    "select_scatter",
    "expand_copy",
    "repeat",
    "triu",
    "tril",
    "masked_fill",
    "where",
    "gather",
    "gelu",
    "gelu_backward",
    "silu",
    "silu_backward",
    "threshold_backward",
    "tanh_backward",
    "sigmoid_backward",
    "leaky_relu_backward",
    "hardtanh_backward",
    "hardswish_backward",
    "elu_backward",
    "softplus_backward",
    "native_dropout_backward",
    "addcmul",
    "addcdiv",
    "lerp",
    "glu",
]
_OVER_SEVERAL_DTYPES = ("native_layer_norm", "native_layer_norm_backward")  # these regions compute as the kernels do
_ON_THE_CPU = ("embedding",)  # a loop nest of Triton's reads its operands where it stands
_NAMES = frozenset((*_REDUCTIONS, *_CREATIONS, *_MOVES))


def is_fusible(node: fx.Node) -> bool:
    """Whether a node that makes memory may join a region: a known functional op on dense tensors of fixed size."""
    target = node.target
    if (
        node.op != "call_function"
        or not isinstance(target, torch._ops.OpOverload)
        or target.namespace not in _NAMESPACES
    ):
        return False
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    name = target.overloadpacket.__name__
    known = torch.Tag.pointwise in target.tags or name in _NAMES
    if not known and not (_is_on_cpu(node) and (name in _ON_THE_CPU or is_thin_product(node))):
        return False
    if "norm" in name and name not in _OVER_SEVERAL_DTYPES and mixes_dtypes(node):
        return False
    return all(_is_plain(n) for n in (node, *node.all_input_nodes))


def is_pointwise(node: fx.Node) -> bool:
    """Whether what may join a region has one result and is not listed as a reduction: a region may repeat it freely."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or len(target._schema.returns) > 1:
        return False
    return target.overloadpacket.__name__ not in _REDUCTIONS and not is_thin_product(node)


def mixes_dtypes(node: fx.Node) -> bool:
    """Whether a norm has operands of several floating dtypes, as under autocast: torch's CPU kernels then return statistics
    in the dtype of the parameters, Inductor's code in that of the operand, and one would be read as the other."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return len({v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()}) > 1


def is_thin_product(node: fx.Node) -> bool:
    """Whether a matrix product is one by a row or a column, and takes no longer than its call: state-space models have
    one a token."""
    if node.target not in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
        return False
    left, right = (n.meta["val"] for n in node.all_input_nodes * (3 - len(node.all_input_nodes)))
    rows, terms, columns = left.shape[-2], left.shape[-1], right.shape[-1]
    if not all(type(extent) is int for extent in (*left.shape, columns)):
        return False
    return 1 in (rows, terms, columns) and left.numel() * columns <= _CALL


_CALL = 1 << 16  # multiplications of one core in the 3 us of a call
_NAMESPACES = ("aten", "prims")


def _is_on_cpu(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


def _is_plain(node: fx.Node) -> bool:
    """Dense real tensors with sizes known now."""
    value = node.meta.get("val")
    try:
        types = [TensorType.of(v) for v in (value if isinstance(value, (list, tuple)) else [value]) if v is not None]
    except UnsupportedError:
        return False
    return all(not t.dtype.is_complex and t.numel > 0 for t in types)

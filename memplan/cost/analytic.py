"""Cost from a device profile alone: a roofline over FLOPs and bytes, plus the launch.

Williams, Waterman, Patterson: Roofline: an insightful visual performance model (CACM 2009). Needs neither the device
nor memory. FLOPs of products, convolutions and attention are torch's own count (torch.utils.flop_counter).
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from memplan.cost import Cost
from memplan.cost.signature import Layout, Signature, results, signature
from memplan.cost.workspace import ONEDNN_LINEAR, is_channels_last, workspace
from memplan.devices import DeviceProfile

aten = torch.ops.aten

# Nanoseconds that arithmetic on one element costs one CPU core, beyond its traffic (benchmarks/op_costs.py, float32 and
# bfloat16, AVX-512). A GPU hides this behind its memory.
_CPU_ELEMENT_NS = {
    aten.exp: 0.5,
    aten.log: 0.5,
    aten.pow: 0.5,
    aten.sigmoid: 0.7,
    aten.silu: 0.7,
    aten.silu_backward: 1.0,
    aten.gelu: 0.5,
    aten.gelu_backward: 1.5,
    aten.erf: 1.0,
    aten.tanh: 1.8,
    aten.sin: 1.5,
    aten.cos: 1.5,
    aten._softmax: 0.8,
    aten._safe_softmax: 2.0,
    aten._log_softmax: 1.2,
    aten._log_softmax_backward_data: 0.8,
    aten.logsumexp: 1.5,
    aten.var_mean: 6.0,
    aten.var: 6.0,
    aten.cumsum: 1.2,
    aten.max_pool2d_with_indices: 4.0,
    aten.avg_pool2d: 1.0,
    aten.upsample_nearest2d: 2.0,
    aten.upsample_bilinear2d: 2.0,
    aten.upsample_bilinear2d_backward: 2.0,
    aten.rand: 5.0,
    aten.rand_like: 5.0,
    aten.randn: 5.0,
    aten.randn_like: 5.0,
    aten.bernoulli: 12.0,
    aten.native_dropout: 13.0,
    aten.topk: 4.0,
    aten.sort: 60.0,
}
_IMAGE_OPS = {aten.max_pool2d_with_indices, aten.avg_pool2d, aten.upsample_nearest2d, aten.upsample_bilinear2d}
# Attention over (batch, tokens, heads, width): position of the query, and FLOPs a query element and key (two products
# forward, five backward). Ragged batches, whose tokens stand in one row, count as one sequence.
_ATTENTION = {
    aten._flash_attention_forward: (0, 4),
    aten._efficient_attention_forward: (0, 4),
    aten._flash_attention_backward: (1, 10),
    aten._efficient_attention_backward: (1, 10),
}
# Convolutions in groups run far below a CPU's rate: position of the groups among the arguments, and how far below.
_CPU_GROUPED = {aten.convolution: (8, 2.0), aten.convolution_backward: (9, 20.0)}
# A CPU kernel that walks an operand against its order pays this for an element; a copy is written for the case.
_CPU_CROSSED_NS, _CPU_CROSSED_COPY_NS = 4.0, 0.9
_COPIES = {aten.clone, aten.copy, aten.copy_, aten._to_copy}
# glibc maps blocks from 32 MiB on anew each time (DEFAULT_MMAP_THRESHOLD_MAX), and the first touch of each of their
# pages enters the kernel: 2 us a page of 4 KiB where this was measured, most of a large pointwise op's time.
_CPU_MAPPED_FROM, _CPU_FAULT_S_PER_BYTE = 32 * 1024**2, 2e-6 / 4096
# Ops that touch only the rows they are asked for, not the whole of their first operand.
_LOOKUPS = {aten.embedding, aten.index, aten._unsafe_index, aten.gather, aten.index_select, aten.nll_loss_forward}


class AnalyticCost:
    """Prices any aten op in microseconds and bytes for the device of a profile."""

    def __init__(self, profile: DeviceProfile) -> None:
        self.profile = profile
        on_cpu = profile.kind == "cpu"
        # A CPU profile holds one core's rates; eight cores saturate a socket's memory.
        self.cores = torch.get_num_threads() if on_cpu else 1
        self.bandwidth = profile.bandwidth * min(self.cores, 8)

    def cost(self, node: fx.Node) -> Cost:
        """The cost of one run; nothing for placeholders, getitems and views."""
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or is_view(target):
            return Cost()
        return self.estimate(signature(node), results(node))

    def estimate(self, described: Signature, made: list[Layout]) -> Cost:
        """The same from a signature and the layouts of its results."""
        packet, operands = described.target.overloadpacket, described.operands()
        held = workspace(described, made, self.profile.kind, self.cores)
        compute = flops(described, made) / (self._rate(operands or made) * self.cores)
        moved = traffic(packet, operands, made) / self.bandwidth
        if self.profile.kind == "cpu" and packet in _CPU_GROUPED and described.args[_CPU_GROUPED[packet][0]] > 1:
            compute *= _CPU_GROUPED[packet][1]
        seconds = max(compute, moved)
        if self.profile.kind == "cpu":
            seconds += _cpu_extra(packet, operands, made, held) / self.cores
        return Cost(self.profile.launch + seconds * 1e6, round_up(held, self.profile.granularity))

    def _rate(self, operands: list[Layout]) -> float:
        rates = self.profile.flops
        for layout in operands:
            name = str(layout.dtype).removeprefix("torch.")
            if name in rates:
                return rates[name]
        return rates["float32"]


def flops(described: Signature, made: list[Layout]) -> float:
    """Floating-point operations of products, convolutions and attention; 0 for ops that only move bytes."""
    packet = described.target.overloadpacket
    shapes = [_shapes(a) for a in described.args]
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*_with_all_heads(*shapes[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(shapes[0], *_with_all_heads(*shapes[1:4]))
    if described.target.name() == ONEDNN_LINEAR:
        return 2 * prod(shapes[0]) * shapes[1][0]
    if packet in (aten.mv, aten.dot, aten.vdot, aten.addmv):
        return 2 * max(layout.numel for layout in described.operands())
    if packet is aten.convolution_backward:  # each gradient asked for costs what the forward did
        gradient, source, weight = shapes[:3]
        return conv_flop_count(source, weight, gradient, transposed=described.args[7]) * sum(described.args[-1][:2])
    if packet in _ATTENTION:  # heads stand behind tokens here, and torch's count needs data for ragged batches
        first, factor = _ATTENTION[packet]
        query, keys = shapes[first], shapes[first + 1]
        return factor * prod(query) * keys[-3]
    formula = flop_registry.get(packet)
    if formula is None:
        return 0
    out: Any = tuple(m.shape for m in made)
    if len(made) == 1:
        out = made[0].shape
    return formula(*shapes, **{k: _shapes(v) for k, v in described.kwargs}, out_val=out)


def _with_all_heads(query: Any, *others: Any) -> Any:
    """Shapes (batch, heads, tokens, width) as if keys and values had a head for each of the query's, as the products do;
    torch 2.11 does not count the products of fewer."""
    return query, *((batch, query[1], tokens, width) for batch, _, tokens, width in others)


def traffic(packet: Any, operands: list[Layout], made: list[Layout]) -> int:
    """Bytes read and written."""
    written = sum(layout.nbytes for layout in made)
    if packet in _LOOKUPS:
        return 2 * written + sum(layout.nbytes for layout in operands[1:])
    return written + sum(layout.nbytes for layout in operands)


@cache
def is_view(target: Any) -> bool:
    """Whether an aten op returns an alias of an operand and changes nothing."""
    schema = target._schema
    return not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)


def _shapes(described: Any) -> Any:
    if isinstance(described, Layout):
        return described.shape
    if type(described) is tuple:
        return [_shapes(part) for part in described]
    return described


def _cpu_extra(packet: Any, operands: list[Layout], made: list[Layout], held: int) -> float:
    """Seconds one CPU core spends beyond FLOPs and traffic: arithmetic, crossed operands, fresh pages."""
    elements = max((layout.numel for layout in (*made, *operands[:1])), default=0)
    channels_last = packet in _IMAGE_OPS and is_channels_last(operands[0])  # whose kernels are vectorized
    nanoseconds = 0.0 if channels_last else elements * _CPU_ELEMENT_NS.get(packet, 0.0)
    if packet not in flop_registry and any(
        o.shape == m.shape and _order(o) != _order(m) for o in operands for m in made[:1]
    ):
        nanoseconds += elements * (_CPU_CROSSED_COPY_NS if packet in _COPIES else _CPU_CROSSED_NS)
    fresh = sum(size for size in (held, *(layout.nbytes for layout in made)) if size >= _CPU_MAPPED_FROM)
    return nanoseconds * 1e-9 + fresh * _CPU_FAULT_S_PER_BYTE


def _order(layout: Layout) -> tuple[int, ...]:
    """Dimensions from the outermost in memory to the innermost; empty where none is crossed by any order."""
    real = [k for k, size in enumerate(layout.shape) if size > 1 and layout.stride[k]]
    order = sorted(real, key=lambda k: -layout.stride[k])
    return tuple(order) if len(order) > 1 else ()


def round_up(size: int, granularity: int) -> int:
    """Bytes as an allocator hands them out."""
    return -(-size // granularity) * granularity

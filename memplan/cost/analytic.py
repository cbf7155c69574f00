"""Cost from a device profile alone: a roofline over FLOPs and bytes, plus the launch.

Williams, Waterman, Patterson: Roofline: an insightful visual performance model (CACM 2009). Needs neither the device
nor memory. FLOPs of products, convolutions and attention are torch's own count (torch.utils.flop_counter).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from memplan.cost import Cost
from memplan.cost.signature import Layout, Signature, results, signature
from memplan.cost.workspace import workspace
from memplan.devices import DeviceProfile

aten = torch.ops.aten

# Nanoseconds of arithmetic one element costs one CPU core beyond its traffic (torch 2.13, AVX-512 core, 10^7 elements).
# A GPU hides this behind its memory.
_CPU_ELEMENT_NS = {
    aten.exp: 0.6,
    aten.log: 0.8,
    aten.pow: 1.0,
    aten.sigmoid: 1.5,
    aten.silu: 1.5,
    aten.silu_backward: 1.5,
    aten.erf: 2.5,
    aten.gelu: 2.5,
    aten.gelu_backward: 3.5,
    aten.sin: 3.0,
    aten.cos: 3.0,
    aten.tanh: 4.5,
    aten._softmax: 1.5,
    aten._log_softmax: 1.5,
    aten._log_softmax_backward_data: 1.5,
    aten.rand: 9.0,
    aten.rand_like: 9.0,
    aten.randn: 9.0,
    aten.randn_like: 9.0,
    aten.bernoulli: 24.0,
    aten.native_dropout: 28.0,
    aten.cumsum: 1.5,
    aten.sort: 60.0,
    aten.topk: 10.0,
}
# Ops that touch only the rows they are asked for, not the whole of their first operand.
_LOOKUPS = {aten.embedding, aten.index, aten._unsafe_index, aten.gather, aten.index_select}
# A CPU walks a transposed operand about this much slower than a dense one (copies of 40 MB matrices).
_CPU_STRIDED = 3.0


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
        target, operands = described.target, described.operands()
        packet = target.overloadpacket
        compute = flops(described, made) / (self._rate(operands or made) * self.cores)
        moved = traffic(packet, operands, made) / self.bandwidth
        if self.profile.kind == "cpu":
            elements = max((layout.numel for layout in (*made, *operands[:1])), default=0)
            compute += elements * _CPU_ELEMENT_NS.get(packet, 0.0) * 1e-9 / self.cores
            if any(_is_permuted(layout) for layout in operands) and compute == 0:
                moved *= _CPU_STRIDED
        held = workspace(described, made, self.profile.kind, self.cores)
        return Cost(self.profile.launch + max(compute, moved) * 1e6, _round_up(held, self.profile.granularity))

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
        return sdpa_flop_count(*shapes[:3])
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*shapes[:4])
    if packet in (aten.mv, aten.dot, aten.vdot, aten.addmv):
        return 2 * max(layout.numel for layout in described.operands())
    formula = flop_registry.get(packet)
    if formula is None:
        return 0
    out: Any = tuple(m.shape for m in made)
    if packet is aten.convolution_backward:  # counts by position, and a result that nobody wants is missing here
        wanted = iter(out)
        out = tuple(next(wanted) if asked else None for asked in described.args[-1])
    elif len(made) == 1:
        out = made[0].shape
    return formula(*shapes, **{k: _shapes(v) for k, v in described.kwargs}, out_val=out)


def traffic(packet: Any, operands: list[Layout], made: list[Layout]) -> int:
    """Bytes read and written."""
    written = sum(layout.nbytes for layout in made)
    if packet in _LOOKUPS:
        return 2 * written + sum(layout.nbytes for layout in operands[1:])
    return written + sum(layout.nbytes for layout in operands)


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


def _is_permuted(layout: Layout) -> bool:
    """Whether the last of two or more dimensions is not the one that lies together."""
    sizes = [(size, step) for size, step in zip(layout.shape, layout.stride, strict=False) if size > 1]
    return len(sizes) > 1 and sizes[-1][1] > 1 and layout.numel == layout.extent


def _round_up(size: int, granularity: int) -> int:
    return -(-size // granularity) * granularity

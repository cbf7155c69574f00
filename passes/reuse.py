"""Let a kernel write its result over an operand that dies there, where the peak falls by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from memplan import torch_compat
from memplan.build_problem import BUFFER, OP
from memplan.capture import input_nodes, is_getitem, tensors
from memplan.passes.copying import holders
from memplan.passes.schedule import Scheduled
from memplan.problem import Problem

aten = torch.ops.aten

REUSE = "memplan_reuse"  # node meta: the argument that names the operand whose storage becomes the result's

# op -> its out= form that computes straight into what it is given, and the name of that argument. Only forms whose
# kernel reads an element before it writes it: pointwise ones, and softmaxes over the last dimension, which go row by
# row. Generated out= forms (relu, masked_fill, dropout's backward) compute into fresh memory and copy.
OUT_FORMS: dict[object, tuple[torch._ops.OpOverload, str]] = {
    aten.add.Tensor: (aten.add.out, "out"),
    aten.sub.Tensor: (aten.sub.out, "out"),
    aten.mul.Tensor: (aten.mul.out, "out"),
    aten.div.Tensor: (aten.div.out, "out"),
    aten.neg.default: (aten.neg.out, "out"),
    aten.exp.default: (aten.exp.out, "out"),
    aten.sqrt.default: (aten.sqrt.out, "out"),
    aten.rsqrt.default: (aten.rsqrt.out, "out"),
    aten.pow.Tensor_Scalar: (aten.pow.Tensor_Scalar_out, "out"),
    aten.tanh.default: (aten.tanh.out, "out"),
    aten.sigmoid.default: (aten.sigmoid.out, "out"),
    aten.silu.default: (aten.silu.out, "out"),
    aten.where.self: (aten.where.self_out, "out"),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, "grad_input"),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, "grad_input"),
    aten.silu_backward.default: (aten.silu_backward.grad_input, "grad_input"),
    aten.gelu_backward.default: (aten.gelu_backward.grad_input, "grad_input"),
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, "grad_input"),
    aten._softmax.default: (aten._softmax.out, "out"),
    aten._log_softmax.default: (aten._log_softmax.out, "out"),
    aten._softmax_backward_data.default: (aten._softmax_backward_data.out, "grad_input"),
    aten._log_softmax_backward_data.default: (aten._log_softmax_backward_data.out, "out"),
}
_DIMENSION: dict[object, int] = {  # place of the dimension that a softmax goes along; it must be the last
    aten._softmax.default: 1,
    aten._log_softmax.default: 1,
    aten._softmax_backward_data.default: 2,
    aten._log_softmax_backward_data.default: 2,
}


Overlays = dict[int, int]  # op -> bytes of its result that lie over an operand which dies there


def overlays(scheduled: Scheduled, problem: Problem) -> Overlays:
    """The ops whose result may lie over an operand wherever they run in a scheduled graph."""
    found = _Candidates(scheduled).found()
    fails = {node.meta[OP] for node in scheduled.graph_module.graph.nodes if OP in node.meta and node not in found}
    return {i: problem.buffers[node.meta[BUFFER]].size for node in found if (i := node.meta[OP]) not in fails}


def overwriting(scheduled: Scheduled) -> frozenset[fx.Node]:
    """The kernels that may write over an operand."""
    return frozenset(_Candidates(scheduled).found())


def any_overlays(problem: Problem) -> Overlays:
    """More than any order allows: every op whose kernel has such a form."""
    kernels = {str(target) for target in OUT_FORMS}
    results = [(i, op.writes[0]) for i, op in enumerate(problem.ops) if op.target in kernels and op.writes]
    return {i: problem.buffers[b].size for i, b in results}


def overlaid(problem: Problem, overlays: Overlays) -> Problem:
    """The problem as a solver is told it: what lies over an operand takes no memory while its op runs."""
    if not overlays:
        return problem
    ops = [
        replace(op, workspace=op.workspace - overlays[i]) if i in overlays else op for i, op in enumerate(problem.ops)
    ]
    return replace(problem, ops=tuple(ops))


def overwritten(node: fx.Node) -> fx.Node | None:
    """The operand whose storage a node's result takes over."""
    operand = node.kwargs[node.meta[REUSE]] if REUSE in node.meta else None
    return operand if isinstance(operand, fx.Node) else None


@dataclass(frozen=True)
class Reuse:
    """Runs on a scheduled graph. ``loads``: bytes held while each node runs; without a node, at any other instant.

    An operand may be overwritten where nothing reads it later, it fills a storage of its own that a kernel of the same
    part (forward, backward) made, and the result looks like it and stays in that part: what crosses to the backward or
    to the caller is nobody's to overwrite. Each reuse lowers the load of its own step alone, so those are taken whose
    step would otherwise be above the least peak that all of them reach.
    """

    name: ClassVar[str] = "reuse"
    loads: Sequence[tuple[fx.Node | None, int]]

    def apply(self, scheduled: Scheduled, problem: Problem) -> bool:
        """Returns whether the graph changed."""
        found = _Candidates(scheduled).found()
        spared = {node: problem.buffers[node.meta[BUFFER]].size for node in found}
        peak = max((load - (spared.get(node, 0) if node else 0) for node, load in self.loads), default=0)
        chosen = [node for node, load in self.loads if node in found and load > peak]
        for node in chosen:
            node.target, argument = OUT_FORMS[node.target]
            node.kwargs = {**node.kwargs, argument: found[node]}
            node.meta[REUSE] = argument
        if chosen:
            scheduled.graph_module.graph.lint()
            scheduled.graph_module.recompile()
        return bool(chosen)


class _Candidates:
    """Which kernels of a graph may overwrite which operand."""

    def __init__(self, scheduled: Scheduled) -> None:
        *self.nodes, output = scheduled.graph_module.graph.nodes
        self.boundary = scheduled.forward_nodes
        self.holders = holders(self.nodes)
        self.last_use: dict[fx.Node, int] = {}  # of a storage, by the node that holds it first
        for at, node in enumerate((*self.nodes, output)):
            for operand in input_nodes(node):
                self.last_use.update((holder, at) for holder in self.holders[operand])
        self.position = {node: at for at, node in enumerate(self.nodes)}

    def found(self) -> dict[fx.Node, fx.Node]:
        """Kernel → the operand it may overwrite."""
        found = {}
        for at, node in enumerate(self.nodes):
            if OP in node.meta and node.target in OUT_FORMS and self._stays(node) and _goes_row_by_row(node):
                operand = next((a for a in input_nodes(node) if self._dies(a, node, at)), None)
                if operand is not None:
                    found[node] = operand
        return found

    def _stays(self, node: fx.Node) -> bool:
        """Whether nobody outside the node's part looks at its result."""
        at, last = self.position[node], self.last_use.get(node, -1)
        return last >= 0 and self._same_part(at, last) and last < len(self.nodes)

    def _same_part(self, a: int, b: int) -> bool:
        return (a < self.boundary) == (b < self.boundary)

    def _dies(self, operand: fx.Node, node: fx.Node, at: int) -> bool:
        holders = self.holders[operand]
        if len(holders) != 1 or self.last_use[holders[0]] != at or not _alike(operand, node, holders[0]):
            return False
        maker = holders[0].args[0] if is_getitem(holders[0]) else holders[0]
        target = maker.target if isinstance(maker, fx.Node) else None
        made_by_aten = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"  # no alias is hidden
        others = [a for a in input_nodes(node) if a is not operand and holders[0] in self.holders[a]]
        return made_by_aten and self._same_part(self.position[holders[0]], at) and not others


def _alike(operand: fx.Node, node: fx.Node, holder: fx.Node) -> bool:
    """Whether the result fits the operand's memory, element by element, and fills it."""
    a, b, whole = operand.meta.get("val"), node.meta.get("val"), holder.meta.get("val")
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and isinstance(whole, torch.Tensor)):
        return False
    if (a.dtype, a.device, a.shape, a.stride()) != (b.dtype, b.device, b.shape, b.stride()):
        return False
    if any(map(torch_compat.free_symbols, (a, b, whole))):
        return False
    if any(t.is_conj() or t.is_neg() for t in (a, b, whole)):
        return False  # noted on the view: what is written through it would be turned once more
    sizes = [*(t.untyped_storage().nbytes() for t in (a, b, whole)), a.numel() * a.element_size()]
    known = {torch_compat.size_hint(size) for size in sizes}  # numbers of a graph with symbols may be of their type
    return a.storage_offset() == b.storage_offset() == 0 and len(known) == 1


def _goes_row_by_row(node: fx.Node) -> bool:
    """Of a softmax: whether it goes along the last dimension of contiguous operands, in their own precision."""
    place = _DIMENSION.get(node.target)
    if place is None:
        return True
    values: Sequence[torch.Tensor] = [
        *tensors(node.meta["val"]),
        *(t for a in input_nodes(node) for t in tensors(a.meta["val"])),
    ]
    dimension = node.args[place]
    one_dtype = len({value.dtype for value in values}) == 1
    return dimension in (-1, values[0].dim() - 1) and one_dtype and all(value.is_contiguous() for value in values)

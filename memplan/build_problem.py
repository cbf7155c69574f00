"""Captured graph → Problem: storages instead of tensors, kernels instead of nodes.

A node is an *op* when it makes a storage, changes one, or has an effect. Every other node (a view, a getitem, arithmetic
on sizes) costs nothing and is emitted again beside each reader; it never appears in the Problem.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import torch
from torch import fx

from memplan import torch_compat
from memplan.capture import (
    EAGER,
    Capture,
    Input,
    input_nodes,
    is_getitem,
    is_random,
    is_tangent,
    module_path,
    source_line,
    tensors,
)
from memplan.cost import Cost, CostModel
from memplan.problem import Buffer, Category, Op, Phase, Problem, Tier
from memplan.runtime.random import draw, rng_state

OP = "memplan_op"  # node meta: index of the op whose run makes the node's value
BUFFER = "memplan_buffer"  # node meta: the first buffer behind a node's value
RECOMPUTE = "memplan_recompute"  # node meta: True on a run that is not the op's first
CATEGORY = "memplan_category"  # node meta: what the value is to the user, where the graph does not tell
PHASE = "memplan_phase"  # node meta: Phase.OPTIMIZER on what updates a parameter
TANGENTS = "tangents"  # name of the op at which the caller hands the output's gradients to the backward

# glibc maps blocks from this size on by whole pages: without the page that costs, one measured budget of twelve was
# exceeded, by 18,928 bytes of 227 MB.
_MAPPED, _PAGE = 128 << 10, 4096
# What stands for a tensor beside its numbers on a CPU: 200 bytes were measured in a forward, twice as many for a saved
# value. A page covers them; without them a small T5 exceeded its smallest budget by 10,040 bytes of 7 MB. Scalars go
# without: they are few, and the arena knows them by their size.
_OBJECTS = 512

# Operands that only feed results of the same place: running statistics of a batch norm in training and the new ones. What
# copies those back has mostly run before the norm runs again; it is then read for its other results.
STATISTICS_ONLY: dict[object, tuple[int, ...]] = {
    torch.ops.aten._native_batch_norm_legit_functional.default: (3, 4),
}
TRAINING_ARG = 5  # of these ops: whether they normalise by the batch's own statistics

# Results that keep the strides of their first operand: the kernel clones its whole storage, the fake result does not.
_STORAGE_CLONES = {
    torch.ops.aten.copy.default,
    torch.ops.aten.select_scatter.default,
    torch.ops.aten.slice_scatter.default,
    torch.ops.aten.diagonal_scatter.default,
    torch.ops.aten.as_strided_scatter.default,
}


@dataclass(frozen=True)
class BuiltProblem:
    """A Problem and the way back to the graph it was read from."""

    capture: Capture
    problem: Problem
    nodes: tuple[
        tuple[fx.Node, ...], ...
    ]  # per op: the kernel's node, then its getitems; tangent placeholders for TANGENTS
    buffer_of: dict[fx.Node, tuple[int, ...]]  # the buffers behind each node's tensors
    eager: Mapping[int, int] = field(default_factory=dict)  # bytes that eager keeps in place of some buffers

    @cached_property
    def as_eager(self) -> BuiltProblem:
        """The step as it runs without memplan: on a CPU dropout keeps its mask as numbers, not as a byte an element."""
        buffers = tuple(
            replace(buffer, size=self.eager.get(b, buffer.size)) for b, buffer in enumerate(self.problem.buffers)
        )
        return replace(self, problem=replace(self.problem, buffers=buffers)) if self.eager else self

    @cached_property
    def op_of(self) -> dict[fx.Node, int]:
        """The op whose run makes a node's value; free nodes and inputs are absent."""
        return {node: i for i, nodes in enumerate(self.nodes) for node in nodes}


def build_problem(
    capture: Capture, cost: CostModel, granularity: int, meanwhile: int = 0, tiers: tuple[Tier, ...] = ()
) -> BuiltProblem:
    """``granularity``: the multiple of bytes that the device's allocator hands out; ``meanwhile``: bytes that the rest
    of the model takes between this graph's forward and its backward; ``tiers``: the slower memories it may use."""
    return _Builder(capture, cost, granularity, meanwhile, tiers).build()


def allocated(size: int, device_type: str, granularity: int) -> int:
    """Bytes that the allocator of a device takes for a storage of ``size`` bytes."""
    rounded = -(-size // granularity) * granularity
    return rounded + (_PAGE if device_type == "cpu" and size >= _MAPPED else 0)


class _Builder:
    def __init__(
        self, capture: Capture, cost: CostModel, granularity: int, meanwhile: int, tiers: tuple[Tier, ...]
    ) -> None:
        self.capture, self.cost, self.granularity = capture, cost, granularity
        self.meanwhile, self.tiers = meanwhile, tiers
        self.buffers: list[Buffer] = []
        self.behind: dict[fx.Node, dict[int, int]] = {}  # node -> its fake tensors' storage keys -> buffers
        self.given: dict[int, int] = {}  # storage keys of arguments and constants -> buffers
        self.buffer_of: dict[fx.Node, tuple[int, ...]] = {}
        self.ops: list[Op] = []
        self.nodes: list[tuple[fx.Node, ...]] = []
        self.backward: set[fx.Node] = set()
        self.maker: dict[int, int] = {}  # buffers -> the ops that make them
        self.numbers: dict[fx.Node, set[int]] = {}  # nodes -> ops that numbers they need are read off
        self.draws: set[int] = set()  # ops that read or advance a random generator, or have an effect

    def build(self) -> BuiltProblem:
        graph = self.capture.graph_module.graph
        self._inputs()
        ordered = self._phases([n for n in graph.nodes if n.op in ("call_function", "get_attr")])
        tangents = [n for n in self.capture.placeholders if is_tangent(n)]
        waiting = bool(tangents)
        for node in ordered:
            if waiting and node in self.backward:
                self._tangents(tangents)
                waiting = False
            self._node(node)
        if waiting:
            self._tangents(tangents)
        problem = _with_order(self._problem(), self.draws)
        problem.check()
        for i, nodes in enumerate(self.nodes):
            for node in nodes:
                node.meta[OP] = i
        for node, buffers in self.buffer_of.items():
            if buffers:
                node.meta[BUFFER] = buffers[0]
        eager = {
            b: self._bytes(node.meta[EAGER], dense=False)
            for node in ordered
            if node.target is draw and EAGER in node.meta
            for b in self.buffer_of[node]
        }
        return BuiltProblem(self.capture, problem, tuple(self.nodes), self.buffer_of, eager)

    def _inputs(self) -> None:
        primals = [n for n in self.capture.placeholders if not is_tangent(n)]
        known = self.capture.inputs
        for i, node in enumerate(primals):
            given = known[i] if i < len(known) else Input()
            name = given.name or str(node.target)
            self._storages(node, self.given, given.category, name, given.module)
            if given.home in [tier.name for tier in self.tiers]:
                for b in self.buffer_of[node]:
                    self.buffers[b] = replace(self.buffers[b], home=given.home)

    def _phases(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """Forward nodes first, each part in its stored order; backward is what needs a tangent or is tagged so, and
        updates."""
        self.backward |= {n for n in self.capture.placeholders if is_tangent(n)}
        for node in nodes:
            tagged = node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")
            if tagged or PHASE in node.meta or any(a in self.backward for a in input_nodes(node)):
                self.backward.add(node)
        return sorted(nodes, key=lambda n: n in self.backward)

    def _tangents(self, placeholders: list[fx.Node]) -> None:
        """The output's gradients: made by the caller at the start of the backward, and held by it to the end.

        Each is a tensor of its own, though its fake one may be the output itself, which may look at an input. One that
        the caller does not give is zeros, contiguous; where the backward expects other strides, AOTAutograd copies it.
        """
        copied = 0
        for node in placeholders:
            self._storages(node, {}, Category.GRADIENT, str(node.target))
            if not all(tensor.is_contiguous() for tensor in tensors(node.meta.get("val"))):
                copied += sum(self.buffers[b].size for b in self.buffer_of[node])
        made = tuple(dict.fromkeys(b for n in placeholders for b in self.buffer_of[n]))
        meanwhile = max(self.meanwhile, copied)
        self.ops.append(Op(TANGENTS, TANGENTS, writes=made, workspace=meanwhile, phase=Phase.BACKWARD, once=True))
        self.nodes.append(tuple(placeholders))

    def _node(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self._storages(node, self.given, Category.BUFFER, str(node.target))
            return
        if is_getitem(node):
            self._getitem(node)
            return
        before = len(self.buffers)
        operands = reversed(input_nodes(node))  # where keys clash, the first operand is the one an op looks at
        known = {key: b for a in operands for key, b in self.behind.get(a, {}).items()}
        self._storages(node, known, self._category(node), node.name)
        made = tuple(range(before, len(self.buffers)))
        mutated = tuple(b for a in _mutated_args(node) for b in self.buffer_of[a])
        numbers = {i for a in input_nodes(node) for i in self.numbers.get(a, ())}
        if not made and not mutated and not _has_effect(node):
            if not self.buffer_of[node]:  # a number: the size of a result, or its only element
                numbers |= {
                    self.maker[b] for a in input_nodes(node) for b in self.buffer_of.get(a, ()) if b in self.maker
                }
            self.numbers[node] = numbers
            return
        self.maker |= dict.fromkeys(made, len(self.ops))
        reads = tuple(dict.fromkeys(b for a in input_nodes(node) for b in self.buffer_of.get(a, ())))
        cost = _cost(self.cost, node)
        if is_random(node) or _has_effect(node) or node.target in (rng_state, draw):
            self.draws.add(len(self.ops))
        self.ops.append(
            Op(
                name=node.name,
                target=str(node.target),
                reads=reads,
                writes=made,
                mutates=mutated,
                time=cost.time,
                workspace=cost.workspace + self._lazy_bytes(node),
                phase=self._phase(node),
                once=bool(mutated)
                or _has_effect(node)
                or is_random(node)
                or node.target is rng_state
                or PHASE in node.meta,
                after=tuple(sorted(numbers)),
                module=module_path(node),
                source=source_line(node),
            )
        )
        self.nodes.append((node,))

    def _getitem(self, node: fx.Node) -> None:
        """A getitem of an op's tuple belongs to the op's run: kept apart it would hold the whole tuple."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        keys = {torch_compat.storage_key(t) for t in tensors(node.meta.get("val"))}
        self.behind[node] = {key: b for key, b in self.behind[source].items() if key in keys}
        self.buffer_of[node] = tuple(dict.fromkeys(self.behind[node].values()))
        for b in self.buffer_of[node] if CATEGORY in node.meta else ():
            self.buffers[b] = replace(self.buffers[b], category=node.meta[CATEGORY])
        owner = next((i for i in range(len(self.nodes) - 1, -1, -1) if source in self.nodes[i]), None)
        if owner is not None:
            self.nodes[owner] = (*self.nodes[owner], node)

    def _storages(self, node: fx.Node, known: dict[int, int], category: Category, name: str, module: str = "") -> None:
        """Find the buffers behind a node's tensors: those of ``known``, by storage key, or new ones.

        A result can only look at its op's operands: keys of other nodes are not asked, for a tangent's fake tensor
        may share its key with an argument that it shares no memory with.
        """
        parts = list(tensors(node.meta.get("val")))
        source = view_source(node)
        seen = self.behind[node] = {}
        for k, tensor in enumerate(parts):
            key = torch_compat.storage_key(tensor)
            if key in seen:
                continue
            if key in known:
                seen[key] = known[key]
            elif source is not None:  # its fake tensor may have forgotten whose storage it looks at
                seen[key] = self.buffer_of[source][0]
            else:
                label = name if len(parts) == 1 else f"{name}.{k}"
                size = self._bytes(tensor, dense=is_tangent(node))
                if node.target in _STORAGE_CLONES:
                    size = max(size, self._bytes(cast(fx.Node, node.args[0]).meta["val"], dense=False))
                if known is not self.given and tensor.device.type == "cpu" and self.granularity < size < _MAPPED:
                    size += _OBJECTS
                seen[key] = len(self.buffers)
                self.buffers.append(Buffer(label, size, category, module or module_path(node), source_line(node)))
        if known is self.given:
            self.given.update(seen)
        self.buffer_of[node] = tuple(dict.fromkeys(seen.values()))

    def _lazy_bytes(self, node: fx.Node) -> int:
        """What a kernel takes to resolve operands whose conjugate or negative is only noted on their view."""
        given = {a: t for a in input_nodes(node) for t in tensors(a.meta.get("val"))}
        return sum(self._bytes(t, dense=True) for t in given.values() if t.is_conj() or t.is_neg())

    def _bytes(self, tensor: torch.Tensor, dense: bool) -> int:
        """What the allocator takes for a tensor's storage; ``dense``: for the part of it that the tensor spans."""
        size = torch_compat.size_hint(tensor.untyped_storage().nbytes())
        if dense:
            dims = [
                (torch_compat.size_hint(n), torch_compat.size_hint(s)) for n, s in zip(tensor.shape, tensor.stride())
            ]
            spanned = 1 + sum((n - 1) * step for n, step in dims)
            size = min(size, spanned * tensor.element_size()) if all(n for n, _ in dims) else 0
        return allocated(size, tensor.device.type, self.granularity)

    def _phase(self, node: fx.Node) -> Phase:
        return node.meta.get(PHASE, Phase.BACKWARD if node in self.backward else Phase.FORWARD)

    def _category(self, node: fx.Node) -> Category:
        return node.meta.get(CATEGORY, Category.TEMPORARY if node in self.backward else Category.ACTIVATION)

    def _problem(self) -> Problem:
        outputs = self.capture.outputs
        count = self.capture.forward_outputs
        forward = [b for n in outputs[:count] if isinstance(n, fx.Node) for b in self.buffer_of[n]]
        later = [b for n in outputs[count:] if isinstance(n, fx.Node) for b in self.buffer_of[n]]
        tangents = [b for op in self.ops if op.name == TANGENTS for b in op.writes]
        for kind, members in ((Category.OUTPUT, forward), (Category.GRADIENT, later)):
            for b in members:
                if self.buffers[b].category in (Category.ACTIVATION, Category.TEMPORARY):
                    self.buffers[b] = replace(self.buffers[b], category=kind)
        for b in (*forward, *later):  # the caller holds it from the start
            self.buffers[b] = replace(self.buffers[b], home="")
        self._temporaries(set(forward) | set(later))
        return Problem(
            tuple(self.ops),
            tuple(self.buffers),
            outputs=tuple(dict.fromkeys((*forward, *later, *tangents))),
            forward_outputs=tuple(dict.fromkeys(forward)),
            tiers=self.tiers,
        )

    def _temporaries(self, outputs: set[int]) -> None:
        """A forward buffer that no backward op reads is a temporary, not a saved activation."""
        saved = {b for op in self.ops if op.phase == Phase.BACKWARD for b in op.reads}
        for b, buffer in enumerate(self.buffers):
            if buffer.category == Category.ACTIVATION and b not in saved and b not in outputs:
                self.buffers[b] = replace(buffer, category=Category.TEMPORARY)


def _with_order(problem: Problem, draws: set[int]) -> Problem:
    """Order what the dataflow does not, beside what ops name already: mutations against readers, random draws and
    effects among themselves, the start of the backward against both.

    A reader of a buffer that changes may not run again after the change: an update of the optimizer follows all its
    runs; before another change it becomes ``once``.
    """
    after: dict[int, set[int]] = defaultdict(set)
    after_all: dict[int, set[int]] = defaultdict(set)
    frozen: set[int] = set()
    mutated = {b for op in problem.ops for b in op.mutates}
    users: dict[int, set[int]] = defaultdict(set)  # of a mutated buffer, since its last change
    last_change: dict[int, int] = {}
    last_draw: int | None = None
    start: int | None = None
    for i, op in enumerate(problem.ops):
        after[i].update(op.after)
        for b in mutated.intersection(op.reads):
            if b in last_change:
                after[i].add(last_change[b])
            if b in op.mutates:
                if op.phase == Phase.OPTIMIZER:
                    after_all[i] |= users[b]
                else:
                    after[i] |= users[b]
                    frozen |= users[b]
                last_change[b], users[b] = i, set()
            else:
                users[b].add(i)
        if op.name == TANGENTS:
            start = i
            after[i] |= {j for j in draws if j < i}
        elif start is not None:
            after[i].add(start)
        if i in draws and not op.mutates:
            if last_draw is not None:
                after[i].add(last_draw)
            last_draw = i
    ops = []
    for i, op in enumerate(problem.ops):
        once = op.once or (i in frozen and not _only_statistics_change(problem, i))
        ops.append(replace(op, once=once, after=tuple(sorted(after[i] - {i})), after_all=tuple(sorted(after_all[i]))))
    return replace(problem, ops=tuple(ops))


_STATISTICS_TARGETS = {str(target) for target in STATISTICS_ONLY}
_NEW_STATISTICS = min(min(places) for places in STATISTICS_ONLY.values())  # among such an op's results


def _only_statistics_change(problem: Problem, i: int) -> bool:
    """Whether op ``i`` may run again after its operands have changed: a norm whose new statistics go nowhere but back to
    those operands, or to the norm that goes on from them."""
    op = problem.ops[i]
    if op.target not in _STATISTICS_TARGETS:
        return False
    made = op.writes[_NEW_STATISTICS:]
    readers = [problem.ops[r] for b in made for r in problem.readers[b]]
    back = all(r.target in _STATISTICS_TARGETS or not set(op.reads).isdisjoint(r.mutates) for r in readers)
    return back and set(made).isdisjoint(problem.outputs)


def _cost(model: CostModel, node: fx.Node) -> Cost:
    """Cost of a kernel; a drawn op costs what the op under it costs, and when it is replayed on a CPU the state of the
    generator that it leaves as it found it."""
    if node.target is rng_state:
        return Cost(time=5.0, workspace=0)  # a copy of 5 KB through Python: 3-6 us measured
    if node.target is not draw:
        return model.cost(node)
    state, device, op, *args = node.args
    graph = fx.Graph()
    plain = graph.call_function(op, tuple(args), dict(node.kwargs))  # type: ignore[arg-type]
    plain.meta = node.meta
    cost = model.cost(plain)
    graph.erase_node(plain)  # or its operands would count it among their users
    kept = state.meta["val"].numel() if device == "cpu" else 0  # type: ignore[union-attr]
    return replace(cost, workspace=cost.workspace + kept)


def _schema(node: fx.Node) -> torch.FunctionSchema | None:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _has_effect(node: fx.Node) -> bool:
    """Anything but a plain functional op: higher-order ops, collectives, assertions, ops without tensor results."""
    if not callable(node.target) or isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    schema = _schema(node)
    if schema is None:
        return node.is_impure()
    # fx calls every op that may draw impure, also attention that drops nothing.
    may_draw = torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[attr-defined]
    return schema.is_mutable or "c10d" in schema.name or (node.is_impure() and not may_draw)


def _args_where(node: fx.Node, wanted: Callable[[torch.Argument], bool]) -> list[fx.Node]:
    schema = _schema(node)
    if schema is None:
        return []
    found: list[fx.Node] = []
    for k, argument in enumerate(schema.arguments):
        given = node.args[k] if k < len(node.args) else node.kwargs.get(argument.name)
        if given is not None and wanted(argument):
            fx.node.map_arg(given, found.append)
    return found


def _mutated_args(node: fx.Node) -> list[fx.Node]:
    return _args_where(node, lambda a: a.alias_info is not None and a.alias_info.is_write)


def view_source(node: fx.Node) -> fx.Node | None:
    """The operand a view op looks at, by its schema; None for ops that make their result."""
    if node.target is torch.ops.aten._unsafe_view.default:  # aliases, though its schema does not say so
        return input_nodes(node)[0]
    schema = _schema(node)
    if schema is None or schema.is_mutable or not any(r.alias_info for r in schema.returns):
        return None
    sources = _args_where(node, lambda a: a.alias_info is not None)
    return sources[0] if sources else None

"""Joint graph of loss and gradients → graph of the whole step: each parameter's update stands where its gradient is final."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memplan import torch_compat
from memplan.build_problem import CATEGORY, PHASE, view_source
from memplan.capture import Capture, Input, input_nodes, is_getitem, is_tangent, tensors
from memplan.errors import InputError, UnsupportedError
from memplan.problem import Category, Phase
from memplan.step.update import Update

aten = torch.ops.aten

_HINT = 0.5  # what a scalar is taken for while planning; no kernel's cost depends on it
_CLIP_EPS = 1e-6  # added to the norm, as torch.nn.utils.clip_grad_norm_ does


@dataclass(frozen=True)
class Trained:
    """One parameter that the step updates."""

    name: str
    tensor: torch.Tensor
    primal: int  # which of the graph's arguments it is
    group: int  # of the optimizer's parameter groups
    update: Update
    home: str = ""  # the tier where its states lie between steps; '': the device
    rows: int = 0  # so many at a time are updated, each with states of their own in the plan; 0: all at once

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and last row of each piece; one of (0, 0) where the parameter is updated as a whole."""
        count = len(self.tensor) if self.rows else 0
        return [(first, min(first + self.rows, count)) for first in range(0, count, self.rows or 1)] or [(0, 0)]


@dataclass(frozen=True)
class StepCapture:
    """The graph takes the joint graph's primals, then for each of ``trained`` its states, those of one span after those
    of another, and its scalars. Its outputs are the loss and, where gradients are clipped, their norm."""

    capture: Capture
    trained: tuple[Trained, ...]


def whole_step(
    joint: fx.GraphModule,
    forward_outputs: int,
    inputs: Sequence[Input],
    trained: Mapping[int, Trained],
    max_norm: float | None,
) -> StepCapture:
    """``inputs``: what each primal is; ``trained``: the parameter that a primal is. The graph is changed in place.

    Raises UnsupportedError where the forward has results besides the loss that the caller must see (an input or a
    parameter that the model changes), InputError where the loss is no scalar.
    """
    return _Writer(joint, forward_outputs, inputs, trained).write(max_norm)


class _Writer:
    def __init__(
        self, joint: fx.GraphModule, forward_outputs: int, inputs: Sequence[Input], trained: Mapping[int, Trained]
    ) -> None:
        self.joint, self.graph = joint, joint.graph
        self.output = self.graph.output_node()
        self.results = list(self.output.args[0])  # type: ignore[arg-type]
        self.primals = [n for n in self.graph.nodes if n.op == "placeholder" and not is_tangent(n)]
        self.inputs, self.trained = list(inputs), trained
        self.mode = torch_compat.fake_mode_of([t for n in self.primals for t in tensors(n.meta.get("val"))])
        self.meta: dict[str, Any] = {}
        if forward_outputs != 1:
            raise UnsupportedError("the model changes a parameter or an input while it runs")

    def write(self, max_norm: float | None) -> StepCapture:
        self._start_backward()
        gradients = self._gradients()
        self.output.args = ([self.results[0], *gradients.values()],)
        self.output.meta.pop("desc", None)
        self.graph.eliminate_dead_code()
        self.output.args = ([self.results[0]],)
        wanted = {k: self.trained[k] for k in gradients}
        operands = {k: self._operands(k, one) for k, one in wanted.items()}
        ready = self._ready(gradients)
        factor = None if max_norm is None else self._clip(list(gradients.values()), max_norm)
        for k, one in wanted.items():
            self._write_behind(ready[k] if factor is None else self.output.prev, one.name)
            for span, given in zip(one.spans, operands[k], strict=True):
                parameter, gradient = self._rows(self.primals[k], span), self._rows(gradients[k], span)
                if factor is not None:
                    gradient = self.emit(aten.mul.Tensor, gradient, factor)
                one.update.emit(self.emit, parameter, gradient, given)
        self.graph.lint()
        self.joint.recompile()
        return StepCapture(Capture(self.joint, 1, tuple(self.inputs), training=False), tuple(wanted.values()))

    def _start_backward(self) -> None:
        """The loss's own gradient is 1; nobody hands it in."""
        for tangent in [n for n in self.graph.nodes if is_tangent(n)]:
            value = tangent.meta["val"]
            if value.numel() != 1:
                raise InputError(f"a step needs a scalar loss; this one has the shape {tuple(value.shape)}")
            first = min(tangent.users, key=list(self.graph.nodes).index)
            with self.graph.inserting_before(first):
                one = self.graph.call_function(aten.full.default, (list(value.shape), 1.0))
            one.kwargs = {"dtype": value.dtype, "device": value.device}
            one.meta = {"val": value, "partitioner_tag": "is_backward"}
            tangent.replace_all_uses_with(one)
            self.graph.erase_node(tangent)

    def _gradients(self) -> dict[int, fx.Node]:
        """The gradient of each trained parameter that has one; the maker of its storage is told so."""
        found = {k: g for k, g in enumerate(self.results[1:]) if k in self.trained and isinstance(g, fx.Node)}
        for k, gradient in found.items():
            if gradient.meta["val"].dtype != self.trained[k].tensor.dtype:
                raise UnsupportedError(f"the gradient of {self.trained[k].name} has another dtype than it")
            _root(gradient).meta[CATEGORY] = Category.GRADIENT
        return found

    def _operands(self, k: int, one: Trained) -> list[dict[str, fx.Node]]:
        """Placeholders of a parameter's states and scalars, for each of its spans."""
        found: list[dict[str, fx.Node]] = []
        last = next(n for n in reversed(self.graph.nodes) if n.op == "placeholder")
        whole = self.primals[k].meta["val"]
        with self.graph.inserting_before(last.next):
            for first, end in one.spans:
                shape, rows = (whole, "") if not end else (whole[first:end], f"[{first}:{end}]")
                found.append({name: self.graph.placeholder(f"{name}_{k}_{first}") for name in one.update.states})
                for name, node in found[-1].items():
                    with self.mode:
                        node.meta["val"] = torch.empty_like(shape, requires_grad=False)
                    self.inputs.append(Input(Category.OPTIMIZER, f"{one.name}.{name}{rows}", one.home))
            for name in one.update.scalars:
                scalar = self.graph.placeholder(f"{name}_{k}")
                scalar.meta["val"] = _HINT
                self.inputs.append(Input(Category.INPUT, f"{one.name}.{name}"))
                for given in found:
                    given[name] = scalar
        return found

    def _rows(self, node: fx.Node, span: tuple[int, int]) -> fx.Node:
        return self.emit(aten.slice.Tensor, node, 0, *span) if span[1] else node

    def _ready(self, gradients: Mapping[int, fx.Node]) -> dict[int, fx.Node]:
        """For each parameter the node after which nothing reads it and its gradient is final."""
        position = {node: at for at, node in enumerate(self.graph.nodes)}
        readers: dict[int, fx.Node] = {}  # of a storage, the last one; parameters may share one
        for node in self.graph.nodes:
            if node is not self.output:
                looked_at = (t for a in input_nodes(node) for n in (a, _root(a)) for t in tensors(n.meta.get("val")))
                readers.update((torch_compat.storage_key(t), node) for t in looked_at)
        found = {}
        for k, gradient in gradients.items():
            last = readers.get(torch_compat.storage_key(self.primals[k].meta["val"]), gradient)
            found[k] = max(last, gradient, key=position.__getitem__)
        return found

    def _clip(self, gradients: Sequence[fx.Node], max_norm: float) -> fx.Node:
        """What every gradient is scaled by, as in torch.nn.utils.clip_grad_norm_: no update comes before all are made."""
        if len({(g.meta["val"].device, g.meta["val"].dtype) for g in gradients}) > 1:
            raise UnsupportedError("gradients on several devices, or of several dtypes, cannot be clipped together")
        self._write_behind(self.output.prev, "")
        norms = [self.emit(aten.linalg_vector_norm.default, g, 2.0) for g in gradients]
        total = self.emit(aten.linalg_vector_norm.default, self.emit(aten.stack.default, norms), 2.0)
        ratio = self.emit(aten.reciprocal.default, self.emit(aten.add.Tensor, total, _CLIP_EPS))
        self.output.args = ([*self.output.args[0], total],)  # type: ignore[misc]
        return self.emit(aten.clamp.default, self.emit(aten.mul.Tensor, ratio, max_norm), max=1.0)

    def _write_behind(self, node: fx.Node, name: str) -> None:
        """From here on, ops are written behind ``node`` and belong to the parameter ``name``."""
        self.before = node.next
        self.meta = {PHASE: Phase.OPTIMIZER, "nn_module_stack": {"": (name.rpartition(".")[0], None)}}

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call; its fake result tells the storages."""
        given: Any = fx.node.map_arg(args, lambda n: n.meta["val"])
        named: Any = fx.node.map_arg(kwargs, lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            value = target(*given, **named)
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = self.meta | {"val": value}
        return node


def _root(node: fx.Node) -> fx.Node:
    """The node whose storage a view looks at; through a getitem of a tuple of views, too."""
    while True:
        source = node.args[0] if is_getitem(node) else view_source(node)
        if not isinstance(source, fx.Node) or (is_getitem(node) and view_source(source) is None):
            return node
        node = source

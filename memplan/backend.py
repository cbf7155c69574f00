"""``torch.compile(model, backend="memplan", options={"memory_budget": "24GiB"})``."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memplan import torch_compat
from memplan.capture import Capture, check_supported, is_tangent
from memplan.cost import cost_model
from memplan.devices import profile_for
from memplan.errors import MemplanError, UnsupportedError
from memplan.lower import lower
from memplan.options import Options
from memplan.passes.normalise import Normalise
from memplan.passes.split import Split
from memplan.planner import Planned, plan_capture
from memplan.problem import Category
from memplan.runtime.execute import Executable

log = logging.getLogger("memplan")

_recent: deque[Planned] = deque(maxlen=16)


def recent_plans() -> tuple[Planned, ...]:
    """What this process planned last, oldest first: plan, Program and predicted timeline of each compiled graph."""
    return tuple(_recent)


def memplan(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The dynamo backend. Raises OptionError before anything compiles, BudgetInfeasibleError at the first call."""
    try:
        graph = _Graph(Options.resolve(options, mode), input_categories(graph_module))
        backend = torch_compat.aot_backend(
            forward=graph.forward, backward=graph.backward, inference=graph.inference, partition=graph.partition
        )
        return backend(graph_module, example_inputs)
    except MemplanError as error:
        return _raising(error)


def _raising(error: MemplanError) -> Callable[..., Any]:
    """Raised at the call: dynamo would wrap what a backend raises while it compiles in an error of its own."""

    def refuse(*_: Any) -> Any:
        raise error

    return refuse


class _Graph:
    """One graph of dynamo's: planned when AOTAutograd asks for the partition, lowered when it asks for the compile."""

    def __init__(self, options: Options, categories: Sequence[Category]) -> None:
        self.options = options
        self.categories = categories
        self.planned: Planned | None = None

    def partition(
        self, joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **keywords: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        try:
            check_supported(joint)
            Normalise().apply(joint)
            planned = self._plan(Capture(joint, num_fwd_outputs, primal_categories(joint, self.categories)))
        except UnsupportedError as reason:
            _warn_unplanned(reason)
            return torch_compat.default_partition(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **keywords)
        return Split(num_fwd_outputs).apply(planned.scheduled, joint)

    def forward(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return self._lower(graph_module, inputs, len(graph_module.graph.nodes))

    def backward(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return self._lower(graph_module, inputs, 0)

    def inference(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        outputs = len(next(reversed(graph_module.graph.nodes)).args[0])  # type: ignore[arg-type]
        try:
            check_supported(graph_module)
            categories = primal_categories(graph_module, self.categories)
            planned = self._plan(Capture(graph_module, outputs, categories, training=False))
        except UnsupportedError as reason:
            _warn_unplanned(reason)
            return torch_compat.unplanned(graph_module, inputs)
        return Executable(planned.scheduled.graph_module, planned.lowered)

    def _plan(self, capture: Capture) -> Planned:
        profile = profile_for(self.options.target or device_type(capture))
        cost = cost_model(self.options.runtime_estimator, profile)
        self.planned = plan_capture(capture, self.options, cost, profile.granularity)
        _recent.append(self.planned)
        return self.planned

    def _lower(self, graph_module: fx.GraphModule, inputs: Sequence[Any], forward_nodes: int) -> Callable[..., Any]:
        if self.planned is None:
            return torch_compat.unplanned(graph_module, inputs)
        return Executable(graph_module, lower(graph_module, self.planned.problem, forward_nodes))


def _warn_unplanned(reason: UnsupportedError) -> None:
    log.warning("memplan runs a graph unplanned, its memory is not limited: %s", reason)


def input_categories(graph_module: fx.GraphModule) -> list[Category]:
    """Category of each placeholder of dynamo's graph, by the name dynamo gives to where it came from."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            name = str(node.target)
            is_parameter = "_parameters_" in name or isinstance(node.meta.get("example_value"), torch.nn.Parameter)
            is_buffer = "_buffers_" in name
            found.append(Category.PARAMETER if is_parameter else Category.BUFFER if is_buffer else Category.INPUT)
    return found


def primal_categories(graph_module: fx.GraphModule, categories: Sequence[Category]) -> list[Category]:
    """The same for AOTAutograd's placeholders, which may be fewer or more than dynamo's."""
    found = []
    for k, node in enumerate(n for n in graph_module.graph.nodes if n.op == "placeholder" and not is_tangent(n)):
        index = getattr(node.meta.get("desc"), "idx", k)
        found.append(categories[index] if index < len(categories) else Category.INPUT)
    return found


def device_type(capture: Capture) -> str:
    """Where the graph computes: "cuda" if any tensor of it lives there, else "cpu"."""
    for node in capture.graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            return value.device.type
    return "cpu"

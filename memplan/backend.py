"""``torch.compile(model, backend="memplan", options={"memory_budget": "24GiB"})``."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import fx

from memplan import torch_compat
from memplan.capture import Capture, Input, check_supported, is_tangent
from memplan.codegen.lowering import default_lowering
from memplan.cost import cost_model
from memplan.devices import profile_for
from memplan.errors import MemplanError, UnsupportedError
from memplan.interrupts import interruptible
from memplan.layouts import FAITHFUL
from memplan.lower import Lowered, lower
from memplan.options import Options
from memplan.passes.attention import FuseAttention
from memplan.passes.channels_last import ChannelsLast
from memplan.passes.chunk import ChunkLoss
from memplan.passes.chunk_mlp import ChunkMLP
from memplan.passes.experts import GroupExperts
from memplan.passes.gradients import DenseGradients
from memplan.passes.heads import GroupedHeads
from memplan.passes.log_softmax import SplitLogSoftmax
from memplan.passes.normalise import Normalise
from memplan.passes.products import ChooseProducts
from memplan.passes.simplify import Simplify
from memplan.passes.split import Split
from memplan.pieces import Model, Models, Piece
from memplan.planner import NOTHING, Elsewhere, plan_capture
from memplan.problem import Category
from memplan.realise import Planned
from memplan.rewrites import Compiled, Rewrite, compile_best
from memplan.runtime import homes, native
from memplan.runtime.arena import Pool, Script
from memplan.runtime.execute import Executable
from memplan.seek import Solved
from memplan.trace import SILENT, Trace

log = logging.getLogger("memplan")

_recent: deque[Planned] = deque(maxlen=16)
_models = Models(Model)


def recent_plans() -> tuple[Planned, ...]:
    """What this process planned last, oldest first: plan, Program and predicted timeline of each compiled graph."""
    return tuple(_recent)


def remember(planned: Planned) -> None:
    """Add to :func:`recent_plans`."""
    _recent.append(planned)


def memplan(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The dynamo backend. Raises OptionError before anything compiles, BudgetInfeasibleError at the first call."""
    try:
        settings = Options.resolve(options, mode)
        if options is None or settings.memory_budget is None:
            return compile_with(graph_module, example_inputs, settings)[0]
        described = graph_inputs(graph_module, example_inputs)

        def compile_piece(settings: Options, elsewhere: Elsewhere, inputs: Sequence[Any]) -> Compiled:
            return compile_with(graph_module, inputs, settings, elsewhere, described=described)

        return Piece(_models.of(options, settings), compile_piece, graph_module, example_inputs)
    except MemplanError as error:
        return raising(error)


def compile_with(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    elsewhere: Elsewhere = NOTHING,
    progress: Callable[[str], None] | None = None,
    described: Sequence[Input] | None = None,
    draft: bool = False,
) -> Compiled:
    """Compile one of dynamo's graphs; what it runs as, and its plan (None for one that runs unplanned).

    ``described``: what its placeholders are, where ``example_inputs`` cannot tell any more; ``draft``: plan it and
    compile nothing, it runs as dynamo captured it."""
    known = graph_inputs(graph_module, example_inputs) if described is None else described
    graph_module = GroupedHeads().apply(graph_module) or graph_module
    with interruptible(progress) as told:
        compiler = _Compiler(options, example_inputs, known, elsewhere, told, draft)
        run, planned = compile_best(graph_module, _rewrites(options), compiler, options.objective == "peak")
    if planned is not None:
        remember(planned)
    return run, planned


def _rewrites(options: Options) -> tuple[Rewrite, ...]:
    if not options.fusion_enabled:
        return ()
    # Torch's own norms of such images sum up roughly: only where all are regions of Inductor's.
    layouts = (ChannelsLast(),) if _makes_inductor_regions(options) else ()
    return (FuseAttention(), *layouts, GroupExperts(), ChunkLoss(), ChunkMLP())


def _makes_inductor_regions(options: Options) -> bool:
    """Whether all that may join regions on the CPU is compiled by Inductor: a plan that offloads has no regions."""
    lowering = options.lowering or default_lowering("cpu")
    return options.fusion_enabled and lowering == "inductor" and "disk" not in options.swap_tiers


def raising(error: MemplanError) -> Callable[..., Any]:
    """Raised at the call: dynamo would wrap what a backend raises while it compiles in an error of its own."""

    def refuse(*_: Any) -> Any:
        raise error

    return refuse


@dataclass(frozen=True)
class _Compiler:
    """What rewrites are weighed with; a problem that comes again is solved once."""

    options: Options
    example_inputs: Sequence[Any]
    inputs: Sequence[Input]
    elsewhere: Elsewhere
    progress: Callable[[str], None] | None
    draft: bool
    solved: Solved = field(default_factory=dict)

    def outline(self, graph_module: fx.GraphModule) -> Planned | None:
        return self._run(graph_module, self.options.without_budget(), estimated=True)[1]

    def budget(self, outline: Planned) -> int | None:
        return self.options.budget(outline.plan.unplanned_peak + self.elsewhere.held)

    def estimate(self, graph_module: fx.GraphModule, budget: int | None) -> Planned | None:
        return self._run(graph_module, self._under(budget), estimated=True)[1]

    def compile(self, graph_module: fx.GraphModule, budget: int | None) -> Compiled:
        return self._run(graph_module, self._under(budget), estimated=False)

    def _under(self, budget: int | None) -> Options:
        options = self.options
        return options if budget is None else replace(options, memory_budget=budget + int(options.reserved))

    def _run(self, graph_module: fx.GraphModule, options: Options, estimated: bool) -> Compiled:
        kind = _Draft if estimated or self.draft else _Graph
        graph = kind(options, self.inputs, self.elsewhere, self.progress, self.solved, estimated)
        backend = torch_compat.aot_backend(
            forward=graph.forward,
            backward=graph.backward,
            inference=graph.inference,
            partition=graph.partition,
            decompositions=FAITHFUL,
        )
        try:
            return backend(graph_module, self.example_inputs), graph.planned
        except _Drafted:
            return graph_module, graph.planned


class _Graph:
    """One graph of dynamo's: planned when AOTAutograd asks for the partition, lowered when it asks for the compile."""

    def __init__(
        self,
        options: Options,
        inputs: Sequence[Input],
        elsewhere: Elsewhere,
        progress: Callable[[str], None] | None,
        solved: Solved,
        estimated: bool,
    ) -> None:
        self.options = options
        self.inputs = inputs
        self.elsewhere, self.progress = elsewhere, progress
        self.solved, self.estimated = solved, estimated
        self.trace = SILENT if estimated else Trace.of(options)
        self.planned: Planned | None = None
        self.pool: Pool | None = None

    def partition(
        self, joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **keywords: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        try:
            check_supported(joint)
            self.trace.graph("joint", joint)
            Normalise().apply(joint)
            Simplify().apply(joint)
            inputs = primal_inputs(joint, self.inputs)
            parameters = [k for k, given in enumerate(inputs) if given.category == Category.PARAMETER]
            DenseGradients(num_fwd_outputs, parameters).apply(joint)
            self.trace.graph("normalised", joint)
            planned = self._plan(Capture(joint, num_fwd_outputs, inputs))
        except UnsupportedError as reason:
            warn_unplanned(reason)
            return torch_compat.default_partition(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **keywords)
        forward, backward = Split(num_fwd_outputs).apply(planned.scheduled, joint)
        self.trace.graph("forward", forward)
        self.trace.graph("backward", backward)
        return forward, backward

    def forward(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return self._lower(graph_module, inputs, len(graph_module.graph.nodes))

    def backward(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return self._lower(graph_module, inputs, 0)

    def inference(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        outputs = len(graph_module.graph.output_node().args[0])  # type: ignore[arg-type]
        try:
            check_supported(graph_module)
            self.trace.graph("captured", graph_module)
            Simplify().apply(graph_module)
            primals = primal_inputs(graph_module, self.inputs)
            planned = self._plan(Capture(graph_module, outputs, primals, training=False))
        except UnsupportedError as reason:
            warn_unplanned(reason)
            return torch_compat.unplanned(graph_module, inputs)
        return Executable(planned.scheduled.graph_module, planned.lowered, self._script(planned.lowered, begins=True))

    def _plan(self, capture: Capture) -> Planned:
        device = device_type(capture)
        profile = profile_for(self.options.target or device)
        cost = cost_model(self.options.runtime_estimator, profile)
        if self.options.fusion_enabled and ChooseProducts(cost).apply(capture.graph_module):
            self.trace.graph("products", capture.graph_module)
        in_regions = device == "cpu" and _makes_inductor_regions(self.options) and self.options.recompute_enabled
        if in_regions and SplitLogSoftmax().apply(capture.graph_module):
            self.trace.graph("log-softmax", capture.graph_module)
        self.planned = plan_capture(
            capture,
            self.options,
            cost,
            profile.granularity,
            self.elsewhere,
            self.progress,
            self.trace,
            self.solved,
            self.estimated,
        )
        self.pool = pool_of(self.planned) if device == "cpu" else None
        return self.planned

    def _lower(self, graph_module: fx.GraphModule, inputs: Sequence[Any], forward_nodes: int) -> Callable[..., Any]:
        if self.planned is None:
            return torch_compat.unplanned(graph_module, inputs)
        lowered = lower(graph_module, self.planned.lowered_problem, forward_nodes)
        return Executable(graph_module, lowered, self._script(lowered, begins=forward_nodes > 0))

    def _script(self, lowered: Lowered, begins: bool) -> Script | None:
        return None if self.pool is None else Script(self.pool, lowered.program, begins)


class _Drafted(Exception):
    """Ends a compilation at the plan: what AOTAutograd would do next takes a sixth of an analysis's time."""


class _Draft(_Graph):
    """A graph that is planned and not compiled."""

    def _plan(self, capture: Capture) -> Planned:
        super()._plan(capture)
        raise _Drafted


def pool_of(planned: Planned) -> Pool | None:
    """The arenas of a plan that has a layout, where torch's allocator can be led."""
    if planned.layout is None or native.library() is None:
        return None
    parts = 2 if planned.built.capture.training else 1
    return Pool(planned.lowered.program, planned.layout, parts, planned.budget)


def warn_unplanned(reason: UnsupportedError) -> None:
    log.warning("memplan runs a graph unplanned, its memory is not limited: %s", reason)


def graph_inputs(graph_module: fx.GraphModule, example_inputs: Sequence[Any] = ()) -> list[Input]:
    """What each placeholder of dynamo's graph is, by the name dynamo gives to where it came from; of parameters also
    where they lie, by ``example_inputs``."""
    found = []
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    for node, example in zip_longest(placeholders, example_inputs[: len(placeholders)]):
        name = str(node.target)
        is_parameter = "_parameters_" in name or isinstance(node.meta.get("example_value"), torch.nn.Parameter)
        is_buffer = "_buffers_" in name
        category = Category.PARAMETER if is_parameter else Category.BUFFER if is_buffer else Category.INPUT
        home = homes.tier_of(example) if is_parameter else ""
        found.append(Input(category, input_name(torch_compat.dynamo_source(node)), home))
    return found


def input_name(source: str) -> str:
    """``L['self']._modules['h']._modules['0']._parameters['weight']`` → ``h.0.weight``; ``L['x']`` → ``x``.

    ``fn`` is what torch calls a model whose forward is torch's own, as that of an nn.Sequential."""
    parts = re.findall(r"\['([^']+)'\]", source)
    return ".".join(parts[1:] if len(parts) > 1 and parts[0] in ("self", "fn") else parts)


def primal_inputs(graph_module: fx.GraphModule, inputs: Sequence[Input]) -> list[Input]:
    """The same for AOTAutograd's placeholders, which may be fewer or more than dynamo's."""
    found = []
    for k, node in enumerate(n for n in graph_module.graph.nodes if n.op == "placeholder" and not is_tangent(n)):
        index = getattr(node.meta.get("desc"), "idx", k)
        found.append(inputs[index] if index < len(inputs) else Input())
    return found


def device_type(capture: Capture) -> str:
    """Where the graph computes: "cuda" if any tensor of it lives there, else "cpu"."""
    for node in capture.graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            return value.device.type
    return "cpu"

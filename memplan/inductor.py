"""The second door: ``memplan.enable_inductor(memory_budget="24GiB")``. Inductor makes the kernels of every training
graph; what is kept, what runs again and in which order is memplan's decision.

For callers that cannot name a backend, Hugging Face's Trainer for one: what they compile with plain ``torch.compile``
follows the plan. Graphs without a backward are Inductor's alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from torch import fx

import memplan
from memplan import torch_compat
from memplan.backend import device_type, graph_inputs, primal_inputs, raising, remember, warn_unplanned
from memplan.capture import Capture, Input, check_supported
from memplan.cost import cost_model
from memplan.devices import profile_for
from memplan.errors import MemplanError, OptionError, UnsupportedError
from memplan.options import Options
from memplan.passes.gradients import DenseGradients
from memplan.passes.split import Split
from memplan.pieces import Models
from memplan.planner import Elsewhere, plan_capture
from memplan.problem import Category
from memplan.realise import Planned
from memplan.watch import WatchedModel, WatchedPiece

Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]

_enabled: list[Enabled] = []
_models = Models(WatchedModel)


class Enabled:
    """Inductor follows memplan's plans until :meth:`disable`, or until the end of the ``with`` block.

    It applies to what is compiled meanwhile, and torch.compile compiles at the first call. Of several, the last counts.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        _enabled.append(self)
        torch_compat.intercept_inductor(_compile)

    def disable(self) -> None:
        """Leave Inductor to itself again; what was compiled keeps its plan."""
        if self in _enabled:
            _enabled.remove(self)
        if not _enabled:
            torch_compat.intercept_inductor(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def enable_inductor(memory_budget: int | str | None = None, **options: Any) -> Enabled:
    """Plan what ``torch.compile`` compiles with Inductor from now on: a call, or a context manager.

    ``memory_budget`` in bytes, as text ("24GiB") or as a share of the unplanned peak ("60%"); ``options`` are those of
    the ``memplan`` backend, dotted ones as ``**{"recompute.enabled": False}``. Regions, their lowering, reuse in place
    and the arena are Inductor's business here: fusion.enabled, lowering, reuse.enabled and placement.enabled change
    nothing.

    Raises OptionError. The compiled call raises BudgetInfeasibleError. Once compiled, one step is measured; where
    Inductor's own choices took it over the budget it is planned anew, twice at most, and then a warning says by how much.
    """
    settings = Options.resolve(options | {"memory_budget": memory_budget})
    if settings.memory_budget is None and settings.objective != "peak":
        raise OptionError('enable_inductor needs a memory_budget, or objective="peak"')
    return Enabled(settings)


def _compile(
    door: object, inductor: Compile, graph_module: fx.GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Stands in for Inductor where dynamo hands it a graph. ``door``: one for all the graphs of a torch.compile."""
    options = _enabled[-1].options

    def compile_piece(
        settings: Options, elsewhere: Elsewhere, inputs: Sequence[Any]
    ) -> tuple[Callable[..., Any], Planned | None]:
        partition = Partition(settings, graph_inputs(graph_module), elsewhere)
        with torch_compat.partition_by(partition, partition.uuid):
            run = inductor(graph_module, inputs)
        if partition.planned is not None:
            remember(partition.planned)
        return run, partition.planned

    try:
        return WatchedPiece(_models.of(door, options), compile_piece, graph_module, inputs)
    except MemplanError as error:
        return raising(error)


class Partition:
    """Cuts one joint graph as its plan says. ``planned``: that plan, None for a graph that Inductor cuts itself."""

    def __init__(self, options: Options, inputs: Sequence[Input], elsewhere: Elsewhere) -> None:
        self.options, self.inputs, self.elsewhere = options, inputs, elsewhere
        self.planned: Planned | None = None

    @property
    def uuid(self) -> str:
        """Names everything but the graph that the plan depends on."""
        given = repr((memplan.__version__, self.options, list(self.inputs), self.elsewhere))
        return f"memplan-{hashlib.sha256(given.encode()).hexdigest()}"

    def __call__(
        self, joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **keywords: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        try:
            check_supported(joint)
            inputs = primal_inputs(joint, self.inputs)
            parameters = [k for k, given in enumerate(inputs) if given.category == Category.PARAMETER]
            DenseGradients(num_fwd_outputs, parameters).apply(joint)
            self.planned = self._plan(Capture(joint, num_fwd_outputs, inputs))
        except UnsupportedError as reason:
            warn_unplanned(reason)
            return torch_compat.min_cut_partition(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **keywords)
        return Split(num_fwd_outputs).apply(self.planned.scheduled, joint)

    def _plan(self, capture: Capture) -> Planned:
        profile = profile_for(self.options.target or device_type(capture))
        cost = cost_model(self.options.runtime_estimator, profile)
        unused = {"fusion_enabled": False, "placement_enabled": False, "reuse_enabled": False, "swap_enabled": False}
        options = replace(self.options, **unused)  # type: ignore[arg-type]
        return plan_capture(capture, options, cost, profile.granularity, self.elsewhere)

"""``step = memplan.compile_step(model, loss_fn, optimizer, memory_budget="4GiB")``; ``loss = step(*args, **kwargs)``."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memplan import torch_compat
from memplan.backend import device_type, graph_inputs, memplan, pool_of, primal_inputs, raising, remember
from memplan.capture import check_supported, is_tangent
from memplan.cost import cost_model
from memplan.devices import profile_for
from memplan.errors import InputError, MemplanError, OptionError, UnsupportedError
from memplan.interrupts import interruptible
from memplan.layouts import FAITHFUL
from memplan.options import Options
from memplan.passes.normalise import Normalise
from memplan.passes.simplify import Simplify
from memplan.planner import plan_capture
from memplan.problem import Phase, Problem
from memplan.realise import Planned
from memplan.runtime.arena import Script
from memplan.runtime.execute import Executable
from memplan.step.capture import StepCapture, Trained, whole_step
from memplan.step.shelf import SMALL, Shelf, rows_apart, rows_of
from memplan.step.update import updates_of

log = logging.getLogger("memplan")

Loss = Callable[[Any, Any], torch.Tensor]


def compile_step(
    model: torch.nn.Module,
    loss_fn: Loss | None,
    optimizer: torch.optim.Optimizer,
    *,
    memory_budget: int | str | None = None,
    max_grad_norm: float | None = None,
    states: str = "device",
    **options: Any,
) -> Step:
    """One call for forward, backward and the optimizer's update, all inside ``memory_budget``.

    ``step(*args, **kwargs)`` returns the detached loss. With a ``loss_fn`` the last positional argument is what the
    output is compared with: ``loss_fn(model(*args[:-1], **kwargs), args[-1])``. With None the model returns its loss:
    a scalar, or an object or a mapping with a ``loss``. ``max_grad_norm``: clip the gradients to this 2-norm; their norm
    before is ``step.gradient_norm`` after each step.

    ``memory_budget`` (bytes, "4GiB", or "60%" of the unplanned peak) bounds parameters, optimizer state, inputs and
    everything between. Each update runs once its gradient is final and nobody reads the old parameter any more, and the
    gradient dies there; with clipping all gradients must exist at once. SGD, Adam and AdamW of torch.optim are traced in
    their ``foreach=False`` form and give its bits; learning rate and every other number of a parameter group are read at
    each step, the state is the optimizer's own. Any other optimizer, a model with graph breaks, and hooks run as usual
    behind a planned forward and backward, with one warning; the optimizer's state then stands outside the budget.

    ``states="disk"``: the optimizer's state lies in an unnamed file in ``swap.directory`` between its uses, all but that of
    small parameters; each update has its part brought in ahead and sent back, that of a large parameter piece by piece.
    Needs a budget, and parameters on the CPU.

    Gradients do not outlive the step: ``.grad`` stays None, and parameters that the optimizer does not have get none. To
    accumulate gradients over batches, call the backend and the optimizer yourself. Other shapes, modes or flags are
    planned at their first call. An error in the middle of a step leaves some parameters updated and others not.

    Raises OptionError and InputError at once; BudgetInfeasibleError at the first call.
    """
    given = dict(options) | {"memory_budget": memory_budget}
    settings = Options.resolve(given)
    _check_arguments(model, loss_fn, optimizer)
    if max_grad_norm is not None and max_grad_norm <= 0:
        raise OptionError(f"max_grad_norm must be positive, not {max_grad_norm}")
    if states not in ("device", "disk"):
        raise OptionError(f'states must be "device" or "disk", not {states!r}')
    if states == "disk":
        _check_disk(settings, optimizer)
    return Step(model, loss_fn, optimizer, given, settings, max_grad_norm, home="disk" if states == "disk" else "")


class Step:
    """A compiled training step. ``planned``: the plan of the shapes captured last; None before, and without one."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss_fn: Loss | None,
        optimizer: torch.optim.Optimizer,
        given: Mapping[str, Any],
        options: Options,
        max_norm: float | None,
        home: str = "",
    ) -> None:
        self.planned: Planned | None = None
        self.gradient_norm: torch.Tensor | None = None
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer
        self._given, self._options, self._max_norm, self._home = given, options, max_norm, home
        self._form: object = None  # of the optimizer, that ``_whole`` was captured with
        self._captured: list[tuple[Executable, list[int], tuple[Trained, ...]]]
        self._whole: Callable[..., torch.Tensor] = self._fresh()
        self._usual: Callable[..., torch.Tensor] | None = None  # the loss alone, where the whole step cannot be traced
        self._names = self._checked_names()

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._loss_fn is not None and not args:
            raise InputError("with a loss_fn the last positional argument is the target; there is none")
        if self._usual is None:
            try:
                return self._in_one(args, kwargs)
            except (UnsupportedError, torch_compat.Unsupported) as reason:
                log.warning(
                    "memplan plans forward and backward alone, the optimizer runs as usual: %s", _first_line(reason)
                )
                self.planned = None
                self._usual = self._compiled(memplan, options=self._given)
        return self._one_after_the_other(self._usual, args, kwargs)

    def _in_one(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        form = [(id(p), index, update) for p, (index, update) in updates_of(self._optimizer).items()]
        if form != self._form:
            self._names, self._form, self._whole = self._checked_names(), form, self._fresh()
        if any(p.grad is not None for group in self._optimizer.param_groups for p in group["params"]):
            raise InputError("a parameter has a gradient already, which this step would ignore; call zero_grad() first")
        with torch.enable_grad():
            try:
                return self._whole(self._model, self._loss_fn, *args, **kwargs)
            except torch_compat.FailOnRecompileLimitHit:  # forget all shapes met so far
                self._whole = self._fresh()
                return self._whole(self._model, self._loss_fn, *args, **kwargs)

    def _one_after_the_other(
        self, compiled: Callable[..., torch.Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        with torch.enable_grad():
            loss = compiled(self._model, self._loss_fn, *args, **kwargs)
            loss.backward()
        if self._max_norm is not None:
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            self.gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _fresh(self) -> Callable[..., Any]:
        self._captured = []
        me = weakref.ref(self)  # dynamo never forgets a backend

        def capture(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            step = me()
            assert step is not None
            return step._capture(graph_module, inputs)

        return self._compiled(capture, fullgraph=True, dynamic=False)

    def _compiled(self, backend: Callable[..., Any], **keywords: Any) -> Callable[..., Any]:
        return torch.compile(torch_compat.with_own_code(_loss), backend=backend, **keywords)

    def _capture(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Dynamo's backend: its graph computes the loss, what is returned makes a step."""
        try:
            step, places = self._trace(graph_module, inputs)
            profile = profile_for(self._options.target or device_type(step.capture))
            cost = cost_model(self._options.runtime_estimator, profile)
            with interruptible() as told:
                planned = plan_capture(step.capture, self._options, cost, profile.granularity, progress=told)
            _check_updates(planned.problem)
        except MemplanError as error:
            return raising(error)
        remember(planned)
        self.planned = planned
        pool = pool_of(planned) if profile.kind == "cpu" else None
        script = None if pool is None else Script(pool, planned.lowered.program, begins=True)
        executable = Executable(planned.scheduled.graph_module, planned.lowered, script)
        number, me = len(self._captured), weakref.ref(self)  # dynamo never forgets what it compiled
        self._captured.append((executable, places, step.trained))

        def run(*given: Any) -> tuple[torch.Tensor]:
            whole = me()
            assert whole is not None
            return (whole._run(number, given),)

        return run

    def _run(self, number: int, given: Sequence[Any]) -> torch.Tensor:
        executable, places, trained = self._captured[number]
        args = [given[k] for k in places]
        groups, states = self._optimizer.param_groups, self._optimizer.state
        shelf = Shelf(trained, states, self._options.swap_directory)
        for one in trained:
            if args[one.primal] is not one.tensor:
                raise InputError(f"parameter {one.name} is another tensor now; compile the step anew")
            # torch.optim makes no entry for a parameter whose update keeps nothing; ``states`` is a defaultdict.
            state = states[one.tensor] if one.update.states else {}
            scalars = one.update.begin(one.tensor, groups[one.group], state)
            shelf.send_home(one, state)
            args += [rows_of(state[name], *span) for span in one.spans for name in one.update.states]
            args += scalars
        try:
            with torch.no_grad(), torch_compat.without_autocast():
                loss, *norm = executable(args)
        except BaseException as error:
            error.add_note("The training step ended in its middle: some parameters may be updated and others not.")
            raise
        for one in trained:
            if one.update.states:
                one.update.end(states[one.tensor])
        self.gradient_norm = norm[0] if norm else None
        torch_compat.count_step(self._optimizer)
        return loss

    def _trace(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[StepCapture, list[int]]:
        """The whole step as a graph, and which of dynamo's inputs its primals are."""
        found = torch_compat.joint_graph(graph_module, inputs, FAITHFUL)
        if found is None:
            raise InputError("the loss does not depend on any parameter that requires a gradient")
        joint, forward_outputs = found
        check_supported(joint)
        Normalise().apply(joint)
        Simplify().apply(joint)
        updates = updates_of(self._optimizer)
        places = _places(joint)
        apart = sum(p.nbytes for p in updates if p.nbytes >= SMALL)
        trained = {}
        for k, place in enumerate(places):
            parameter = inputs[place]
            if isinstance(parameter, torch.Tensor) and parameter in updates:
                index, update = updates[parameter]
                home = self._home if parameter.nbytes >= SMALL else ""
                rows = rows_apart(parameter, apart) if home else 0
                trained[k] = Trained(self._names[parameter], parameter, k, index, update, home, rows)
        kinds = primal_inputs(joint, graph_inputs(graph_module))
        named = [kind._replace(name=trained[k].name) if k in trained else kind for k, kind in enumerate(kinds)]
        return whole_step(joint, forward_outputs, named, trained, self._max_norm), places

    def _checked_names(self) -> dict[torch.Tensor, str]:
        """Every parameter that a step may train, by its path; a loss may have some, too."""
        modules = [m for m in (self._loss_fn, self._model) if isinstance(m, torch.nn.Module)]
        names: dict[torch.Tensor, str] = {p: name for m in modules for name, p in m.named_parameters()}
        for index, group in enumerate(self._optimizer.param_groups):
            for k, parameter in enumerate(group["params"]):
                if parameter not in names:
                    raise InputError(f"parameter {k} of the optimizer's group {index} is not one of the model's")
        return names


def _check_updates(problem: Problem) -> None:
    """No value is read after its update: a view that hides whose storage it looks at would be."""
    changed: set[int] = set()
    for op in problem.ops:
        if op.phase == Phase.OPTIMIZER:
            changed.update(op.mutates)
        elif not changed.isdisjoint(op.reads):
            raise UnsupportedError(f"{op.name} ({op.source or op.module}) reads a parameter after its update")


def _first_line(reason: Exception) -> str:
    return next(iter(str(reason).splitlines()), type(reason).__name__)


def _check_arguments(model: object, loss_fn: object, optimizer: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if loss_fn is not None and not callable(loss_fn):
        raise InputError(f"loss_fn must be a function of output and target, or None; got {type(loss_fn).__name__}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(f"{type(optimizer).__name__} asks for a closure that computes the loss again; a step has none")


def _check_disk(options: Options, optimizer: torch.optim.Optimizer) -> None:
    if options.memory_budget is None and options.objective != "peak":
        raise OptionError('states="disk" needs a memory_budget; without one everything may stay on the device')
    if not options.swap_enabled:
        raise OptionError('states="disk" and swap.enabled=False cannot be given together')
    if any(p.device.type != "cpu" for group in optimizer.param_groups for p in group["params"]):
        raise OptionError('states="disk" needs parameters on the CPU')


def _loss(self: torch.nn.Module, loss_fn: Loss | None, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What dynamo traces; ``self`` is the model, so that sources of its parameters read like those of its methods."""
    if loss_fn is not None:
        return loss_fn(self(*args[:-1], **kwargs), args[-1])
    output = self(*args, **kwargs)
    if isinstance(output, torch.Tensor):
        return output
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if loss is None:
        raise InputError(f"the model returns no loss but a {type(output).__name__}; give a loss_fn")
    return loss


def _places(joint: fx.GraphModule) -> list[int]:
    primals = [n for n in joint.graph.nodes if n.op == "placeholder" and not is_tangent(n)]
    return [getattr(n.meta.get("desc"), "idx", k) for k, n in enumerate(primals)]

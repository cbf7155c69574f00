"""Plan and analyse a model without running it: its tensors are fake, so neither memory nor a device is needed."""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memplan import torch_compat
from memplan.analysis import Analysis, FrontierPoint, alive, relative_source
from memplan.backend import compile_with
from memplan.build_problem import TANGENTS, allocated
from memplan.capture import is_tangent
from memplan.cost.analytic import AnalyticCost
from memplan.decisions import decisions_of
from memplan.devices import DeviceProfile, profile_for
from memplan.eager import Made, forward_lifetimes, held_by_names
from memplan.errors import BudgetInfeasibleError, InputError, MemplanError
from memplan.optimizers import Optimizer, Trained, with_update
from memplan.options import Options
from memplan.passes.coverage import coverage
from memplan.planner import plan_frontier
from memplan.plans import Plan
from memplan.problem import Category
from memplan.program import Program
from memplan.realise import Planned, unplanned
from memplan.simulate import simulate
from memplan.solving import stored_plan
from memplan.units import parse_budget

log = logging.getLogger("memplan")


def plan(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    memory_budget: int | str | None = None,
    training: bool = True,
    **options: Any,
) -> Plan:
    """The plan that ``torch.compile(model, backend="memplan", options=…)`` would follow, without running the model.

    ``memory_budget`` in bytes, as text ("24GiB") or as a share of the unplanned peak ("60%"). Raises OptionError,
    BudgetInfeasibleError, and InputError for a model that cannot be traced.
    """
    settings = Options.resolve(dict(options) | {"memory_budget": memory_budget})
    return _largest(_trace(model, args, kwargs or {}, training, settings)).plan


def analyze(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    training: bool = True,
    optimizer: str | None = None,
    target: str | None = None,
    memory_budget: int | str | None = None,
    time_limit: float | None = None,
    frontier_points: int = 0,
    effort: float | None = None,
    name: str = "",
    progress: Callable[[str], None] | None = None,
) -> Analysis:
    """What one step holds and when, predicted from shapes alone.

    ``optimizer``: "sgd", "momentum", "adam" or "adamw", as torch.optim runs it by default on the device, or in a form
    that is named ("adamw:for-loop", "adamw:foreach", "adamw:fused"): its state and its update are part of the step;
    ``target``: a device profile to predict for; ``memory_budget``: analyse the planned step beside the unplanned one;
    ``frontier_points``: plans for that many budgets between the unplanned peak and the smallest feasible one;
    ``effort``: multiple of the solvers' default.
    """
    profile = profile_for(target or "cpu")
    update = None
    if optimizer is not None and training:
        update = _UpdateOf(model, Optimizer.parse(optimizer, profile.kind), profile)
    settings = Options.resolve(
        {
            "memory_budget": memory_budget,
            "target": target,
            "runtime_estimator": "analytic",
            "solver_time_limit_s": time_limit,
            "placement.enabled": False,
            "reserved": update.state_bytes if update else 0,
        }
        | ({} if effort is None else {"solver_work": effort})
    )

    def trace(settings: Options) -> list[Planned]:
        return _trace(model, args, kwargs or {}, training, settings, progress)

    refused: BudgetInfeasibleError | None = None
    try:
        graphs = trace(settings)
    except BudgetInfeasibleError as error:
        if update is None:
            raise
        refused, graphs = error, trace(settings.without_budget())
    main = _largest(graphs)
    eager = unplanned(main.built, settings)
    # A backward begins when the forward's code has returned and its names are gone: the peak of training knows none.
    whole_forward = not training and len(graphs) == 1
    before = held_by_names(eager, _forward_lifetimes(model, args, kwargs or {})) if whole_forward else eager.program
    step = _Step(before, update, update.trained(main) if update else ())
    if memory_budget is not None:
        step.check(memory_budget, refused)
    notes = (
        () if len(graphs) == 1 else (f"{len(graphs)} graphs (graph breaks); shown is the one with the largest peak",)
    )
    if memory_budget is not None:
        notes = (*notes, str(coverage(main.scheduled, main.problem, main.plan.budget)))
    planned, whole = None, step.before
    if memory_budget is not None:
        whole = step.of(main.lowered.program)
        planned = replace(step.beside(main.plan), peak=simulate(whole).peak)
    return Analysis.of(
        whole,
        planned,
        step.before if memory_budget is not None else None,
        name=name,
        target=target or "cpu",
        decisions=decisions_of(main.problem, main.plan) if memory_budget is not None else (),
        frontier=_frontier(main, frontier_points, settings, step, progress),
        notes=notes,
        threads=torch.get_num_threads() if profile.kind == "cpu" else None,
    )


class _UpdateOf:
    """An optimizer's update of a model's parameters on a device."""

    def __init__(self, model: torch.nn.Module, optimizer: Optimizer, profile: DeviceProfile) -> None:
        self.optimizer, self.profile = optimizer, profile
        self._bandwidth = AnalyticCost(profile).bandwidth
        self._rank = {p: k for k, p in enumerate(model.parameters())}
        self._named = dict(model.named_parameters(remove_duplicate=False))

    @property
    def state_bytes(self) -> int:
        """Bytes that the optimizer keeps between steps, as the allocator rounds them."""
        sizes = (
            allocated(p.untyped_storage().nbytes(), "cpu", self.profile.granularity)
            for p in self._rank
            if p.requires_grad
        )
        return len(self.optimizer.states) * sum(sizes)

    def trained(self, planned: Planned) -> tuple[Trained, ...]:
        """The parameters of a joint graph that get a gradient, in the order in which the optimizer has them."""
        capture, buffer_of = planned.built.capture, planned.built.buffer_of
        primals = [n for n in capture.placeholders if not is_tangent(n)]
        gradients = capture.outputs[capture.forward_outputs :]
        found = []
        for primal, given, gradient in zip(primals, capture.inputs, gradients, strict=False):
            if given.category == Category.PARAMETER and isinstance(gradient, torch.fx.Node):
                names = [planned.problem.buffers[buffer_of[n][0]].name for n in (primal, gradient)]
                found.append((given.name, Trained(names[0], names[1], str(primal.meta["val"].dtype))))
        last = len(self._rank)
        found.sort(key=lambda one: self._rank[self._named[one[0]]] if one[0] in self._named else last)
        return tuple(one for _, one in found)

    def time(self, moved: int) -> float:
        """Microseconds of a kernel that reads and writes so many bytes."""
        return self.profile.launch + 1e6 * moved / self._bandwidth


class _Step:
    """The whole step around a graph's forward and backward: what its optimizer keeps, and its update."""

    def __init__(self, before: Program, update: _UpdateOf | None, trained: tuple[Trained, ...]) -> None:
        self._update, self._trained = update, trained
        self._reserved = update.state_bytes if update else 0
        self.before = self.of(before)
        self.state = sum(self.before.storages[s].size for s in self.before.resident) - sum(
            before.storages[s].size for s in before.resident
        )
        self.done = len(before.steps)  # forward and backward have ended
        replayed = simulate(self.before)
        self.update_peak = max(replayed.loads[self.done :], default=0)
        self.update_time = sum(step.time for step in self.before.steps[self.done :])
        self.peak = replayed.peak

    def of(self, program: Program) -> Program:
        """The Program with the update behind it."""
        if self._update is None:
            return program
        kept = {one.gradient for one in self._trained}
        handed = [s for step in program.steps if step.name == TANGENTS for s in step.makes]
        gone = [s for s in handed if program.storages[s].name not in kept]
        return with_update(program, self._update.optimizer, self._trained, gone, self._update.time)

    def check(self, memory_budget: int | str, refused: BudgetInfeasibleError | None) -> None:
        """Raise BudgetInfeasibleError where forward and backward were ``refused``, or the update holds more bytes."""
        budget = parse_budget(memory_budget, self.peak)
        if refused is None and self.update_peak <= budget:
            return
        smallest = bound = self.update_peak
        if refused is not None:
            smallest = max(smallest, (refused.smallest or 0) + self._reserved)
            bound = max(bound, refused.bound + self.state)
            if smallest > self.update_peak:
                raise BudgetInfeasibleError(budget, smallest, bound, refused.tightest, refused.alive) from None
        replayed = simulate(self.before)
        at = replayed.loads.index(self.update_peak, self.done)
        raise BudgetInfeasibleError(budget, smallest, bound, self.before.steps[at].name, alive(replayed, at)) from None

    def beside(self, plan: Plan) -> Plan:
        """The plan of forward and backward as a plan of the whole step."""
        return replace(
            plan,
            budget=None if plan.budget is None else plan.budget + self._reserved,
            peak=max(plan.peak + self.state, self.update_peak),
            peak_bound=max(plan.peak_bound + self.state, self.update_peak),
            unplanned_peak=self.peak,
            time=plan.time + self.update_time,
            bound=plan.bound + self.update_time,
            unplanned_time=plan.unplanned_time + self.update_time,
        )


@dataclass(frozen=True)
class _Fake:
    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _trace(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    training: bool,
    options: Options,
    progress: Callable[[str], None] | None = None,
) -> list[Planned]:
    """Compile the model over fake tensors; every graph is planned as it is captured."""
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(args, (tuple, list)):
        raise InputError(f"the model's positional inputs are a tuple or a list, not a {type(args).__name__}: (x,)")
    model = torch_compat.uncompiled(model)
    if any(map(torch.nn.parameter.is_lazy, (*model.parameters(), *model.buffers()))):
        raise InputError("the model has lazy layers, whose shapes the first forward settles: run one before")
    mode = torch_compat.fake_mode_of([*model.parameters(), *model.buffers()])
    fake = _fake(model, args, kwargs, mode)
    planned: list[Planned] = []
    refused: list[BudgetInfeasibleError] = []

    def backend(graph_module: Any, inputs: Any) -> Any:
        try:
            run, found = compile_with(graph_module, inputs, options, progress=progress, draft=True)
            planned.extend([found] if found is not None else [])
            whole = len(planned) == 1 and not torch_compat.breaks(graph_module)
            return (lambda *_: torch_compat.fake_results(graph_module)) if whole else run
        except BudgetInfeasibleError as error:
            refused.append(error)
            raise

    with mode, torch.set_grad_enabled(training), torch_compat.many_recompiles():
        try:
            # Static: a size that another analysis saw before must not turn one of this one's into a symbol.
            torch.compile(torch_compat.unmet(fake.model), backend=backend, dynamic=False)(*fake.args, **fake.kwargs)
        except torch_compat.BackendCompilerFailed as error:
            if refused:
                raise refused[0] from None
            raise InputError(f"the model cannot be traced: {error}") from error
        except MemplanError:
            raise
        except Exception as error:  # the model's own code may raise anything
            raise InputError(_forward_failure(error)) from error
    if not planned:
        raise InputError(
            "nothing to plan: torch.compile captured no graph of this model, as with torch.nn.LSTM or sparse tensors; "
            "TORCH_LOGS=graph_breaks shows where it gave up"
        )
    return planned


def _forward_lifetimes(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Made]:
    """Of the tensors that the model's own forward makes when nothing compiles it."""
    model = torch_compat.uncompiled(model)
    mode = torch_compat.fake_mode_of([*model.parameters(), *model.buffers()])
    fake = _fake(model, args, kwargs, mode)
    with mode:
        return forward_lifetimes(lambda: fake.model(*fake.args, **fake.kwargs))


def _forward_failure(error: Exception) -> str:
    """Where the model's code failed and why, in a line; dynamo says it in thirty."""
    told = str(error)
    frames = [(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+), in ', told)]
    if not frames:
        frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    ours, torchs = (f"{Path(module.__file__ or '').parent}{os.sep}" for module in (sys.modules[__name__], torch))
    since = max((k for k, (file, _) in enumerate(frames) if file.startswith(ours)), default=-1) + 1
    places = [f"{file}:{line}" for file, line in frames[since:] if not file.startswith((torchs, "<"))]
    where = f" at {relative_source(places[-1])}" if places else ""
    inner = re.search(r"got (\w+\(.*\))$", told, re.MULTILINE)
    cause = inner[1] if inner else f"{type(error).__name__}: {told.partition(chr(10))[0]}"
    if isinstance(error, torch_compat.DataDependentOutputException):
        cause = "it asks a tensor for its value, where an analysis has only shapes"
    return f"the model's forward failed{where}: {cause}"


def _fake(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], mode: torch_compat.FakeTensorMode
) -> _Fake:
    """A copy of the model that shares no memory with it: every tensor is replaced by a fake one while copying."""

    def convert(value: Any) -> Any:
        return torch_compat.to_fake(mode, value) if isinstance(value, torch.Tensor) else value

    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(t): convert(t) for t in tensors}
    tree_map = torch.utils._pytree.tree_map
    return _Fake(copy.deepcopy(model, memo), tuple(tree_map(convert, tuple(args))), tree_map(convert, dict(kwargs)))


def _largest(graphs: Sequence[Planned]) -> Planned:
    if len(graphs) > 1:
        log.warning("the model breaks into %d graphs; this is the plan of the largest", len(graphs))
    return max(graphs, key=lambda p: p.plan.peak)


def _frontier(
    main: Planned, points: int, options: Options, step: _Step, progress: Callable[[str], None] | None
) -> tuple[FrontierPoint, ...]:
    """Peak and time of plans of the whole step, from the smallest feasible budget found up to the unplanned peak; a
    budget whose plan is no faster than that of a smaller one makes no point."""
    if points < 2:
        return ()
    problem, highest = main.problem, stored_plan(main.problem)
    # Below what the update holds no plan of forward and backward lowers the step's peak.
    plans = plan_frontier(main, options, points, step.update_peak - step.state, progress)
    found: list[FrontierPoint] = []
    for own in (*plans, highest):
        p = step.beside(own)
        while found and p.time < found[-1].time and p.peak <= found[-1].peak:
            found.pop()  # a search under a larger budget may find a plan that a smaller one would have kept
        if not found or p.time < found[-1].time or own is highest and p.peak > found[-1].peak:  # else no better
            point = FrontierPoint(p.budget or p.peak, p.peak, p.time, p.bound, p.status, decisions_of(problem, own))
            found.append(point)
    return tuple(found)

"""Plan and analyse a model without running it: its tensors are fake, so neither memory nor a device is needed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from memplan import torch_compat
from memplan.analysis import Analysis, FrontierPoint
from memplan.backend import compile_with
from memplan.decisions import decisions_of
from memplan.errors import BudgetInfeasibleError, InputError, OptionError
from memplan.options import Options
from memplan.outcome import Limits
from memplan.passes.coverage import coverage
from memplan.planner import Planned, realise, stored_plan
from memplan.plans import Plan
from memplan.problem import Category
from memplan.program import Program, Storage

log = logging.getLogger("memplan")

# Floats an optimizer keeps for every float of a parameter (torch.optim's own state, without amsgrad).
OPTIMIZER_STATES = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}


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

    ``optimizer``: one of OPTIMIZER_STATES, whose state is counted as resident; ``target``: a device profile to predict
    for; ``memory_budget``: analyse the planned step beside the unplanned one; ``frontier_points``: plans for that many
    budgets between the unplanned peak and the smallest feasible one; ``effort``: multiple of the solvers' default.
    """
    states = _optimizer_states(optimizer) if training else 0
    reserved = states * sum(p.numel() * p.element_size() for p in model.parameters())
    settings = Options.resolve(
        {
            "memory_budget": memory_budget,
            "target": target,
            "runtime_estimator": "analytic",
            "solver_time_limit_s": time_limit,
            "placement.enabled": False,
            "reserved": reserved,
        }
        | ({} if effort is None else {"solver_work": effort})
    )
    graphs = _trace(model, args, kwargs or {}, training, settings, progress)
    main = _largest(graphs)
    notes = (
        () if len(graphs) == 1 else (f"{len(graphs)} graphs (graph breaks); shown is the one with the largest peak",)
    )
    if memory_budget is not None:
        notes = (*notes, str(coverage(main.scheduled, main.problem, main.plan.budget)))
    before = realise(main.built, stored_plan(main.problem), settings).lowered.program
    shown = main.lowered.program if memory_budget is not None else before
    return Analysis.of(
        _with_optimizer(shown, states),
        _beside(main.plan, reserved) if memory_budget is not None else None,
        _with_optimizer(before, states) if memory_budget is not None else None,
        name=name,
        target=target or "cpu",
        decisions=decisions_of(main.problem, main.plan) if memory_budget is not None else (),
        frontier=_frontier(main, frontier_points, settings, reserved, progress),
        notes=notes,
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
    mode = torch_compat.fake_mode_of([*model.parameters(), *model.buffers()])
    fake = _fake(model, args, kwargs, mode)
    planned: list[Planned] = []
    refused: list[BudgetInfeasibleError] = []

    def backend(graph_module: Any, inputs: Any) -> Any:
        try:
            run, found = compile_with(graph_module, inputs, options, progress=progress)
            planned.extend([found] if found is not None else [])
            return run
        except BudgetInfeasibleError as error:
            refused.append(error)
            raise

    with mode, torch.set_grad_enabled(training), torch_compat.many_recompiles():
        try:
            torch.compile(fake.model, backend=backend)(*fake.args, **fake.kwargs)
        except torch_compat.BackendCompilerFailed as error:
            if refused:
                raise refused[0] from None
            raise InputError(f"the model cannot be traced: {error}") from error
    if not planned:
        raise InputError("nothing to plan: the model ran without a single captured graph")
    return planned


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
    main: Planned, points: int, options: Options, reserved: int, progress: Callable[[str], None] | None
) -> tuple[FrontierPoint, ...]:
    """Peak and time of plans from the unplanned peak down to the smallest feasible budget found, ``reserved`` bytes
    included."""
    if points < 2:
        return ()
    from memplan.solvers.recompute import minimise_peak, solve_recompute

    limits = Limits(options.solver_work, options.solver_time_limit_s, options.solver_seed, progress)
    problem = main.problem
    highest = stored_plan(problem)
    plans = [minimise_peak(problem, limits=limits)]
    for k in range(1, points - 1):
        budget = plans[0].peak + (highest.peak - plans[0].peak) * k // (points - 1)
        found = solve_recompute(problem, budget, limits=limits, start=plans[-1].sequence)
        if found.peak <= budget:
            plans.append(found)
    points_found = [_beside(p, reserved) for p in (*plans, highest)]
    return tuple(
        FrontierPoint(p.budget or p.peak, p.peak, p.time, p.bound, p.status, decisions_of(problem, p))
        for p in points_found
    )


def _beside(plan: Plan, reserved: int) -> Plan:
    """The plan with bytes that are held beside the graph counted in."""
    return replace(
        plan,
        budget=None if plan.budget is None else plan.budget + reserved,
        peak=plan.peak + reserved,
        peak_bound=plan.peak_bound + reserved,
        unplanned_peak=plan.unplanned_peak + reserved,
    )


def _optimizer_states(optimizer: str | None) -> int:
    if optimizer is None:
        return 0
    if optimizer not in OPTIMIZER_STATES:
        raise OptionError(f"unknown optimizer {optimizer!r}; known are {', '.join(OPTIMIZER_STATES)}")
    return OPTIMIZER_STATES[optimizer]


def _with_optimizer(program: Program, states: int) -> Program:
    """The Program with the optimizer's state of every parameter resident beside it."""
    kept = [program.storages[s] for s in program.resident if program.storages[s].category == Category.PARAMETER]
    extra = [
        Storage(f"{p.name}.state{k}", p.size, Category.OPTIMIZER, p.module, p.source)
        for p in kept
        for k in range(states)
    ]
    first = len(program.storages)
    return replace(
        program,
        storages=(*program.storages, *extra),
        resident=(*program.resident, *range(first, first + len(extra))),
    )

"""Run a random model eagerly, through memplan without a budget and through memplan with one; compare all one can see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from hypothesis import assume
from torch import nn

import memplan
from memplan.backend import recent_plans
from memplan.layouts import FAITHFUL
from memplan.torch_compat import aot_backend, default_partition, unplanned
from tests.arbitrary import arbitrary_plans
from tests.described import misdescribed
from tests.fuzz.recipes import Model, Recipe, Run, leaves

STEPS = 2
GRAPHS = 24  # refusals of one model: each of its graphs and shapes may refuse the budget, again when another holds more
BESIDE = Recipe((("linear", 0), ("activation", 0), ("linear", 1), ("softmaxes", 0)))
# AOTAutograd alone. The default partitioner: the other one recomputes from buffers that the forward has changed
# meanwhile. Kernels as their fake results say: the views behind others read what nobody wrote.
REFERENCE = aot_backend(
    forward=unplanned, backward=unplanned, inference=unplanned, partition=default_partition, decompositions=FAITHFUL
)
Seen = list[list[torch.Tensor | None]]


def check(recipe: Recipe, run: Run) -> None:
    """Assert what memplan promises for one model under one set of options."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(recipe).train(run.train)
    if run.frozen:
        for parameter in list(model.parameters())[1::2]:
            parameter.requires_grad_(False)
    try:
        want = steps(twin := copy.deepcopy(model), twin, recipe, run)
    except RuntimeError:
        assume(False)  # eager refuses the combination
    try:
        free = compiled(model, recipe, run, run.options)
    except (RuntimeError, TypeError) as error:
        try:
            compiled(model, recipe, run, None)
        except type(error):
            assume(False)  # AOTAutograd refuses it, or fails while it makes a result that is a view anew
        raise
    if not agree(free, want, recipe):  # a sort or a comparison may turn over where torch's own functional form does
        reference = compiled(model, recipe, run, None)
        if agree(reference, want, recipe):
            assert_same(free, want, recipe)
        want = reference
    got = planned(model, recipe, run)
    assert_same(got, want, recipe)
    if not run.fusion:
        for at, (step, plain) in enumerate(zip(got, free, strict=True)):
            for k, (a, b) in enumerate(zip(step, plain, strict=True)):
                assert _same_bits(a, b), f"step {at}, value {k}: other bits than without a plan: {_apart(a, b)}"


def planned(model: nn.Module, recipe: Recipe, run: Run) -> Seen:
    """The run under its budget, or under the smallest one that the refusal names."""
    if run.arbitrary is not None:
        with arbitrary_plans(run.arbitrary):
            return compiled(model, recipe, run, run.options)
    if run.peak:
        return compiled(model, recipe, run, run.options)
    budget: str | int = f"{run.budget}%"
    for _ in range(GRAPHS):
        try:
            return compiled(model, recipe, run, run.options | {"memory_budget": budget})
        except memplan.BudgetInfeasibleError as error:  # of one graph or shape; another may need more
            assert error.smallest is not None and error.bound <= error.smallest
            assert isinstance(budget, str) or error.smallest > budget, "the smallest feasible budget was refused"
            budget = error.smallest
    raise AssertionError(f"refused {GRAPHS} times")


def compiled(model: nn.Module, recipe: Recipe, run: Run, options: dict[str, Any] | None) -> Seen:
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    backend = {"backend": REFERENCE} if options is None else {"backend": "memplan", "options": options}
    other = torch.compile(Model(BESIDE), **backend) if run.beside else None
    known = set(map(id, recent_plans()))
    seen = steps(twin, torch.compile(twin, **backend), recipe, run, other)
    for made in recent_plans():
        wrong = [] if id(made) in known else misdescribed(made.scheduled.graph_module)
        assert not wrong, wrong
    return seen


def steps(
    model: nn.Module, call: Callable[..., Any], recipe: Recipe, run: Run, other: Callable[..., Any] | None = None
) -> Seen:
    """What each step shows: outputs, loss, gradients, buffers, the state of the random generator."""
    seen: Seen = []
    for at in range(STEPS):
        x, extra = _inputs(recipe, run, at)
        torch.manual_seed(100 + at)
        model.zero_grad(set_to_none=True)
        with nullcontext() if run.train else torch.no_grad():
            out = call(x, extra=extra)
        values = leaves(out)
        if other is not None:
            other(torch.ones(BESIDE.shape)).backward()
        if run.train:
            loss = sum(
                (0.5 + k) * v.float().square().mean() for k, v in enumerate(values) if v.requires_grad and k != 2
            )
            loss.backward()
        found: list[torch.Tensor | None] = [v.detach().clone() for v in values]
        found += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        found += [None if t is None or t.grad is None else t.grad.clone() for t in (x, extra)]
        found += [t.detach().clone() for t in (x, extra) if t is not None]
        found += [p.detach().clone() for p in model.parameters()] + [b.clone() for b in model.buffers()]
        found.append(torch.get_rng_state())
        seen.append(found)
        if run.update:
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(0.1 * p.grad.clamp(-1, 1))
    return seen


def _inputs(recipe: Recipe, run: Run, at: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    batch, length, width = recipe.shape
    batch += run.other_batch and at == STEPS - 1
    chance = torch.Generator().manual_seed(1000 + at)
    base = torch.randn(batch, length, 2 * width, generator=chance)
    x = base[..., ::2] if run.strided else base[..., :width].contiguous()
    extra = x.flip(0) if not run.aliased else x.detach()
    if run.input_gradient:
        x.requires_grad_()
    return x, extra if run.aliased or run.strided else None


def agree(got: Seen, want: Seen, recipe: Recipe) -> bool:
    try:
        assert_same(got, want, recipe)
    except AssertionError:
        return False
    return True


def assert_same(got: Seen, want: Seen, recipe: Recipe) -> None:
    tolerance = 5e-2 if recipe.loose else 2e-4
    for at, (step, other) in enumerate(zip(got, want, strict=True)):
        assert len(step) == len(other), f"step {at}: {len(step)} values instead of {len(other)}"
        for k, (a, b) in enumerate(zip(step, other, strict=True)):
            what = f"step {at}, value {k} of {len(step)}"
            assert (a is None) == (b is None), f"{what}: {'missing' if a is None else 'not None'}"
            if a is not None and b is not None:
                torch.testing.assert_close(
                    a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text, what=what: f"{what}: {text}"
                )


def _same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(a: torch.Tensor) -> torch.Tensor:
    a = torch.view_as_real(a) if a.is_complex() else a
    return torch.nan_to_num(a, nan=12345.0) if a.is_floating_point() else a


def _apart(a: torch.Tensor | None, b: torch.Tensor | None) -> str:
    if a is None or b is None or a.shape != b.shape:
        return f"{a} and {b}"
    return f"{(a.double() - b.double()).abs().max()} apart"

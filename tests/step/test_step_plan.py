"""What the plan of a whole step holds: budgets, gradients, repeated runs, optimizer state on the disk."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peak import peak_above
from torch import nn
from training import OPTIMIZERS, batches, compiled, network, same

import memplan
from memplan.errors import OptionError
from memplan.problem import Category, Phase
from memplan.program import Program
from memplan.step import Step


def planned_program(step: Step) -> Program:
    assert step.planned is not None
    return step.planned.lowered.program


def most_held(program: Program, category: Category) -> int:
    """The most bytes of a category at one instant."""
    size = [s.size if s.category == category else 0 for s in program.storages]
    live = most = sum(size[s] for s in program.resident)
    for at in program.steps:
        live += sum(size[s] for s in at.makes)
        most = max(most, live)
        live -= sum(size[s] for s in at.frees)
    return most


def test_a_budget_changes_no_bit_and_is_kept() -> None:
    def run(budget: str | None) -> tuple[nn.Module, Step, int]:
        model = network(width=256)
        x, y = batches(1, size=256)[0]
        step = compiled(model, OPTIMIZERS["adamw"](model.parameters()), memory_budget=budget)
        torch.manual_seed(5)
        for _ in range(3):
            step(x, y)
        weights = copy.deepcopy(model.state_dict())
        above = peak_above(lambda: step(x, y))
        model.load_state_dict(weights)
        return model, step, above

    free, _, _ = run(None)
    tight, step, above = run("80%")
    assert same(free, tight)
    assert step.planned is not None and step.planned.plan.budget is not None
    assert step.planned.plan.unplanned_peak > step.planned.plan.budget
    assert step.planned.problem.resident_bytes + above <= step.planned.plan.budget


def test_gradients_die_one_by_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(96, 96, bias=False) for _ in range(12)])
    x, y = torch.randn(4, 96), torch.randn(4, 96)
    step = memplan.compile_step(model, nn.functional.mse_loss, OPTIMIZERS["adamw"](model.parameters()))
    step(x, y)
    program = planned_program(step)
    largest = max(s.size for s in program.storages if s.category == Category.GRADIENT)
    assert 0 < most_held(program, Category.GRADIENT) <= 2 * largest
    assert any(at.phase == Phase.OPTIMIZER for at in program.steps)
    states = sum(program.storages[s].size for s in program.resident if program.storages[s].category == "optimizer")
    assert states == 2 * sum(s.size for s in program.storages if s.category == Category.PARAMETER)


def test_nothing_runs_again_after_its_weights_changed() -> None:
    """Under the least budget, runs are repeated; none that reads a parameter after its update."""
    model = network(width=64)
    x, y = batches(1, size=512)[0]
    step = compiled(model, OPTIMIZERS["sgd"](model.parameters()), objective="peak")
    step(x, y)
    assert step.planned is not None and step.planned.plan.recomputed
    problem = step.planned.problem
    assert any(op.after_all for op in problem.ops)
    changed: set[int] = set()
    for i in step.planned.plan.sequence:
        op = problem.ops[i]
        assert op.phase == Phase.OPTIMIZER or not changed.intersection(op.reads)
        changed.update(op.mutates if op.phase == Phase.OPTIMIZER else ())


def test_states_on_disk(tmp_path: Any) -> None:
    """The same bits with the state in a file; little of it in memory at any instant; a checkpoint goes both ways."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(192, 192), nn.Tanh())])
        return model, OPTIMIZERS["adamw"](model.parameters())

    x, y = torch.randn(64, 192), torch.randn(64, 192)
    (ours, a), (theirs, b) = build(), build()
    options = {"memory_budget": "75%", "swap.directory": str(tmp_path), "runtime_estimator": "analytic"}
    step = memplan.compile_step(ours, nn.functional.mse_loss, a, states="disk", **options)
    usual = memplan.compile_step(theirs, nn.functional.mse_loss, b)
    for _ in range(2):
        assert torch.equal(step(x, y), usual(x, y))
    a.load_state_dict(copy.deepcopy(b.state_dict()))  # in memory: goes to the disk at the next step
    step(x, y), usual(x, y)
    checkpoint = copy.deepcopy(a.state_dict())["state"]
    for mine, other in zip(checkpoint.values(), b.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(mine[k], other[k]) for k in other)
    assert same(ours, theirs)
    assert not list(tmp_path.iterdir())

    program = planned_program(step)
    total = sum(v.nbytes for s in a.state.values() for v in s.values() if v.dim())
    resident = sum(program.storages[s].size for s in program.resident if program.storages[s].category == "optimizer")
    assert resident <= 0.1 * total  # biases; what more is there at once, the plan decides
    assert most_held(program, Category.OPTIMIZER) < total
    above = peak_above(lambda: step(x, y))
    assert step.planned is not None and step.planned.problem.resident_bytes + above <= (step.planned.plan.budget or 0)


def test_states_of_a_large_parameter_come_in_pieces() -> None:
    """An embedding that is most of the model, with clipped gradients: the same bits, each piece brought in by itself."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(1027, 256), nn.Flatten(), nn.Linear(512, 128), nn.Tanh())
        return model, OPTIMIZERS["adamw"](model.parameters())

    x, y = torch.randint(1027, (8, 2)), torch.randn(8, 128)
    (ours, a), (theirs, b) = build(), build()
    options = {"memory_budget": "70%", "runtime_estimator": "analytic", "max_grad_norm": 0.05}
    step = memplan.compile_step(ours, nn.functional.mse_loss, a, states="disk", **options)
    usual = memplan.compile_step(theirs, nn.functional.mse_loss, b, max_grad_norm=0.05)
    for _ in range(3):
        assert torch.equal(step(x, y), usual(x, y))
    assert same(ours, theirs)
    for mine, other in zip(a.state.values(), b.state.values(), strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in other)
    program = planned_program(step)
    total = sum(v.nbytes for s in a.state.values() for v in s.values())
    largest = max(s.size for s in program.storages if s.category == Category.OPTIMIZER)
    assert largest <= total / 40 + 4096  # one of two states, a page more
    assert most_held(program, Category.OPTIMIZER) <= 0.6 * total  # the embedding has 0.8 of it


def test_states_on_disk_are_refused_where_they_cannot_be() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with pytest.raises(OptionError, match="needs a memory_budget"):
        compiled(model, optimizer, states="disk")
    with pytest.raises(OptionError, match="swap.enabled"):
        compiled(model, optimizer, states="disk", memory_budget="80%", swap_enabled=False)
    with pytest.raises(OptionError, match='"device" or "disk"'):
        compiled(model, optimizer, states="host")

"""compile_step against the loop it replaces: eager forward, backward and torch.optim, bit for bit."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import OPTIMIZERS, batches, compiled, eager, network, same

import memplan
from memplan.errors import BudgetInfeasibleError, InputError, OptionError


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bits_of_eager_under_a_schedule(name: str) -> None:
    clip = 0.5 if name in ("nesterov", "amsgrad") else None
    ours, theirs = network(), network()
    a, b = OPTIMIZERS[name](ours.parameters()), OPTIMIZERS[name](theirs.parameters())
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (a, b)]
    step = compiled(ours, a, max_grad_norm=clip)
    losses = []
    for model_losses in ((step(x, y) for x, y in batches(4)), eager(theirs, b, batches(4), clip)):
        torch.manual_seed(7)
        schedule = schedules.pop(0)
        for loss in model_losses:
            losses.append(loss.item())
            schedule.step()
    assert losses[:4] == losses[4:]
    assert same(ours, theirs)
    assert all(p.grad is None for p in ours.parameters())
    assert (step.gradient_norm is None) == (clip is None)


def test_state_dict_goes_both_ways() -> None:
    data = batches(6)
    ours, theirs = network(), network()
    a, b = OPTIMIZERS["adamw"](ours.parameters()), OPTIMIZERS["adamw"](theirs.parameters())
    step = compiled(ours, a)
    torch.manual_seed(3)
    for x, y in data[:2]:
        step(x, y)
    theirs.load_state_dict(ours.state_dict())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    list(eager(theirs, b, data[2:4]))
    ours.load_state_dict(theirs.state_dict())
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    for x, y in data[4:]:
        step(x, y)
    last = network()
    c = OPTIMIZERS["adamw"](last.parameters())
    torch.manual_seed(3)
    list(eager(last, c, data))
    assert same(ours, last)
    assert [s["step"].item() for s in a.state.values()] == [6.0] * len(a.state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_has_what_torch_optim_would_save(name: str) -> None:
    ours, theirs = network(), network()
    a, b = OPTIMIZERS[name](ours.parameters()), OPTIMIZERS[name](theirs.parameters())
    step = compiled(ours, a)
    for losses in ((step(x, y) for x, y in batches(2)), eager(theirs, b, batches(2))):
        torch.manual_seed(3)
        list(losses)
    got, want = a.state_dict(), b.state_dict()
    assert got["param_groups"] == want["param_groups"]
    torch.testing.assert_close(got["state"], want["state"], rtol=0, atol=0)


def test_groups_frozen_and_unused_parameters() -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network()
        model.unused = nn.Parameter(torch.ones(4))
        model[0].weight.requires_grad_(False)
        rest = [p for name, p in model.named_parameters() if not name.startswith("6.")]
        groups = [{"params": rest}, {"params": model[6].parameters(), "lr": 0.5, "weight_decay": 0.2}]
        return model, torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False)

    (ours, a), (theirs, b) = build(), build()
    ours.forward = lambda x: nn.Sequential.forward(ours, x)
    step = compiled(ours, a)
    for model_losses in ((step(x, y) for x, y in batches(3)), eager(theirs, b, batches(3))):
        torch.manual_seed(7)
        list(model_losses)
    assert same(ours, theirs)
    assert ours.unused not in a.state and ours[0].weight not in a.state
    for model, optimizer in ((ours, a), (theirs, b)):  # a fine-tuning schedule: thaw one, train a new one
        model[0].weight.requires_grad_(True)
        model[2] = nn.PReLU()
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.3})
    for model_losses in ((step(x, y) for x, y in batches(2)), eager(theirs, b, batches(2))):
        torch.manual_seed(7)
        list(model_losses)
    assert same(ours, theirs) and ours[2].weight in a.state and ours[0].weight in a.state


def test_shapes_and_modes_are_captured_again() -> None:
    ours, theirs = network(), network()
    a, b = OPTIMIZERS["sgd"](ours.parameters()), OPTIMIZERS["sgd"](theirs.parameters())
    step = compiled(ours, a)
    data = [batches(1, size)[0] for size in (8, 12, 8)]
    for model, run in ((ours, lambda batch: step(*batch)), (theirs, lambda batch: next(eager(theirs, b, [batch])))):
        torch.manual_seed(7)
        for training in (True, False):
            model.train(training)
            for batch in data:
                run(batch)
    assert same(ours, theirs)


def test_parameters_that_share_memory_and_one_that_is_replaced() -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network()
        flat = torch.cat([model[4].weight.detach().flatten(), model[4].bias.detach()])
        model[4].weight = nn.Parameter(flat[:-32].view(32, 32))
        model[4].bias = nn.Parameter(flat[-32:])
        return model, OPTIMIZERS["adamw"](model.parameters())

    (ours, a), (theirs, b) = build(), build()
    step = compiled(ours, a)
    for model_losses in ((step(x, y) for x, y in batches(3)), eager(theirs, b, batches(3))):
        torch.manual_seed(7)
        list(model_losses)
    assert same(ours, theirs)
    ours[6].bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(InputError, match="6.bias is another tensor"):
        step(*batches(1)[0])


def test_in_an_arena() -> None:
    ours, theirs = network(), network()
    a, b = OPTIMIZERS["adamw"](ours.parameters()), OPTIMIZERS["adamw"](theirs.parameters())
    step = compiled(ours, a, placement_enabled=True)
    losses = []
    for model_losses in ((step(x, y) for x, y in batches(4)), eager(theirs, b, batches(4))):
        torch.manual_seed(7)
        losses.append([loss.item() for loss in model_losses])
    assert losses[0] == losses[1] and same(ours, theirs)
    assert step.planned is not None and step.planned.layout is not None


def test_a_step_dies_with_its_last_reference() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step = compiled(model, optimizer)
    step(*batches(1)[0])
    alive = weakref.ref(step)
    recent_plans_hold_no_parameters = weakref.ref(model[0].weight)
    del step, model, optimizer
    gc.collect()
    assert alive() is None
    assert recent_plans_hold_no_parameters() is None


def test_shapes_are_remembered_up_to_a_bound() -> None:
    model = nn.Linear(16, 3)
    step = compiled(model, OPTIMIZERS["sgd"](model.parameters()), runtime_estimator="analytic")
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in (3, 4, 5, 6):
            step(*batches(1, size)[0])
            assert step.planned is not None
            assert len(step._captured) <= 2


def test_an_error_in_the_middle_says_so_and_the_next_step_works() -> None:
    fails = [False]

    @torch.library.custom_op("memplan_tests::fault", mutates_args=())
    def fault(x: Tensor) -> Tensor:
        if fails[0]:
            raise RuntimeError("a fault")
        return x.clone()

    fault.register_fake(torch.empty_like)
    fault.register_autograd(lambda context, gradient: gradient)

    class Faulty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return fault(self.net(x))

    ours, theirs = Faulty(), network()
    a, b = OPTIMIZERS["adamw"](ours.parameters()), OPTIMIZERS["adamw"](theirs.parameters())
    step = compiled(ours, a)
    x, y = batches(1)[0]
    for fails[0] in (False, True, False):
        torch.manual_seed(7)
        if fails[0]:
            buffers = copy.deepcopy(dict(ours.named_buffers()))
            with pytest.raises(RuntimeError, match="a fault") as caught:
                step(x, y)
            assert "in its middle" in caught.value.__notes__[0]
            ours.load_state_dict(buffers, strict=False)
        else:
            step(x, y)
    for _ in range(2):
        torch.manual_seed(7)
        list(eager(theirs, b, [(x, y)]))
    assert same(ours.net, theirs)


class ReturnsLoss(nn.Module):
    def __init__(self, wrapped: bool) -> None:
        super().__init__()
        self.net, self.wrapped = network(), wrapped

    def forward(self, x: Tensor, y: Tensor) -> Any:
        loss = nn.functional.cross_entropy(self.net(x), y)
        return {"loss": loss, "other": x} if self.wrapped else loss


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_model_may_return_its_loss(wrapped: bool) -> None:
    ours, theirs = ReturnsLoss(wrapped), network()
    a, b = OPTIMIZERS["sgd"](ours.parameters()), OPTIMIZERS["sgd"](theirs.parameters())
    step = memplan.compile_step(ours, None, a)
    x, y = batches(1)[0]
    torch.manual_seed(7)
    loss = step(x, y=y)
    torch.manual_seed(7)
    assert torch.equal(loss, next(eager(theirs, b, [(x, y)])))
    assert same(ours.net, theirs)


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.net(x)


@pytest.mark.parametrize("case", ["optimizer", "graph break"])
def test_what_cannot_be_traced_runs_as_usual(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make = torch.optim.Adagrad if case == "optimizer" else torch.optim.SGD
    ours, theirs = (Breaks(), Breaks().net) if case == "graph break" else (network(), network())
    a, b = make(ours.parameters(), lr=0.1), make(theirs.parameters(), lr=0.1)
    step = compiled(ours, a)
    with caplog.at_level(logging.WARNING, logger="memplan"):
        for model_losses in ((step(x, y) for x, y in batches(2)), eager(theirs, b, batches(2))):
            torch.manual_seed(7)
            list(model_losses)
    assert same(ours.net if case == "graph break" else ours, theirs)
    assert [r.getMessage() for r in caplog.records if "the optimizer runs as usual" in r.getMessage()]
    assert len(caplog.records) == 1
    assert step.planned is None


def test_misuse_is_refused() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(InputError, match="not one of the model's"):
        compiled(network(), optimizer)
    with pytest.raises(OptionError, match="unknown option 'memory_buget'"):
        compiled(model, optimizer, memory_buget=1)
    with pytest.raises(OptionError, match="max_grad_norm"):
        compiled(model, optimizer, max_grad_norm=0.0)
    with pytest.raises(InputError, match="torch.optim.Optimizer"):
        memplan.compile_step(model, None, model.parameters())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="closure"):
        compiled(model, torch.optim.LBFGS(model.parameters()))
    x, y = batches(1)[0]
    with pytest.raises(InputError, match="target"):
        compiled(model, optimizer)()
    with pytest.raises(InputError, match="scalar loss"):
        memplan.compile_step(model, lambda out, y: out, optimizer)(x, y)
    with pytest.raises(InputError, match="returns no loss"):
        pair = Pair()
        memplan.compile_step(pair, None, OPTIMIZERS["sgd"](pair.parameters()))(x)
    with pytest.raises(BudgetInfeasibleError):
        compiled(model, optimizer, memory_budget=1000)(x, y)
    model(x).sum().backward()
    with pytest.raises(InputError, match="gradient already"):
        compiled(model, optimizer)(x, y)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), x

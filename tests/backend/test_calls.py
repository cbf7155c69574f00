"""How a compiled model is called: again and again, from threads, at other sizes, copied, refused, in pieces."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memplan
from tests.backend.compare import FAST, Deep, X, compare, gelu_tanh
from tests.peak import peak_above


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="memplan", options=FAST | {"memory_budget": "90%"} | options)


def test_several_forwards_before_a_backward_and_accumulation():
    model = Deep(gelu_tanh)
    reference = copy.deepcopy(model)
    run = compiled(model)
    for net, call in ((reference, reference), (model, run)):
        first, second = call(X), call(X + 1)
        (first.square().mean() + second.sum()).backward()
        call(X - 1).sum().backward()  # accumulates
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("affine", [True, False])
def test_several_forwards_before_a_backward_change_running_statistics(affine):
    """A batch norm that runs again must not need the statistics that the second forward overwrites."""
    layers = [m for _ in range(3) for m in (nn.Linear(64, 64), nn.BatchNorm1d(64, affine=affine), nn.Tanh())]
    model = nn.Sequential(*layers)
    reference = copy.deepcopy(model)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    run = compiled(model, memory_budget=None, objective="peak")
    for net, call in ((reference, reference), (model, run)):
        (call(x) * call(x + 1)).mean().backward()
    again = [s for s in memplan.recent_plans()[-1].lowered.program.steps if s.recompute and "batch_norm" in s.name]
    assert again
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for b, c in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(b, c)


def test_forward_without_backward_then_a_full_step():
    model = Deep(gelu_tanh)
    run = compiled(model)
    kept = [run(X) for _ in range(3)]
    torch.testing.assert_close(kept[0], kept[2])
    run(X).sum().backward()
    torch.testing.assert_close(kept[1], model(X))


def test_retained_graph_runs_backward_twice():
    model = Deep(gelu_tanh)
    loss = compiled(model)(X).sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_inference(guard):
    model = Deep(lambda x: F.dropout(gelu_tanh(x), 0.5, training=False)).eval()
    with guard():
        torch.testing.assert_close(compiled(model, memory_budget="1MiB")(X), model(X))


def test_two_threads():
    model = Deep(gelu_tanh)
    run = compiled(model)
    run(X)  # compile once
    results: dict[int, torch.Tensor] = {}

    def work(k: int) -> None:
        for _ in range(20):
            results[k] = run(X + k)
            torch.autograd.grad(results[k].sum(), model.maps[0].weight)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        torch.testing.assert_close(results[k], model(X + k))


def test_dynamic_shapes_are_right_at_every_size():
    model = Deep(gelu_tanh)
    torch._dynamo.reset()
    run = torch.compile(model, backend="memplan", dynamic=True, options=FAST | {"memory_budget": "64KiB"})
    for rows in (8, 32, 5, 64):
        model.zero_grad(set_to_none=True)
        x = X.repeat(2, 1)[:rows]
        run(x).square().mean().backward()
        got = [p.grad.clone() for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        for g, p in zip(got, model.parameters(), strict=True):
            torch.testing.assert_close(g, p.grad)


def test_a_shape_seen_before_runs_again_after_another_was_compiled():
    model = Deep(gelu_tanh)
    torch._dynamo.reset()
    run = torch.compile(model, backend="memplan", dynamic=False, options=FAST | {"memory_budget": "64KiB"})
    for rows in (8, 16, 8, 16):
        torch.testing.assert_close(run(X[:rows]), model(X[:rows]))


def test_model_can_be_copied_and_pickled_after_compiling():
    model = Deep(torch.tanh)
    compiled(model, memory_budget="1MiB")(X).sum().backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(compiled(twin, memory_budget="1MiB")(X), model(X))


def test_infeasible_budget_says_the_smallest_and_it_works():
    model = Deep(gelu_tanh, layers=8)
    with pytest.raises(memplan.BudgetInfeasibleError) as caught:
        compiled(model, memory_budget="1%")(X)
    error = caught.value
    assert error.smallest is not None and error.bound <= error.smallest and error.alive
    assert any("compare.py" in b.source for b in error.alive)
    compiled(model, memory_budget=error.smallest)(X).sum().backward()
    assert memplan.recent_plans()[-1].held <= error.smallest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budgit": "1GiB"}, "memory_budget"),
        ({"memory_budget": "24 gigs"}, "24GiB"),
        ({"memory_budget": "1GiB", "objective": "peak"}, "drop one"),
        ({"runtime_estimator": "guess"}, "analytic"),
        ({"recompute.enabled": "perhaps"}, "bool"),
    ],
)
def test_bad_options_are_refused_before_anything_compiles(options, message):
    torch._dynamo.reset()
    with pytest.raises(memplan.MemplanError, match=message):
        torch.compile(nn.Linear(16, 16), backend="memplan", options=options)(X)


def test_unsupported_graph_runs_unplanned_with_one_warning(caplog):
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Deep(gelu_tanh)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (self.net(x),))

    model = Branch()
    with caplog.at_level("WARNING", logger="memplan"):
        torch.testing.assert_close(compiled(model)(X), model(X))
    assert sum("unplanned" in r.message for r in caplog.records) == 1


def test_pieces_of_a_broken_graph_share_one_budget():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Deep(gelu_tanh, layers=10), Deep(gelu_tanh, layers=3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x).square().mean()

    torch.manual_seed(0)
    model, x = Broken(), torch.randn(2048, 16)
    whole = peak_above(lambda: train_step(model, model, x))
    resident = sum(p.nbytes for p in model.parameters()) + x.nbytes
    budget = resident + whole // 2
    run = compiled(model, memory_budget=budget, **{"placement.enabled": False})
    reference = copy.deepcopy(model)
    for _ in range(3):
        train_step(model, run, x)
        train_step(reference, reference, x)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert resident + peak_above(lambda: train_step(model, run, x)) <= budget


def train_step(model: nn.Module, run: Any, x: torch.Tensor) -> None:
    run(x).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
            p.grad = None


def test_a_tangent_shares_no_memory_with_the_argument_its_output_looks_at():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(X.clone())

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.chunk(self.weight, 2)

    compare(Halves, (X,), budget=None)


def test_a_backward_in_which_nothing_runs():
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    torch._dynamo.reset()
    run = torch.compile(lambda t: torch.add(t, 2), backend="memplan", options=FAST)
    run(x).square().sum().backward()
    torch.add(y, 2).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_a_random_op_that_is_given_its_device():
    compare(lambda: Deep(lambda x: gelu_tanh(x + 0.1 * torch.randn(16, device="cpu")), layers=6), (X,), budget="70%")


def test_writing_into_a_view_takes_what_the_plan_says():
    """aten's functional copy would clone the whole storage of the view it overwrites."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(512))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.tanh(x + self.bias).clone()
            y.view(-1)[:3].mul_(0.5).add_(0.1)
            return torch.tanh(y).square().mean()

    x = torch.linspace(-1, 1, 64 * 512).reshape(64, 512)
    compare(Written, (x,), budget="95%")
    model = Written()
    torch._dynamo.reset()
    run = torch.compile(model, backend="memplan", options=FAST | {"objective": "peak"})
    train_step(model, run, x)
    planned = memplan.recent_plans()[-1]
    assert peak_above(lambda: train_step(model, run, x)) <= planned.timeline.peak - planned.problem.resident_bytes


def test_the_first_batch_is_not_kept() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    batch = torch.randn(512, 64)
    alive = weakref.ref(batch)
    step = torch.compile(lambda x: net(x).sum(), backend="memplan", options={"memory_budget": "100%"})
    step(batch).backward()
    del batch
    gc.collect()
    assert alive() is None
    step(torch.randn(512, 64)).backward()

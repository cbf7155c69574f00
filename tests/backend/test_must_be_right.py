"""What is known to break such tools, each case compared with eager and, bit for bit, with the unbudgeted run."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import memplan
from tests.backend.compare import FAST, compare
from tests.peak import peak_above

X = torch.linspace(-2, 2, 32 * 16).reshape(32, 16)


class Deep(nn.Module):
    """Layers of ``block`` between two linear maps, enough of them for recomputation to have something to do."""

    def __init__(self, block: Any, layers: int = 5, width: int = 16) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.maps:
            x = self.block(layer(x))
        return x


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(F.gelu(x)) * 1.5


def test_recomputes_and_stays_exact():
    plan = compare(lambda: Deep(gelu_tanh, layers=8), (X,), budget="70%")
    assert plan.recomputed > 0 and plan.peak <= 0.7 * plan.unplanned_peak


def test_dropout_draws_the_same_mask_again():
    plan = compare(lambda: Deep(lambda x: F.dropout(gelu_tanh(x), 0.3), layers=8), (X,), budget="70%")
    assert plan.peak <= 0.7 * plan.unplanned_peak


def test_other_random_ops_leave_the_stream_as_eager_does():
    def noisy(x: torch.Tensor) -> torch.Tensor:
        return gelu_tanh(x + 0.1 * torch.rand_like(x)) * torch.bernoulli(torch.full_like(x, 0.9))

    compare(lambda: Deep(noisy, layers=6), (X,), budget="70%")


def test_batch_norm_statistics_change_once():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = F.relu(norm(conv(x))) + x
            return x

    compare(Net, (X.reshape(4, 4, 4, 8),), budget="70%")


def test_views_alias_one_storage():
    def views(x: torch.Tensor) -> torch.Tensor:
        a, b = x.view(2, 16, 16).transpose(0, 1).chunk(2, dim=2)
        return torch.cat([a * 2, b.sigmoid()], dim=2).transpose(0, 1).reshape(32, 16)

    compare(lambda: Deep(views), (X,), budget="75%")


def test_inputs_mutated_in_place():
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Deep(gelu_tanh)
            self.register_buffer("seen", torch.zeros(16))
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            before = self.seen * 2
            self.seen.add_(x.mean(0))
            self.calls += 1
            return self.net(x + before) * self.seen.sigmoid()

    compare(Counter, (X,), budget="75%")


def test_checkpoint_regions_inside_the_model():
    compare(lambda: Deep(lambda x: checkpoint(gelu_tanh, x, use_reentrant=False)), (X,), budget="75%")


def test_checkpoint_with_dropout_inside_the_model():
    def block(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda y: F.dropout(gelu_tanh(y), 0.3), x, use_reentrant=False)

    compare(lambda: Deep(block), (X,), budget="75%")


def save_products(_, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpoint_with_dropout_inside_the_model():
    contexts = functools.partial(create_selective_checkpoint_contexts, save_products)

    def block(x: torch.Tensor) -> torch.Tensor:
        def region(y: torch.Tensor) -> torch.Tensor:
            return F.dropout(gelu_tanh((y @ y.T).softmax(-1) @ y), 0.3)

        return checkpoint(region, x, use_reentrant=False, context_fn=contexts)

    compare(lambda: Deep(block), (X,), budget="75%")


def test_graph_breaks():
    def broken(x: torch.Tensor) -> torch.Tensor:
        x = gelu_tanh(x)
        torch._dynamo.graph_break()
        return x.sin()

    compare(lambda: Deep(broken, layers=3), (X,), budget=10**6)


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            self.net = Deep(gelu_tanh)
            self.head = nn.Linear(16, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.head(self.net(self.embed(tokens))).flatten(0, 1), tokens.flatten())

    compare(Tied, (torch.arange(24).reshape(4, 6) % 11,), budget="70%")


def test_autocast():
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Deep(gelu_tanh)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x).float()

    compare(Cast, (X,), budget="75%", tolerance=2e-2)


def test_many_dtypes_and_odd_tensors():
    def odd(x: torch.Tensor) -> torch.Tensor:
        z = torch.complex(x, x.sin()).abs()
        mask = (x > 0) & (x.long() % 2 == 0)
        empty = x[:0].sum() + x.new_zeros(0, 4).sum()
        return torch.where(mask, z, x) + empty

    compare(lambda: Deep(odd), (X,), budget="80%")


def test_non_contiguous_and_several_outputs():
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Deep(gelu_tanh)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = self.net(x)
            return y.t(), y[::2], x, y.argmax(1), (y * 2).expand(2, 32, 16)

    compare(Many, (X,), budget="90%")


def test_custom_op():
    @torch.library.custom_op("memplan_tests::halve", mutates_args=())
    def halve(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    halve.register_fake(lambda x: torch.empty_like(x))
    halve.register_autograd(lambda ctx, grad: grad / 2)
    compare(lambda: Deep(lambda x: halve(gelu_tanh(x))), (X,), budget="75%")


def test_frozen_parameters_and_inputs_with_gradients():
    def frozen() -> nn.Module:
        net = Deep(gelu_tanh)
        for p in net.maps[0].parameters():
            p.requires_grad_(False)
        return net

    compare(frozen, (X.clone().requires_grad_(),), budget="75%")


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
    assert any("test_must_be_right.py" in b.source for b in error.alive)
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

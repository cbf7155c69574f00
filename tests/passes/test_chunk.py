"""Chunked losses equal the whole ones to rounding, make no logits, and leave alone what they cannot stand in for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

import memplan
from memplan.passes.calls import name_of
from memplan.passes.chunk import ChunkLoss
from memplan.runtime.loss import loss_of_rows
from tests.peak import peak_above

VOCABULARY, WIDTH = 96, 16


def _rewritten(function: Callable[..., object], *inputs: Tensor, rows: int = 8) -> torch.fx.GraphModule | None:
    """What the pass makes of the graph that dynamo captures."""
    found: list[torch.fx.GraphModule | None] = []

    def backend(graph_module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        found.append(ChunkLoss(rows).apply(graph_module))
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=False)(*inputs)
    return found[0]


def _inputs(batch: int = 3, length: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(batch, length, WIDTH), torch.randn(VOCABULARY, WIDTH)
    labels = torch.randint(0, VOCABULARY, (batch, length))
    labels[0, :4] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def shifted(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = linear(hidden, weight).float()[..., :-1, :].contiguous()
    return cross_entropy(logits.view(-1, VOCABULARY), labels[..., 1:].contiguous().view(-1))


def padded(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = linear(hidden[:, slice(0, None), :], weight)
    labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1), ignore_index=-100, reduction="sum") / 7


def as_a_module(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return nn.CrossEntropyLoss()(linear(hidden, weight).reshape(-1, VOCABULARY), labels.flatten())


@pytest.mark.parametrize("function", [shifted, padded, as_a_module])
def test_the_logits_disappear_and_values_stay(function):
    inputs = _inputs()
    module = _rewritten(function, *inputs)
    assert module is not None
    assert not any(name_of(n) in ("linear", "cross_entropy") for n in module.graph.nodes)
    want = torch.autograd.grad(function(*inputs), inputs[:2])
    names = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]
    by_name = dict(zip(("L_hidden_", "L_weight_", "L_labels_"), inputs, strict=True))
    (loss,) = module(*(by_name[name] for name in names))
    torch.testing.assert_close(loss, function(*inputs))
    torch.testing.assert_close(torch.autograd.grad(loss, inputs[:2]), want)


def with_weights(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = linear(hidden, weight).view(-1, VOCABULARY)
    return cross_entropy(logits, labels.view(-1), weight=torch.ones(VOCABULARY))


def smoothed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight).view(-1, VOCABULARY), labels.view(-1), label_smoothing=0.1)


def capped(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight).tanh().view(-1, VOCABULARY), labels.view(-1))


def each_row(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight).view(-1, VOCABULARY), labels.view(-1), reduction="none")


def returned(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = linear(hidden, weight)
    return cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1)), logits


def classes_in_the_middle(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight).transpose(1, 2), labels)


def some_classes(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight)[..., :50].reshape(-1, 50), labels.view(-1).clamp(max=49))


@pytest.mark.parametrize(
    "function", [with_weights, smoothed, capped, each_row, returned, classes_in_the_middle, some_classes]
)
def test_what_it_cannot_stand_in_for_is_left_alone(function):
    assert _rewritten(function, *_inputs()) is None


def test_few_rows_are_left_alone():
    assert _rewritten(shifted, *_inputs(), rows=64) is None


@pytest.mark.parametrize(("tokens", "rows"), [(65, 64), (400, 100), (4000, 256)])
def test_blocks_are_a_quarter_of_the_logits_where_they_are_large_enough(tokens, rows):
    module = _rewritten(as_a_module, *_inputs(1, tokens), rows=256)
    assert module is not None
    loss = next(n for n in module.graph.nodes if n.target is loss_of_rows)
    assert loss.args[6] == rows


@settings(max_examples=25)
@given(
    rows=st.integers(1, 9),
    tokens=st.integers(1, 20),
    classes=st.integers(2, 12),
    mean=st.booleans(),
    biased=st.booleans(),
    frozen=st.booleans(),
    ignored=st.sampled_from([-100, 0]),
    seed=st.integers(0, 9),
)
def test_any_shape_in_double_precision(rows, tokens, classes, mean, biased, frozen, ignored, seed):
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(classes, 5, dtype=torch.float64, requires_grad=not frozen)
    bias = torch.randn(classes, dtype=torch.float64, requires_grad=True) if biased else None
    target = torch.randint(0, classes, (tokens,))
    target[target == classes - 1] = ignored
    asked = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    reduction = "mean" if mean else "sum"
    want = cross_entropy(linear(hidden, weight, bias), target, ignore_index=ignored, reduction=reduction)
    got = loss_of_rows(hidden, weight, bias, target, ignored, mean, rows, torch.float64, torch.float64)
    torch.testing.assert_close(got, want, equal_nan=True)
    given_grads = torch.autograd.grad(3 * got, asked)
    torch.testing.assert_close(given_grads, torch.autograd.grad(3 * want, asked), equal_nan=True)


def test_half_precision_is_as_near_as_eager():
    hidden, weight, labels = _inputs()
    exact = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    narrow = [hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()]
    with torch.no_grad():
        for e, n in zip(exact, narrow, strict=True):
            e.copy_(n)
    flat = labels.view(-1)

    def eager(parts: list[Tensor]) -> Tensor:
        return cross_entropy(linear(parts[0], parts[1]).float().view(-1, VOCABULARY), flat)

    def error(grads: tuple[Tensor, ...]) -> float:
        return max((g.double() - w).norm() / w.norm() for g, w in zip(grads, want, strict=True)).item()

    want = torch.autograd.grad(cross_entropy(linear(*exact).view(-1, VOCABULARY), flat), exact)
    blocked = loss_of_rows(narrow[0], narrow[1], None, labels, -100, True, 8, torch.bfloat16, torch.float32)
    ours, theirs = error(torch.autograd.grad(blocked, narrow)), error(torch.autograd.grad(eager(narrow), narrow))
    assert ours <= 1.5 * theirs


class Model(nn.Module):
    """A language model whose logits are most of its peak."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2048, 32)
        self.head = nn.Linear(32, 2048, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.embedding(tokens)))[:, :-1]
        return cross_entropy(logits.reshape(-1, 2048), tokens[:, 1:].reshape(-1))


def test_the_planner_takes_it_where_only_it_fits():
    torch.manual_seed(0)
    model, tokens = Model(), torch.randint(0, 2048, (4, 257))
    want = torch.autograd.grad(model(tokens), list(model.parameters()))
    torch._dynamo.reset()
    options = {"fusion.enabled": True, "lowering": "eager", "runtime_estimator": "analytic", "memory_budget": "45%"}
    run = torch.compile(model, backend="memplan", options=options)

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(run(tokens), list(model.parameters())))

    torch.testing.assert_close(step(), list(want))
    planned = memplan.recent_plans()[-1]
    assert any("blocked_loss" in op.target for op in planned.problem.ops)
    held = peak_above(lambda: step() and None) + planned.problem.resident_bytes
    assert held <= planned.plan.budget

"""Results over dead operands: the same bits, a lower peak, and nobody's value overwritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peak import peak_above
from torch import nn

from memplan.backend import recent_plans
from memplan.errors import BudgetInfeasibleError, InputError
from memplan.passes.reuse import OUT_FORMS, any_overlays, overlaid, overwritten
from memplan.problem import Buffer, Op, Problem
from memplan.validate import check_sequence, validate

aten = torch.ops.aten


def operands(op: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Arguments for an op of the table: tensors, then what else its schema asks for."""
    generator = torch.Generator().manual_seed(0)
    names = [a.name for a in op._schema.arguments if str(a.type) == "Tensor"]
    values: list[Any] = [torch.rand(shape, generator=generator) + 0.1 for _ in names]
    if op in (aten._softmax.default, aten._log_softmax.default):
        return (*values, -1, False)
    if op in (aten._softmax_backward_data.default, aten._log_softmax_backward_data.default):
        return (*values, -1, torch.float32)
    if op is aten.where.self:
        values[0] = values[0] > 0.6
    extra = {aten.pow.Tensor_Scalar: (3,), aten.threshold_backward.default: (0.5,)}
    return (*values, *extra.get(op, ()))


@pytest.mark.parametrize("op", OUT_FORMS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 65), (3, 5, 1030), (2, 20000)])
def test_each_form_writes_the_same_bits_over_any_operand(op: Any, shape: tuple[int, ...]) -> None:
    form, argument = OUT_FORMS[op]
    args = operands(op, shape)
    wanted = op(*args)
    for k, operand in enumerate(args):
        if not isinstance(operand, torch.Tensor) or operand.dtype != wanted.dtype:
            continue
        given = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        address = given[k].data_ptr()
        found = form(*given, **{argument: given[k]})
        assert found.data_ptr() == address
        assert torch.equal(found, wanted)


class Classifier(nn.Module):
    """Its peak is where the gradient of the log-softmax is made from that of the loss, which dies there."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(64, 64), nn.Linear(64, 2000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.out(torch.sigmoid(self.hidden(x)))
        return nn.functional.cross_entropy(logits, torch.arange(len(x)))


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="memplan", options={"runtime_estimator": "analytic"} | options)


def step(run: Any, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = run(x)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def reused() -> list[Any]:
    nodes = recent_plans()[-1].scheduled.graph_module.graph.nodes
    return [n for n in nodes if overwritten(n) is not None]


@pytest.mark.parametrize("options", [{}, {"objective": "peak"}, {"placement.enabled": True}], ids=str)
def test_training_has_the_same_bits_and_a_lower_peak(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(600, 64)
    plain = compiled(model, **{"reuse.enabled": False} | options)
    wanted = [step(plain, model, x) for _ in range(3)][-1]
    before = recent_plans()[-1].timeline.peak
    run = compiled(model, **options)
    for _ in range(3):
        found = step(run, model, x)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert reused()
    assert recent_plans()[-1].timeline.peak < before


class Deep(nn.Module):
    """The peak is at the loss, whose reuse leaves bytes of a budget that the layers before it can use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(6))
        )
        self.out = nn.Linear(64, 800)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.out(self.layers(x)), torch.arange(len(x)))


def test_what_reuse_spares_goes_back_to_the_planner() -> None:
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(600, 64)
    plans, results = [], []
    for enabled in (False, True):
        run = compiled(model, **{"reuse.enabled": enabled, "memory_budget": "80%"})
        results.append(step(run, model, x))
        planned = recent_plans()[-1]
        validate(planned.problem, planned.plan)
        assert planned.plan.peak == planned.timeline.peak <= planned.plan.budget
        plans.append(planned.plan)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    without, spared = plans
    assert without.spared == 0 < spared.spared and spared.peak + spared.spared > spared.budget
    assert spared.time < without.time and spared.recomputed < without.recomputed


def test_the_solver_knows_of_reuse_where_it_refuses() -> None:
    """A lower least peak than without, which is kept with the same bits when it is asked for."""
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(600, 64)
    wanted = step(compiled(model), model, x)
    least = []
    for enabled in (False, True):
        with pytest.raises(BudgetInfeasibleError) as refused:
            compiled(model, **{"reuse.enabled": enabled, "memory_budget": 1})(x)
        least.append(refused.value.smallest)
        assert refused.value.bound <= least[-1]
    assert least[1] < least[0]
    found = step(compiled(model, memory_budget=least[1]), model, x)
    planned = recent_plans()[-1]
    assert planned.plan.peak == planned.timeline.peak <= least[1]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_problem_with_results_over_operands() -> None:
    problem = Problem(
        buffers=(Buffer("x", 8), Buffer("a", 8), Buffer("b", 8)),
        ops=(Op("one", "aten.exp.default", reads=(0,), writes=(1,)), Op("two", "aten.exp.default", (1,), (2,))),
        outputs=(2,),
    )
    told = overlaid(problem, {1: 8})
    told.check()
    assert check_sequence(problem, (0, 1))[0] == 24 and check_sequence(told, (0, 1))[0] == 16
    assert any_overlays(problem) == {0: 8, 1: 8}
    with pytest.raises(InputError, match="workspace"):
        overlaid(problem, {1: 9}).check()


def test_inference_is_measured_lower() -> None:
    model = nn.Sequential(nn.Linear(8, 1024), nn.Sigmoid(), nn.Tanh(), nn.Linear(1024, 1)).eval()
    x = torch.randn(2000, 8)
    with torch.no_grad():
        wanted = compiled(model, **{"reuse.enabled": False})(x)
        run = compiled(model)
        assert torch.equal(run(x), wanted)
        planned = recent_plans()[-1]
        assert len(reused()) == 2
        above = peak_above(lambda: run(x))
    assert above <= planned.timeline.peak - planned.problem.resident_bytes
    assert above < 1.5 * 2000 * 1024 * 4  # one of the large buffers at a time, not two


def test_what_is_saved_returned_or_looked_at_is_left_alone() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            made = x * 2
            turned = made.t()
            kept = made * 3  # made is returned
            mixed = kept + kept.t()  # two ways of looking at one storage
            return made, turned, mixed, x.exp()

    x = torch.randn(300, 300)
    with torch.no_grad():
        run = compiled(Model(), objective="peak")
        for found, wanted in zip(run(x), Model()(x), strict=True):
            assert torch.equal(found, wanted)
    assert not reused()

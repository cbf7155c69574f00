"""The fuse pass end to end: same results, a legal graph, a peak that does not rise, one kernel for repeated layers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peak import peak_above
from torch import nn
from torch.nn import functional as F

from memplan import seek, torch_compat
from memplan.backend import recent_plans
from memplan.build_problem import BUFFER, build_problem
from memplan.capture import Capture
from memplan.codegen import lowering
from memplan.codegen.compiled import CompiledRegion
from memplan.codegen.eager import compile_eager
from memplan.codegen.lowering import FusedRegion
from memplan.codegen.region import Region
from memplan.cost import cost_model
from memplan.devices import profile_for
from memplan.errors import BudgetInfeasibleError
from memplan.lower import lower
from memplan.passes.dtypes import NORMS
from memplan.passes.fuse import Fuse, Fused
from memplan.passes.schedule import Schedule
from memplan.passes.split import Split
from memplan.plans import Plan
from memplan.problem import Problem
from memplan.runtime.execute import Executable
from memplan.simulate import simulate


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Head(nn.Module):
    def __init__(self, width: int = 16, classes: int = 24) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(4)))
        self.out = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = self.out(self.blocks(x)).flatten(0, 1)
        return F.nll_loss(F.log_softmax(logits, -1), y.flatten())  # cross_entropy would run over blocks of tokens


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.out = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = torch.relu(x + self.norm(self.second(torch.relu(x))))
        return F.cross_entropy(self.out(x.mean((2, 3))), y)


class FusedBackend:
    """Dynamo's way through the pass, without a solver: stored order, then fusion."""

    def __init__(self, repeat: bool = False, lowering: str = "eager", twice: int | None = None) -> None:
        self.repeat, self.lowering, self.twice = repeat, lowering, twice
        self.fused: Fused | None = None
        self.peaks: tuple[int, int] = (0, 0)

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        backend = torch_compat.aot_backend(
            decompositions={},
            forward=self.lower,
            backward=self.lower_backward,
            inference=self.lower,
            partition=self.partition,
        )
        return backend(graph_module, inputs)

    def partition(self, joint: torch.fx.GraphModule, _: object, *, num_fwd_outputs: int, **__: object) -> object:
        profile = profile_for("cpu")
        built = build_problem(Capture(joint, num_fwd_outputs), cost_model("analytic", profile), profile.granularity)
        sequence = list(range(len(built.problem.ops)))
        if self.twice is not None:  # run this op again before its second reader
            made = built.problem.ops[self.twice].writes[0]
            sequence.insert([k for k, op in enumerate(built.problem.ops) if made in op.reads][1], self.twice)
        if self.repeat:  # recompute what the last backward op reads, right before it
            made = {b for op in built.problem.ops if not op.once for b in op.writes}
            last = built.problem.ops[-1]
            again = [built.problem.writer[b] for b in last.reads if b in made]
            sequence[-1:] = [*again, sequence[-1]]
        scheduled = Schedule(tuple(sequence)).apply(built)
        before = simulate(lower(scheduled.graph_module, built.problem, scheduled.forward_nodes).program).peak
        self.fused = Fuse(lowering=self.lowering).apply(scheduled, built.problem)
        after = self.fused.scheduled
        after.graph_module.graph.lint()
        program = lower(after.graph_module, self.fused.problem, after.forward_nodes).program
        self.peaks = before, simulate(program).peak
        return Split(num_fwd_outputs).apply(after, joint)

    def lower(self, graph_module: torch.fx.GraphModule, inputs: object) -> Executable:
        return self._executable(graph_module, len(graph_module.graph.nodes))

    def lower_backward(self, graph_module: torch.fx.GraphModule, inputs: object) -> Executable:
        return self._executable(graph_module, 0)

    def _executable(self, graph_module: torch.fx.GraphModule, forward_nodes: int) -> Executable:
        assert self.fused is not None
        return Executable(graph_module, lower(graph_module, self.fused.problem, forward_nodes))


def gradients(model: nn.Module, step: object, *inputs: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = step(*inputs)  # type: ignore[operator]
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]


CASES = {
    "transformer": (Head, lambda: (torch.randn(2, 6, 16), torch.randint(0, 24, (2, 6)))),
    "convolutions": (Convolutions, lambda: (torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,)))),
}


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_eager_lowering_is_bit_identical(case: str, repeat: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    make, draw = CASES[case]
    model, inputs = make(), draw()
    backend = FusedBackend(repeat)
    expected = gradients(model, model, *inputs)
    found = gradients(model, torch.compile(model, backend=backend), *inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    assert backend.fused is not None and backend.fused.calls
    assert backend.peaks == (backend.fused.plan.peak_before, backend.fused.plan.peak_after)
    assert backend.peaks[1] <= backend.peaks[0]
    assert backend.fused.plan.moved_after < 0.9 * backend.fused.plan.moved_before


def test_repeated_layers_share_one_kernel() -> None:
    torch._dynamo.reset()
    model = Head()
    backend = FusedBackend()
    gradients(model, torch.compile(model, backend=backend), torch.randn(2, 6, 16), torch.randint(0, 24, (2, 6)))
    assert backend.fused is not None
    names = [call.__name__ for call in backend.fused.calls]
    assert len(names) - len(set(names)) >= 1


def test_inductor_lowering_agrees_to_rounding() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, inputs = CASES["transformer"][0](), CASES["transformer"][1]()
    expected = gradients(model, model, *inputs)
    found = gradients(model, torch.compile(model, backend=FusedBackend(lowering="inductor")), *inputs)
    for a, b in zip(expected, found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Looked(nn.Module):
    """An embedding whose sum with positions is normalised, and a kernel between two products."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(24, 16, padding_idx=0), nn.Parameter(torch.randn(6, 16))
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(self.norm(self.words(ids) + self.places)))).mean()


@pytest.mark.parametrize("lowering", ["inductor", "eager"])
def test_embeddings_join_and_lone_kernels_are_regions_of_the_cpu(lowering: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, ids = Looked(), torch.randint(0, 24, (2, 6))
    backend = FusedBackend(lowering=lowering)
    compiled = torch.compile(model, backend=backend)
    expected = gradients(model, model, ids)
    for _ in range(2):  # the second time without a look at how operands lie
        for a, b in zip(expected, gradients(model, compiled, ids), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert backend.fused is not None
    targets = [str(n.target) for n in backend.fused.scheduled.graph_module.graph.nodes]
    assert ("aten.gelu.default" in targets) == (lowering == "eager")
    assert "aten.embedding.default" not in targets


def test_a_region_refuses_operands_that_lie_otherwise() -> None:
    x = torch.randn(4, 6)
    graph = torch_compat.trace_fake(lambda x: (x.sin().cos(),), [torch_compat.FakeTensorMode().from_tensor(x)])
    region = FusedRegion(Region.from_graph_module(graph), "eager")
    torch.testing.assert_close(region(x), x.sin().cos())
    for other in (torch.randn(6, 4).t(), torch.randn(4, 7), x.double()):
        with pytest.raises(AssertionError):
            region(other)


def test_fusion_frees_bytes_that_the_planner_spends() -> None:
    """At the same budget the fused plan is bit-identical with eager's regions, within the budget, and no slower."""
    torch.manual_seed(0)
    model, inputs = Head(width=32), (torch.randn(4, 24, 32), torch.randint(0, 24, (4, 24)))
    expected = gradients(model, model, *inputs)
    times = []
    for fused in (False, True):
        torch._dynamo.reset()
        options = {
            "memory_budget": "75%",
            "runtime_estimator": "analytic",
            "fusion.enabled": fused,
            "lowering": "eager",
        }
        found = gradients(model, torch.compile(model, backend="memplan", options=options), *inputs)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        planned = recent_plans()[-1]
        assert planned.budget is None or planned.timeline.peak <= planned.budget
        assert (planned.fused is not None) == fused
        times.append(planned.timeline.time)
    assert times[1] <= times[0]


class Wordy(nn.Module):
    """Has what every rewrite looks for: attention written out, an MLP, a loss over a vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.block, self.head = nn.Linear(16, 48), Block(16), nn.Linear(16, 512)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unsqueeze(1).chunk(3, -1)
        mixed = torch.softmax(q @ k.transpose(-2, -1) * 0.25, -1) @ v
        return F.cross_entropy(self.head(self.block(mixed.squeeze(1))).flatten(0, 1), y.flatten())


def test_rewrites_are_weighed_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what runs is compiled, each region once; no problem is solved twice under one budget."""
    compiled: list[str] = []
    solved: list[tuple[Problem, int | None]] = []
    solve = seek.solve

    def compile_region(region: Region, chosen: str | None = None) -> CompiledRegion:
        compiled.append(region.key)
        return compile_eager(region)

    def counted(problem: Problem, budget: int | None, *others: Any) -> Plan:
        solved.append((problem, budget))
        return solve(problem, budget, *others)

    monkeypatch.setattr(lowering, "compile_region", compile_region)
    monkeypatch.setattr(seek, "solve", counted)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs = Wordy(), (torch.randn(4, 128, 16), torch.randint(0, 512, (4, 128)))
    options = {"memory_budget": "40%", "runtime_estimator": "analytic", "fusion.enabled": True}
    found = gradients(model, torch.compile(model, backend="memplan", options=options), *inputs)
    torch.testing.assert_close(found, gradients(model, model, *inputs), rtol=1e-4, atol=1e-5)
    planned = recent_plans()[-1]
    assert planned.fused is not None and planned.plan.budget is not None
    assert sorted(compiled) == sorted({call.region.key for call in planned.fused.calls})
    assert len({problem for problem, _ in solved}) > 2  # of the graph as it is, and rewritten
    assert all(solved.count(once) == 1 for once in solved)


class Written(nn.Module):
    """GELU as a formula: each of its steps saves a tensor for the backward."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            h = up(x)
            x = x + down(0.5 * h * (1.0 + torch.tanh(0.8 * (h + 0.04 * h.pow(3)))))
        return x.square().mean()


def test_without_a_budget_what_runs_again_for_nothing_is_not_held() -> None:
    torch.manual_seed(0)
    model, x = Written(), torch.randn(512, 32)
    expected = gradients(model, model, x)
    held = []
    for fused in (False, True):
        torch._dynamo.reset()
        options = {"runtime_estimator": "analytic", "fusion.enabled": fused, "lowering": "eager"}
        found = gradients(model, torch.compile(model, backend="memplan", options=options), x)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        planned = recent_plans()[-1]
        assert planned.budget is None and planned.plan.budget is None
        held.append(planned.timeline.peak)
    assert planned.plan.recomputed
    assert held[1] < 0.8 * held[0]


class Mixed(nn.Module):
    """Casts inside regions: what they hold within is not what goes in or out."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(64, 64).double(), nn.Linear(64, 64).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.high(self.low(x.double()).sin().bfloat16()).float().softmax(-1).square().sum()


def test_the_workspace_of_regions_is_counted_and_what_a_refusal_names_is_kept() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    options = {"fusion.enabled": True, "lowering": "eager", "solver_work": 0.02}

    def run(budget: int) -> tuple[Any, nn.Module]:
        torch._dynamo.reset()
        model = Mixed()
        step = torch.compile(model, backend="memplan", options=options | {"memory_budget": budget})
        step(x).backward()
        return step, model

    with pytest.raises(BudgetInfeasibleError) as refused:
        run(1)
    assert refused.value.smallest is not None
    step, model = run(refused.value.smallest)

    def once() -> None:
        step(x).backward()
        model.zero_grad(set_to_none=True)

    above = peak_above(once, warm_ups=2)
    planned = recent_plans()[-1]
    assert planned.timeline.peak <= refused.value.smallest
    assert above <= planned.timeline.peak - planned.problem.resident_bytes


class Scaled(nn.Module):
    """Two products of one scaled operand."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(64))
        self.left, self.right = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * self.scale
        return (self.left(scaled) * self.right(scaled)).sum()


def test_runs_of_one_op_that_a_region_unites_make_one_result():
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(96, 64)
    expected = torch.autograd.grad(model(x), list(model.parameters()))
    torch._dynamo.reset()
    backend = FusedBackend(twice=0)
    found = torch.autograd.grad(torch.compile(model, backend=backend)(x), list(model.parameters()))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)
    assert backend.fused is not None
    first = [unit for unit in backend.fused.plan.regions if 0 in unit]
    assert first and len(first[0]) >= 2
    for node in backend.fused.scheduled.graph_module.graph.nodes:
        made = [u.meta[BUFFER] for u in node.users if u.op == "call_function" and u.target is operator.getitem]
        assert len(set(made)) == len(made)


@pytest.mark.parametrize(("norm", "joins"), ((lambda: nn.LayerNorm(32), True), (lambda: nn.GroupNorm(4, 32), False)))
def test_a_norm_under_autocast_joins_a_region_whose_statistics_are_the_kernels(
    norm: Callable[[], nn.Module], joins: bool
) -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Linear(32, 32), norm(), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = self.first(x)
                return (y + F.relu(self.second(self.norm(y.sin())))).float()  # the norm's backward stands in a sum

    torch.manual_seed(0)
    model, x = Narrow(), torch.randn(8, 32)
    gradients = []
    for run in (model, torch.compile(model, backend="memplan", options={"fusion.enabled": True})):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, eager in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, eager, rtol=5e-2, atol=5e-2 * float(eager.abs().max()))
    targets = [n.target for n in recent_plans()[-1].scheduled.graph_module.graph.nodes]
    assert (set(NORMS).isdisjoint(targets)) == joins

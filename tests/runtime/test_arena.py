"""The arena: the same bits as without, exact offsets, and no byte shared by two living tensors whatever the user does."""

from __future__ import annotations

import copy
import gc
import os
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from memplan.backend import recent_plans
from memplan.build_problem import TANGENTS
from memplan.place import SCALAR, Kernel, Layout, fitted, place, with_temporaries
from memplan.program import Program, Step, StepKind, Storage
from memplan.runtime import arena, native
from memplan.runtime.kernels import addresses, matched

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler builds arena.cpp here")


class Net(nn.Module):
    """Convolution, normalisation, attention and a loss: kernels with ``out=`` forms and without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(images))).flatten(2).transpose(1, 2)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.out(torch.nn.functional.gelu(x).mean(1)).logsumexp(-1).mean()


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(
        model, backend="memplan", options={"runtime_estimator": "analytic", "placement.enabled": True, **options}
    )


def pool() -> arena.Pool:
    """The arenas of the function compiled last."""
    gc.collect()
    program = recent_plans()[-1].lowered.program
    return next(p for p in arena.Pool.all() if p.program is program)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().train()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def step(run: Any, model: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = run(images(seed))
    loss.backward()
    return [loss.detach(), *gradients(model), *(b.clone() for b in model.buffers())]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def reference(model: nn.Module, seeds: range) -> list[list[torch.Tensor]]:
    twin = copy.deepcopy(model)
    run = compiled(twin, **{"placement.enabled": False})
    return [step(run, twin, seed) for seed in seeds]


def test_same_bits_and_all_in_one_place(net: Net) -> None:
    wanted = reference(net, range(4))
    run = compiled(net)
    for seed in range(4):
        assert_same(step(run, net, seed), wanted[seed])
    seen = pool().statistics()
    assert seen.arenas == 1 and seen.refused == 0
    program = pool().program
    made = [program.storages[s].size for step in program.steps if step.name != TANGENTS for s in step.makes]
    assert seen.unplaced == sum(size <= SCALAR for size in made)  # the loss, which the user may keep, is one of them
    assert seen.results > 30 and seen.placed > 3 * seen.results
    net.zero_grad(set_to_none=True)
    assert native.library().arena_state(pool()._arenas[0]) == 0


def test_height_is_the_placements(net: Net) -> None:
    run = compiled(net)
    step(run, net)
    planned = recent_plans()[-1]
    assert planned.layout is not None
    assert planned.layout.fragmentation <= 0.01
    assert planned.layout.held(planned.lowered.program) <= planned.plan.peak + planned.layout.outside
    assert pool().statistics().height == pool().layout.height


def test_kept_gradients_and_losses_are_never_overwritten(net: Net) -> None:
    wanted = reference(net, range(5))
    run = compiled(net)
    kept = []
    for seed in range(5):
        loss = run(images(seed))
        loss.backward()
        kept.append([loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
        net.zero_grad(set_to_none=True)
    count = len(kept[0])
    for seed in range(5):
        assert_same(kept[seed], wanted[seed][:count])


def test_accumulated_gradients(net: Net) -> None:
    sums: list[torch.Tensor] | None = None
    for found in reference(net, range(4)):
        found = found[1 : 1 + len(list(net.parameters()))]
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
    run = compiled(net)
    for seed in range(4):
        run(images(seed)).backward()
    assert sums is not None
    assert_same(gradients(net), sums)


def test_interleaved_forwards_have_their_own(net: Net) -> None:
    net.norm.momentum = 0.0
    wanted = reference(net, range(3))
    run = compiled(net)
    step(run, net)
    losses = [run(images(seed)) for seed in range(3)]
    assert pool().statistics().arenas == 3
    for seed in (1, 0, 2):
        net.zero_grad(set_to_none=True)
        losses[seed].backward()
        assert_same(gradients(net), wanted[seed][1 : 1 + len(list(net.parameters()))])
    del losses
    net.zero_grad(set_to_none=True)
    step(run, net)
    assert pool().statistics().arenas == 1


def test_forward_without_backward_returns_its_arena(net: Net) -> None:
    run = compiled(net)
    step(run, net)
    for seed in range(4):
        run(images(seed))  # dropped with its graph
    assert pool().statistics().arenas == 1


def test_retained_graph_runs_backward_twice(net: Net) -> None:
    with torch._functorch.config.patch(donated_buffer=False):  # else AOTAutograd refuses to retain the graph
        run = compiled(net)
        step(run, net)
        net.zero_grad(set_to_none=True)
        loss = run(images())
        loss.backward(retain_graph=True)
        first = gradients(net)
        net.zero_grad(set_to_none=True)
        loss.backward()
    assert_same(gradients(net), first)
    assert pool().statistics().refused > 0  # the second backward found its saved tensors where the first left them


def test_exception_in_a_kernel_leaves_the_next_step_whole(net: Net) -> None:
    wanted = reference(net, range(1))
    fail = False

    @torch.library.custom_op("memplan_test::may_fail", mutates_args=())
    def may_fail(x: torch.Tensor) -> torch.Tensor:
        if fail:
            raise RuntimeError("on purpose")
        return x.clone()

    may_fail.register_fake(lambda x: torch.empty_like(x))
    may_fail.register_autograd(lambda context, gradient: gradient)
    twin = copy.deepcopy(net)

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = twin

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return may_fail(self.net(x))

    model = Failing()
    run = compiled(model)
    twin.norm.momentum = 0.0
    step(run, model)
    fail = True
    with pytest.raises(RuntimeError, match="on purpose"):
        run(images())
    fail = False
    found = step(run, model)
    assert_same(found[: len(found) - 3], wanted[0][: len(found) - 3])
    assert pool().statistics().arenas == 1


def test_threads_have_their_own(net: Net) -> None:
    net.eval()
    run = compiled(net)
    with torch.no_grad():
        wanted = [run(images(seed)) for seed in range(4)]
        found: dict[int, list[torch.Tensor]] = {}

        def work(seed: int) -> None:
            with torch.no_grad():
                found[seed] = [run(images(seed)) for _ in range(20)]

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(value, wanted[seed]) for seed in range(4) for value in found[seed])


def test_off_and_released(net: Net) -> None:
    before = len(arena.Pool.all())
    step(compiled(net, **{"placement.enabled": False}), net)
    assert recent_plans()[-1].layout is None
    run = compiled(net)
    for seed in range(2):
        step(run, net, seed)
    net.zero_grad(set_to_none=True)
    arena.release_idle()
    assert pool().statistics().arenas == 0
    assert_same(step(run, net)[:1], [run(images()).detach()])
    assert len(arena.Pool.all()) <= before + 1


def test_another_function_takes_over_what_idles(net: Net) -> None:
    twin = copy.deepcopy(net)
    run, other = compiled(net), compiled(twin, solver_seed=1)  # of equal options dynamo would make one function
    step(run, net)
    step(run, net)
    first = pool()
    assert first.statistics().arenas == 1
    net.zero_grad(set_to_none=True)
    step(other, twin)
    assert first.statistics().arenas == 0


def test_an_interrupt_before_the_first_kernel_ends_the_run(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    run = compiled(net)
    wanted = step(run, net)
    library = native.library()
    assert library is not None
    begin = library.begin

    def interrupted(*given: Any) -> None:
        begin(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(images())
    monkeypatch.undo()
    assert library.running() is None
    net.norm.load_state_dict(Net().norm.state_dict())
    assert_same(step(run, net), wanted)


@pytest.mark.skipif(torch.version.cuda is not None, reason="autograd of a build with CUDA refuses to run after a fork")
def test_a_forked_process_uses_its_copy(net: Net) -> None:
    run = compiled(net)
    wanted = step(run, net)
    step(run, net)
    child = os.fork()
    if child == 0:
        same = all(torch.equal(a, b) for a, b in zip(step(run, net)[:1], wanted[:1], strict=True))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_same(step(run, net)[:1], wanted[:1])


def _three_steps() -> tuple[Program, Layout]:
    """Storage 0 lives throughout at [0, 128); the middle step makes storage 1 at [128, 256)."""
    steps = (
        Step(StepKind.RUN, "first", makes=(0,)),
        Step(StepKind.RUN, "middle", reads=(0,), makes=(1,)),
        Step(StepKind.RUN, "last", reads=(0, 1), frees=(0, 1)),
    )
    program = Program((Storage("zero", 128), Storage("one", 128)), (), steps)
    return program, place(program, {1: 192}, 0)


def test_temporaries_use_a_results_place_until_it_exists() -> None:
    program, layout = _three_steps()
    assert layout.height == 128 + 128 + 192
    moved = replace(layout, offsets={0: 0, 1: 128}, height=320)
    before, across, after = (190, 0, 2), (64, 1, 4), (128, 5, 6)
    kernel = Kernel((before, across, after), results={1: 3})
    grown, found = with_temporaries(program, moved, {1: kernel})
    assert found == {1: [128, 320, 256]}  # the first takes the result's place and what is free behind it
    assert grown.height == 384 == kernel.end(found[1])


def test_a_layout_too_high_for_temporaries_is_made_anew_with_room_in_one_piece() -> None:
    program, layout = _three_steps()
    kernel = Kernel(((128, 0, 2), (192, 1, 4)), results={1: 3})  # 192 beside the result, and before it 320
    held, found = fitted(program, layout, {1: kernel})
    assert kernel.one_piece == 320
    spans = [*((held.offsets[s], held.offsets[s] + 128) for s in (0, 1)), *zip(found[1], (128, 192), strict=True)]
    assert held.height <= 128 + 128 + 320
    assert found[1][1] >= spans[0][1] or found[1][1] + 192 <= spans[0][0]
    beside, _ = fitted(program, layout, {}, frozenset({1}), past=64)
    assert 1 not in beside.offsets and 1 not in beside.workspaces
    assert (beside.height, beside.unseen) == (128, 64)


class Bags(nn.Module):
    """Kernels with results of no bytes, and norms that run again without their statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(50, 48, mode="sum")
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(48, 48), nn.BatchNorm1d(48)) for _ in range(6))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        x = self.bags(rows)
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x)).sin()
        return x.square().mean()


def test_bags_and_norms_that_run_again_are_placed() -> None:
    torch.manual_seed(0)
    model, rows = Bags().train(), torch.randint(0, 50, (2048, 4))
    run = compiled(model, memory_budget="60%")
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        run(rows).backward()
    program, seen = pool().program, pool().statistics()
    assert any("embedding_bag" in step.name for step in program.steps)
    assert any(step.recompute and "batch_norm" in step.name for step in program.steps)
    assert not pool().off and not pool()._missed
    assert seen.arenas == 1 and seen.refused == 0


def test_the_run_takes_what_measured_kernels_foretold(net: Net) -> None:
    run = compiled(net, runtime_estimator="profile")
    for _ in range(2):
        step(run, net)
    planned = recent_plans()[-1]
    assert planned.layout is not None
    assert pool().statistics().height == planned.layout.height
    assert pool().statistics().refused == 0


def test_a_kernel_that_allocates_otherwise_is_told_from_one_that_leaves_results_out() -> None:
    program, _ = _three_steps()
    wide = replace(program, steps=(replace(program.steps[0], makes=(0, 1)), *program.steps[1:]))
    allocations = [native.Allocation(4096, 128, 0, 9), native.Allocation(8192, 512, 1, 2)]
    seen = matched(wide, 0, (4096, None), allocations)
    assert seen is not None and seen.results == {0: 0} and seen.own == [1]
    assert matched(wide, 0, (4096, 12), allocations) is None
    assert addresses((torch.empty(0), None, [torch.ones(2)]))[:2] == (0, None)

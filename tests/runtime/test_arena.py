"""The arena: the same bits as without, exact offsets, and no byte shared by two living tensors whatever the user does."""

from __future__ import annotations

import copy
import gc
import math
import os
import threading
from typing import Any

import pytest
import torch
from torch import nn

from memplan.backend import recent_plans
from memplan.build_problem import TANGENTS
from memplan.place import SCALAR, Region, place_temporaries
from memplan.runtime import arena, native

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


def test_temporaries_use_a_results_place_until_it_exists() -> None:
    before, across, after = (100, 0, 2), (64, 1, 4), (128, 5, 6)
    result, rest = Region(0, 128, until=3), Region(1024, 192, until=math.inf)
    assert place_temporaries([before, across, after], [result, rest]) == [0, 1024, 1024]
    assert place_temporaries([(256, 0, 9)], [result, rest]) == [-1]

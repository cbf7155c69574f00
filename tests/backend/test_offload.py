"""Offload end to end: the same bits as without, and the measured peak is the predicted one."""

from __future__ import annotations

import copy
import gc
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memplan import planner, seek
from memplan.backend import recent_plans
from memplan.cost import links
from memplan.errors import OptionError, TierError
from memplan.options import Options
from memplan.plans import Plan
from memplan.problem import Problem, Tier
from memplan.program import Program
from memplan.runtime import native
from memplan.runtime.arena import Pool
from tests.idle import becomes_idle
from tests.peak import peak_above
from tests.stays import with_stays

OPTIONS = {"runtime_estimator": "analytic", "swap.tiers": "disk", "memory_budget": "100%", "verify": False}


class Net(nn.Module):
    """Attention, dropout and a branch whose views are read on both sides of a stay."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(64, 128)
        self.attend = nn.MultiheadAttention(128, 4, batch_first=True)
        self.norm = nn.LayerNorm(128)
        self.out = nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.inside(x))
        x = self.norm(x + self.attend(x, x, x, need_weights=False)[0])
        x = nn.functional.dropout(nn.functional.gelu(x), 0.1, self.training)
        left, right = self.out(x.transpose(1, 2).reshape(x.shape)).chunk(2, -1)
        return (left * right.sigmoid()).logsumexp(-1).mean()


@pytest.fixture
def offloading(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every plan sends what it saves to the disk, without a budget that would ask for it."""
    solve = seek.solve
    tiers = (Tier("disk", 1 << 40, 1e3, 1e3, 10.0),)
    monkeypatch.setattr(planner, "slower_tiers", lambda *_: tiers)

    def solved(problem: Problem, *args: Any) -> Plan:
        return with_stays(problem, solve(problem, *args))

    monkeypatch.setattr(seek, "solve", solved)
    yield


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="memplan", options=OPTIONS | options)


def inputs(seed: int = 0, batch: int = 8) -> torch.Tensor:
    return torch.randn(batch, 64, 64, generator=torch.Generator().manual_seed(seed))


def step(run: Any, model: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = run(inputs(seed))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().train()


@pytest.fixture
def wanted(net: Net) -> list[list[torch.Tensor]]:
    twin = copy.deepcopy(net)
    run = compiled(twin, **{"swap.enabled": False})
    return [step(run, twin, seed) for seed in range(4)]


def test_same_bits(wanted: list[list[torch.Tensor]], net: Net, offloading: None) -> None:
    run = compiled(net)
    for seed in range(4):
        assert_same(step(run, net, seed), wanted[seed])
    planned = recent_plans()[-1]
    assert len(planned.plan.offloads) >= 8
    assert planned.timeline.peak < planned.plan.unplanned_peak


@pytest.mark.parametrize("ahead", [0, 1, 12])
def test_same_bits_however_early(
    ahead: int, wanted: list[list[torch.Tensor]], net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = seek.solve
    monkeypatch.setattr(planner, "slower_tiers", lambda *_: (Tier("disk", 1 << 40, 1e3, 1e3, 10.0),))
    monkeypatch.setattr(seek, "solve", lambda problem, *rest: with_stays(problem, solve(problem, *rest), ahead=ahead))
    run = compiled(net)
    for seed in range(2):
        assert_same(step(run, net, seed), wanted[seed])
    assert recent_plans()[-1].plan.offloads


def measured_peak(net: Net, run: Any) -> int:
    """Bytes above what is held before a step, once the first two have been run."""
    x = inputs()

    def once() -> None:
        run(x).backward()
        net.zero_grad(set_to_none=True)

    return peak_above(once, warm_ups=2)


def test_measured_peak_is_the_predicted_one(net: Net, offloading: None) -> None:
    measured = measured_peak(net, compiled(net, runtime_estimator="profile"))
    planned = recent_plans()[-1]
    above = planned.timeline.peak - planned.problem.resident_bytes
    assert 0.97 * above <= measured <= above


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler builds arena.cpp here")
def test_measured_peak_in_an_arena(net: Net, offloading: None) -> None:
    run = compiled(net, memory_budget="130%", runtime_estimator="profile", **{"placement.enabled": True})
    measured = measured_peak(net, run)
    planned = recent_plans()[-1]
    gc.collect()
    (pool,) = [pool for pool in Pool.all() if pool.program is planned.lowered.program]
    assert not pool.off
    assert planned.problem.resident_bytes + measured <= pool.layout.held(pool.program) <= (planned.budget or 0)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_solvers_own_plan(
    recompute: bool, wanted: list[list[torch.Tensor]], net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = (Tier("disk", 1 << 30, 1e9, 1e9, 0.0),)
    monkeypatch.setattr(planner, "slower_tiers", lambda *_: fast)  # the test's plan does not hang on this disk's speed
    run = compiled(net, memory_budget="80%", solver_work=0.2, **{"recompute.enabled": recompute})
    for seed in range(2):
        assert_same(step(run, net, seed), wanted[seed])
    planned = recent_plans()[-1]
    assert planned.plan.offloads and planned.timeline.peak <= 0.8 * planned.plan.unplanned_peak
    assert planned.timeline.time == pytest.approx(planned.plan.time)
    assert Program.from_json(planned.lowered.program.to_json()) == planned.lowered.program
    assert planned.stores["disk"].traffic.bytes_in > 0 and becomes_idle(planned.stores["disk"].space)


def test_in_an_arena(wanted: list[list[torch.Tensor]], net: Net, offloading: None) -> None:
    run = compiled(net, **{"placement.enabled": True})
    for seed in range(4):
        assert_same(step(run, net, seed), wanted[seed])


def test_fusion_gives_way(wanted: list[list[torch.Tensor]], net: Net, offloading: None) -> None:
    run = compiled(net, **{"fusion.enabled": True})
    assert_same(step(run, net, 0), wanted[0])
    assert recent_plans()[-1].fused is None


def test_several_forwards_before_their_backwards(wanted: list[list[torch.Tensor]], net: Net, offloading: None) -> None:
    run = compiled(net)
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        losses.append(run(inputs(seed)))
    for seed in (1, 0, 2):
        net.zero_grad(set_to_none=True)
        losses[seed].backward()
        assert_same([losses[seed].detach(), *(p.grad for p in net.parameters() if p.grad is not None)], wanted[seed])
    del losses
    gc.collect()
    assert becomes_idle(recent_plans()[-1].stores["disk"].space)


def test_a_retained_graph(net: Net, offloading: None) -> None:
    run = compiled(net)
    loss = run(inputs())
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    loss.backward()
    assert_same([p.grad for p in net.parameters() if p.grad is not None], [2 * grad for grad in once])


def test_forward_without_backward(wanted: list[list[torch.Tensor]], net: Net, offloading: None) -> None:
    run = compiled(net)
    for _ in range(4):
        run(inputs())
    store = recent_plans()[-1].stores["disk"]
    gc.collect()
    assert becomes_idle(store.space) and 0 < store.file(0).size <= store.space.height
    assert_same(step(run, net, 1), wanted[1])


def test_two_threads_and_a_copied_model(wanted: list[list[torch.Tensor]], net: Net, offloading: None) -> None:
    run = compiled(net)
    twin = copy.deepcopy(net)
    other = torch.compile(twin, backend="memplan", options=OPTIONS)
    step(run, net), step(other, twin)
    found: dict[int, list[list[torch.Tensor]]] = {}

    def work(which: int, call: Any, model: nn.Module) -> None:
        found[which] = [_without_dropout_seed(call, model, seed) for seed in range(3)]

    threads = [threading.Thread(target=work, args=(0, run, net)), threading.Thread(target=work, args=(1, other, twin))]
    for model in (net, twin):
        model.eval()
    for k, model in enumerate((net, twin)):
        _without_dropout_seed((run, other)[k], model, 0)  # compiled for eval before the threads start
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, two in zip(found[0], found[1], strict=True):
        assert_same(one, two)


def _without_dropout_seed(call: Any, model: nn.Module, seed: int) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = call(inputs(seed))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_dynamic_shapes(net: Net, offloading: None) -> None:
    net.eval()
    run = torch.compile(net, backend="memplan", options=OPTIONS, dynamic=True)
    for batch in (8, 11):
        x = inputs(batch, batch)
        net.zero_grad(set_to_none=True)
        net(x).backward()
        wanted = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        net.zero_grad(set_to_none=True)
        run(x).backward()
        for p, want in zip(net.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-6)


def test_disk_full_in_a_step(wanted: list[list[torch.Tensor]], net: Net, offloading: None, tmp_path: Path) -> None:
    run = compiled(net, **{"swap.directory": str(tmp_path)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run(inputs())  # plans, and fills the file
    store = recent_plans()[-1].stores["disk"]
    store.failed(store.file(0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (store.space.height // 2, hard))
    try:
        with pytest.raises(TierError, match="no room"):
            step(run, net)
        assert becomes_idle(store.space)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(step(run, net, 2), wanted[2])
    assert not list(tmp_path.iterdir())


def test_file_truncated_between_forward_and_backward(
    wanted: list[list[torch.Tensor]], net: Net, offloading: None
) -> None:
    run = compiled(net)
    loss = run(inputs())
    store = recent_plans()[-1].stores["disk"]
    os.ftruncate(store.file(0).descriptor, 0)
    with pytest.raises(TierError, match="truncated"):
        loss.backward()
    del loss
    assert_same(step(run, net, 1), wanted[1])


def test_forked_between_forward_and_backward(
    wanted: list[list[torch.Tensor]], net: Net, offloading: None, tmp_path: Path
) -> None:
    """The child may not read what its parent goes on to overwrite; a step of its own works, in a file of its own."""
    run = compiled(net, **{"swap.directory": str(tmp_path)})
    step(run, net)
    torch.manual_seed(1)
    net.zero_grad(set_to_none=True)
    loss = run(inputs(1))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            try:
                loss.backward()
            except TierError as error:
                code = 2 if "fork" in str(error) else 3
            found = step(run, net, 2)
            same = all(torch.equal(a, b) for a, b in zip(found, wanted[2], strict=True))
            code = 0 if code == 2 and same else code
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    loss.backward()
    assert_same([loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)], wanted[1])
    assert not list(tmp_path.iterdir())


def test_exception_in_the_middle_of_a_step(
    wanted: list[list[torch.Tensor]], net: Net, offloading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error from a kernel itself: the index it is given lies outside the table."""
    table = nn.Embedding(4, 64)
    model = nn.Sequential(net)

    def forward(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return model(x + torch.tanh(x)) + table(index).sum()

    run = torch.compile(forward, backend="memplan", options=OPTIONS)
    good, bad = torch.tensor([1, 2]), torch.tensor([1, 99])
    run(inputs(), good).backward()
    store = recent_plans()[-1].stores["disk"]
    with pytest.raises((IndexError, RuntimeError)):
        run(inputs(), bad)
    gc.collect()
    assert becomes_idle(store.space)
    run(inputs(), good).backward()


def test_interrupted_from_the_keyboard(
    wanted: list[list[torch.Tensor]], net: Net, offloading: None, request: pytest.FixtureRequest
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process begins without it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    run = compiled(net)
    step(run, net)
    store = recent_plans()[-1].stores["disk"]
    interrupted = 0
    for k in range(12):
        timer = threading.Timer(0.001 + 0.002 * k, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            for _ in range(200):
                step(run, net)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        net.zero_grad(set_to_none=True)
        assert_same(step(run, net, 1), wanted[1])
    gc.collect()
    # Python swallows an interrupt that lands in a finaliser: most, not all, of the twelve reach the loop.
    assert interrupted >= 6 and becomes_idle(store.space)


def test_saved_tensors_copied_by_a_hook_are_refused(net: Net, offloading: None) -> None:
    run = compiled(net)
    step(run, net)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = run(inputs())
    with pytest.raises(TierError, match="hooks"):
        loss.backward()


def test_a_budget_on_the_tier(net: Net) -> None:
    with pytest.raises(OptionError, match="unknown tier"):
        compiled(net, memory_budget="80%", **{"swap.tiers": "tape"})(inputs())


def test_the_host_is_no_tier_of_a_cpu(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    links._say_no_host.cache_clear()
    for _ in range(2):
        assert links.slower_tiers(Options(swap_tiers=" host, "), "cpu") == ()
    assert len([r for r in caplog.records if "no tier of a CPU" in r.message]) == 1
    assert links.slower_tiers(Options(), "cpu") == ()

"""Ctrl-C and errors in all parts of a compiled step: nothing stays held, and from a checkpoint the same bits follow."""

from __future__ import annotations

import copy
import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import OPTIMIZERS, same

import memplan
from memplan.problem import Phase
from memplan.program import Program, StepKind
from memplan.runtime.arena import release_idle
from memplan.runtime.execute import Executable
from memplan.solvers.recompute.search import Search
from memplan.step import Step
from tests.idle import becomes_idle

WAYS: dict[str, dict[str, Any]] = {
    "torch allocates": {},
    "arena": {"placement_enabled": True},
    "disk": {"memory_budget": "80%", "states": "disk"},
}


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def fail() -> None:
    raise RuntimeError("a fault")


@pytest.fixture(autouse=True)
def handled(request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process begins without it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))


class Trained:
    """A network with a random op, its optimizer and its compiled step."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(160, 160), nn.Tanh(), nn.Dropout(0.2), nn.Linear(160, 160))
        self.optimizer = OPTIMIZERS["adamw"](self.model.parameters())
        self.data = torch.randn(64, 160), torch.randn(64, 160)
        options = {"runtime_estimator": "analytic", "verify": False} | options
        self.compiled: Step = memplan.compile_step(self.model, nn.functional.mse_loss, self.optimizer, **options)

    def step(self) -> Tensor:
        torch.manual_seed(3)
        return self.compiled(*self.data)

    def save(self) -> tuple[Any, Any]:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def load(self, checkpoint: tuple[Any, Any]) -> None:
        model, optimizer = copy.deepcopy(checkpoint)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    def executable(self) -> Executable:
        return self.compiled._captured[0][0]


def sample(program: Program, each: int = 3) -> list[int]:
    """Steps spread over each phase's runs and each kind of transfer: the first, the last and some between."""
    parts: dict[str, list[int]] = {}
    for at, step in enumerate(program.steps):
        if step.kind not in (StepKind.FREE, StepKind.VIEW):
            parts.setdefault(step.phase if step.kind == StepKind.RUN else step.kind, []).append(at)
    return sorted({found[k * (len(found) - 1) // (each - 1)] for found in parts.values() for k in range(each)})


@contextmanager
def before(executable: Executable, at: int, happens: Callable[[], None]) -> Iterator[None]:
    """Let something happen before the call that does one step of the Program, or after the last one."""
    calls, _ = executable._usual
    place = max(k for k, first in enumerate(calls.steps) if first <= at)
    call = calls.functions[place]

    def struck(slots: Any) -> Any:
        if at == len(executable.program.steps):
            call(slots)
            happens()
        else:
            happens()
            call(slots)

    calls.functions[place] = struck
    try:
        yield
    finally:
        calls.functions[place] = call


def held() -> int:
    """Bytes of all tensors that live."""
    gc.collect()
    release_idle()
    live = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors()}
    return sum(live.values())


def _tensors() -> list[Tensor]:
    """Those with bytes of their own: functorch's wrappers, which other tests may leave behind, have none."""
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    found = [t for t in found if not torch._C._functorch.is_functorch_wrapped_tensor(t)]
    return [t for t in found if t.device.type == "cpu" and t.layout == torch.strided]


@pytest.mark.parametrize("happens", [ctrl_c, fail])
@pytest.mark.parametrize("way", WAYS)
def test_anywhere_in_a_step(way: str, happens: Callable[[], None], tmp_path: Path) -> None:
    options = WAYS[way] | ({"swap.directory": str(tmp_path)} if way == "disk" else {})
    ours = Trained(**options)
    for _ in range(2):
        ours.step()
    checkpoint = ours.save()
    loss = ours.step()
    after = copy.deepcopy(ours.model.state_dict())
    executable = ours.executable()
    ours.load(checkpoint)
    ours.step()
    usual, parts = held(), set()
    for at in sample(executable.program):
        step = executable.program.steps[at]
        parts.add(step.phase if step.kind == StepKind.RUN else step.kind)
        ours.load(checkpoint)
        with before(executable, at, happens), pytest.raises((KeyboardInterrupt, RuntimeError)) as caught:
            ours.step()
        assert "in its middle" in caught.value.__notes__[0]
        del caught
        assert ours.optimizer.state_dict()["state"][0]["step"] == checkpoint[1]["state"][0]["step"]
        ours.load(checkpoint)
        assert torch.equal(ours.step(), loss)
        assert all(torch.equal(v, after[name]) for name, v in ours.model.state_dict().items())
    assert held() <= usual and not list(tmp_path.iterdir())
    assert parts >= set(Phase)
    assert way != "disk" or parts >= {StepKind.OFFLOAD, StepKind.PREFETCH, StepKind.WAIT}
    assert ours.compiled.planned is not None
    assert all(becomes_idle(store.space) for store in ours.compiled.planned.stores.values())


def test_without_a_checkpoint_training_goes_on() -> None:
    """What an interrupt leaves is a mixture of old and new parameters, each a number, and the next step lowers the loss."""
    ours, usual = Trained(), Trained()
    first = ours.step()
    usual.step()
    with before(ours.executable(), len(ours.executable().program.steps), ctrl_c), pytest.raises(KeyboardInterrupt):
        ours.step()
    usual.step()
    assert same(ours.model, usual.model)  # after the last call all of them are updated
    assert ours.step() < first


@pytest.mark.parametrize("whole", [True, False], ids=["compile_step", "torch.compile"])
def test_while_a_plan_is_sought(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver takes Ctrl-C as the end of its search; the program does not go on to train, and the next step plans anew."""
    options = {"memory_budget": "75%", "runtime_estimator": "analytic", "reuse.enabled": False}
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))])
    before, x = copy.deepcopy(model.state_dict()), torch.randn(256, 32)
    if whole:
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        step = memplan.compile_step(model, lambda out, _: out.square().mean(), optimizer, **options)
    else:
        compiled = torch.compile(model, backend="memplan", options=options)
        step = lambda x, _: compiled(x).square().mean()
    said: list[str] = []

    def interrupted(self: Search, text: str, told: Callable[[Search, str], None] = Search.say) -> None:
        said.append(text)
        if len(said) == 1:
            ctrl_c()
        told(self, text)

    monkeypatch.setattr(Search, "say", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(x, None)
    assert said and all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch.isfinite(step(x, None))

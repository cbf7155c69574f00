"""What is traced without running is what runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from memplan import api
from memplan.backend import recent_plans
from memplan.errors import InputError, MemplanError
from memplan.options import Options
from memplan.program import Program
from memplan.realise import realise
from memplan.solving import stored_plan
from tests.peak import peak_above


class Net(nn.Module):
    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.broken = nn.Linear(16, 48), nn.BatchNorm1d(48), nn.Linear(48, 8), broken

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.norm(self.first(x))
        if self.broken:
            torch._dynamo.graph_break()
        return self.last(hidden.relu()).square().mean(), hidden.detach()


def without_sources(program: Program) -> Program:
    return replace(program, storages=tuple(replace(s, source="") for s in program.storages))


@pytest.mark.parametrize("training", [True, False], ids=["train", "inference"])
@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
def test_an_analysis_is_of_the_program_that_a_compiled_step_would_run(broken, training):
    torch._dynamo.reset()
    model, x = Net(broken), torch.randn(64, 16)
    before = recent_plans()  # the last few: a count of them says nothing
    with torch.set_grad_enabled(training):
        torch.compile(model, backend="memplan", options={"runtime_estimator": "analytic"})(x)
    ran = max((p for p in recent_plans() if all(p is not one for one in before)), key=lambda planned: planned.plan.peak)
    program = realise(ran.built, stored_plan(ran.problem), Options()).lowered.program
    analysis = api.analyze(model, (x,), training=training)
    assert without_sources(analysis.program) == without_sources(program)
    assert bool(analysis.notes) == broken


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"args": torch.zeros(2, 4)}, "a tuple or a list, not a Tensor"),
        ({"args": None}, "not a NoneType"),
        ({"optimizer": torch.optim.AdamW}, "unknown optimizer"),
        ({"model": nn.Linear}, "expected a torch.nn.Module, got type"),
        ({"model": Around(nn.LSTM(4, 4))}, "captured no graph"),
    ],
)
def test_what_cannot_be_analysed_is_told_in_a_line(given, said):
    with pytest.raises(MemplanError, match=said):
        api.analyze(**{"model": nn.Linear(4, 4), "args": (torch.zeros(2, 3, 4),)} | given)


@pytest.mark.parametrize("around", [lambda model: model, Around], ids=["torch's class", "a class of one's own"])
def test_a_model_that_cannot_be_analysed_leaves_the_next_one_of_its_class_alone(around):
    """Dynamo skips for good the code in which it found no graph, and wraps torch's own classes in one code object."""
    given = (torch.zeros(2, 3, 4),)
    torch._dynamo.reset()
    before = api.analyze(around(nn.Linear(4, 4)), given)
    torch._dynamo.reset()
    with pytest.raises(MemplanError, match="captured no graph"):
        api.analyze(around(nn.LSTM(4, 4)), given)
    assert api.analyze(around(nn.Linear(4, 4)), given) == before


def test_an_export_that_cannot_be_written_names_the_file_asked_for(tmp_path):
    analysis = api.analyze(nn.Linear(4, 4), (torch.zeros(2, 4),))
    asked = tmp_path / "no" / "folder.json"
    with pytest.raises(OSError, match="folder") as caught:
        analysis.export(asked)
    assert caught.value.filename == str(asked)


def test_of_a_compiled_model_the_model_inside_is_analysed():
    torch._dynamo.reset()
    model, x = Net(broken=False), torch.randn(4, 16)
    plain = api.analyze(model, args=(x,), training=True)
    compiled = api.analyze(torch.compile(model), args=(x,), training=True)
    assert compiled.peak_bytes == plain.peak_bytes and compiled.breakdown == plain.breakdown


def test_lazy_layers_are_told_what_they_lack():
    with pytest.raises(InputError, match="lazy layers"):
        api.analyze(nn.LazyLinear(8), args=(torch.randn(4, 4),))


def test_dropout_is_predicted_as_eager_runs_it():
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.Dropout(0.1), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Linear(256, 1), nn.Flatten(0), nn.Softmax(0)), torch.randn(2048, 256)

    def step() -> None:
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)

    held = x.nbytes + sum(p.nbytes for p in model.parameters())
    analysis = api.analyze(model, (x,))
    assert analysis.peak_bytes == pytest.approx(held + peak_above(step), rel=0.02)
    assert analysis.versions["threads"] == str(torch.get_num_threads())  # on a CPU times depend on them
    # A share is one of what memplan's own step takes without a budget, which keeps those masks as bytes.
    assert api.plan(model, (x,), memory_budget="60%").budget < 0.6 * analysis.peak_bytes

"""``analyze``, ``plan`` and ``frontier`` on a real model, in process."""

from __future__ import annotations

import itertools
import json
import os
import signal

import pytest

from memplan.analysis import Analysis
from memplan.cli import run
from memplan.solvers.recompute import search as recompute_search

pytest.importorskip("torch")

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

def build():
    return Net(), (torch.randn(256, 32),)

def alone():
    return Net()
"""


FAILING = """
class Choose(Block):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Refuse(Block):
    def forward(self, x):
        raise ValueError("no mask")


choose, refuse = Choose(), Refuse()
"""


@pytest.fixture
def entry(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMPLAN_SOLVER_WORK", "0.1")
    return "train.py:build"


def test_analyze_counts_every_byte_and_names_the_lines(entry, capsys):
    assert run(["analyze", entry, "--no-advice", "--optimizer", "adamw", "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert "executing train.py:build" in captured.err
    data = json.loads(captured.out)
    assert data["peak_bytes"] == sum(data["breakdown"].values()) and data["schema_version"] == 1
    assert data["breakdown"]["optimizer"] == 2 * data["breakdown"]["parameter"]
    analysis = Analysis.from_json(captured.out)
    parameters = {b.name: b.module for b in analysis.at_peak if b.category == "parameter"}
    assert parameters["blocks.0.up.weight"] == "blocks.0.up"
    assert {b.source for b in analysis.at_peak if b.category == "activation"} == {"train.py:11"}


def test_what_the_code_prints_is_not_data(entry, tmp_path, capsys):
    with open("train.py", "a") as file:
        file.write("\ndef noisy():\n    print('loading')\n    return build()\n")
    assert run(["analyze", "train.py:noisy", "--no-advice", "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["peak_bytes"] and "loading" in captured.err


@pytest.mark.parametrize(
    ("name", "shape", "line", "said"),
    [
        ("alone", "256x31", "self.up(x)", "b must have same reduction dim"),
        ("choose", "256x32", "x.sum() > 0", "it asks a tensor for its value"),
        ("refuse", "256x32", "raise ValueError", "ValueError: no mask"),
    ],
)
def test_a_forward_that_fails_is_the_models_fault_and_says_where(entry, capsys, name, shape, line, said):
    with open("train.py", "a") as file:
        file.write(FAILING)
    with open("train.py") as file:
        at = next(k for k, text in enumerate(file, start=1) if line in text)
    assert run(["analyze", f"train.py:{name}", "--input", shape, "--no-advice"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and f"the model's forward failed at train.py:{at}: " in captured.err
    assert said in captured.err
    assert "internal error" not in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize("budget", ["", "lots", "-5", "0%", "nan%"])
def test_a_budget_that_cannot_be_read_is_told_before_the_model_is_built(capsys, budget):
    assert run(["plan", "absent.py:build", "--memory-budget", budget]) == 2
    captured = capsys.readouterr().err
    assert "cannot read" in captured and "executing" not in captured


def test_a_refusal_is_a_proof_only_where_the_search_was_not_cut_short(entry, capsys):
    tight = ["plan", entry, "--memory-budget", "75%", "--time-limit", "0"]
    assert run(tight) == 2
    assert "no proof" in capsys.readouterr().err
    assert run([*tight[:3], "1KiB", *tight[4:]]) == 1  # below what any plan can hold: proven without a search
    assert "smallest feasible budget" in capsys.readouterr().err


def test_a_refusal_is_an_answer_on_stdout(entry, tmp_path, monkeypatch, capsys):
    refused = ["plan", entry, "--memory-budget", "1KiB", "--time-limit", "0"]
    assert run([*refused, "--format", "json"]) == 1
    said = capsys.readouterr()
    (model,) = json.loads(said.out)["models"]
    found = model["refused"]
    assert "cannot be kept" in said.err and found["budget_bytes"] == model["limit_bytes"] == 1024
    assert 1024 < found["bound_bytes"] <= found["smallest_feasible_bytes"]
    assert found["tightest"] and "train.py:11" in {b["source"] for b in found["alive"]}

    config = f'[[tool.memplan.model]]\nentry = "{entry}"\nmemory_budget = "1KiB"\n'
    (tmp_path / "pyproject.toml").write_text(config)
    monkeypatch.setenv("MEMPLAN_SOLVER_TIME_LIMIT_S", "0")
    assert run(["check", "--format", "github"]) == 1
    assert capsys.readouterr().out.startswith("::error file=train.py,line=11,")


def test_no_plan_within_the_time_limit_is_a_document_without_an_answer(entry, capsys):
    assert run(["plan", entry, "--memory-budget", "75%", "--time-limit", "0", "--format", "json"]) == 2
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert "no proof" in model["error"] and model["refused"] is None


def test_a_frontier_has_no_point_twice(entry, capsys):
    """Many budgets have one plan; what is left is faster with every byte more, up to the step without a plan, which may
    be no faster than the last."""
    assert run(["frontier", entry, "--points", "8", "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    points = data["frontier"]
    assert 3 <= len(points) <= 8 and points[-1]["peak"] == data["unplanned_peak_bytes"]
    for less, more in itertools.pairwise(points):
        assert less["peak"] < more["peak"]
        assert less["time"] > more["time"] or (more is points[-1] and less["time"] == more["time"])


@pytest.mark.parametrize(("command", "status"), [("plan", 0), ("frontier", 2)])
def test_ctrl_c_ends_a_search_with_its_best_plan_and_a_frontier_without_an_answer(
    entry, tmp_path, monkeypatch, capsys, request, command, status
):
    """As a terminal sends it, at the first word of a solver: the search for a plan ends, a frontier ends altogether."""

    def interrupted(self, text, told=recompute_search.Search.say):
        monkeypatch.setattr(recompute_search.Search, "say", told)
        os.kill(os.getpid(), signal.SIGINT)
        told(self, text)

    monkeypatch.setattr(recompute_search.Search, "say", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process begins without it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    given = ["--memory-budget", "75%"] if command == "plan" else []
    assert run([command, entry, *given, "-o", "answer.json"]) == status
    captured = capsys.readouterr()
    assert "interrupted" in captured.err and bool(captured.out) == (tmp_path / "answer.json").exists() == (status == 0)


def test_a_model_that_is_torchs_own_class_has_one_tree_of_modules(tmp_path, monkeypatch, capsys):
    """Parameters stand at the paths of their ops, though torch calls such a model's forward through a function."""
    (tmp_path / "own.py").write_text("from torch import nn\nmodel = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))\n")
    monkeypatch.chdir(tmp_path)
    assert run(["analyze", "own.py:model", "--input", "4x8", "--no-advice", "--format", "json"]) == 0
    alive = json.loads(capsys.readouterr().out)["at_peak"]
    assert {b["module"] for b in alive if b["category"] == "parameter"} == {"0", "1"}


def test_inference_holds_less_and_inputs_may_be_shapes(entry, capsys):
    peaks = []
    for line in (["train.py:alone", "--input", "256x32"], ["train.py:alone", "--input", "256x32", "--inference"]):
        assert run(["analyze", *line, "--no-advice", "--format", "json"]) == 0
        peaks.append(json.loads(capsys.readouterr().out)["peak_bytes"])
    assert peaks[1] < peaks[0]


def test_analyze_holds_a_limit_and_gives_advice(entry, capsys):
    assert run(["analyze", entry, "--limit", "1GiB"]) == 0
    assert "What would help" in capsys.readouterr().out
    assert run(["analyze", entry, "--limit", "1KiB", "--no-advice", "--format", "github"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("::error file=train.py,line=") and "over the limit" in captured.err


def test_plan_within_a_budget_and_its_export(entry, tmp_path, capsys):
    assert run(["plan", entry, "--memory-budget", "75%", "-o", "plan.json"]) == 0
    shown = capsys.readouterr().out
    assert "recomputing" in shown and "gap" in shown
    analysis = Analysis.load(tmp_path / "plan.json")
    assert analysis.peak_bytes <= 0.75 * analysis.unplanned_peak_bytes == 0.75 * analysis.plan.unplanned_peak
    assert analysis.decisions and analysis.peak_bytes == analysis.plan.peak
    assert run(["export", "plan.json", "--format", "memory-viz"]) == 0
    assert (tmp_path / "plan.pickle").stat().st_size > 1000


def test_a_budget_nothing_fits_is_1_and_says_what_would(entry, capsys):
    assert run(["plan", entry, "--memory-budget", "10KiB"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "smallest feasible budget" in captured.err and " train.py:11" in captured.err


def test_frontier_is_monotone_and_drawn(entry, tmp_path, capsys):
    assert run(["frontier", entry, "--points", "4", "-o", "frontier.html", "--format", "json"]) == 0
    points = json.loads(capsys.readouterr().out)["frontier"]
    assert len(points) >= 3 and all(p["bound"] <= p["time"] for p in points)
    ordered = sorted(points, key=lambda p: p["peak"])
    assert [p["time"] for p in ordered] == sorted((p["time"] for p in points), reverse=True)
    assert "Peak against time" in (tmp_path / "frontier.html").read_text()
    least = str(ordered[0]["peak"])
    assert run(["plan", entry, "--memory-budget", "10KiB", "--format", "json"]) == 1
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert str(model["refused"]["smallest_feasible_bytes"]) == least
    assert run(["plan", entry, "--memory-budget", least]) == 0

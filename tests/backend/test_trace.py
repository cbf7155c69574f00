"""``trace.enabled``: the stages of a graph as files that load again."""

from pathlib import Path

import torch
from torch import nn

from memplan.plans import Plan
from memplan.problem import Problem
from memplan.program import Program
from memplan.validate import validate


def test_every_stage_is_written(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)))
    options = {"memory_budget": "80%", "trace.enabled": True, "trace.dir": str(tmp_path)}
    torch.compile(model, backend="memplan", options=options)(torch.randn(512, 64)).sum().backward()
    folders = list(tmp_path.iterdir())
    stages = {file.stem.partition("-")[2]: file for folder in folders for file in sorted(folder.iterdir())}
    assert list(stages) == [
        "joint",
        "normalised",
        "problem",
        "solved",
        "scheduled",
        "program",
        "plan",
        "forward",
        "backward",
    ]
    validate(Problem.load(stages["problem"]), Plan.load(stages["plan"]))
    assert Program.load(stages["program"]).steps
    assert "gelu" in stages["forward"].read_text()


def test_nothing_is_written_unasked(tmp_path: Path) -> None:
    torch.compile(nn.Linear(4, 4), backend="memplan", options={"trace.dir": str(tmp_path / "off")})(torch.ones(2, 4))
    assert not (tmp_path / "off").exists()

"""``memplan check`` and ``compare`` on real models: configuration, verdicts, and a regression caught in a git repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memplan.cli import run
from memplan.errors import OptionError
from memplan.gate import ModelConfig, config_file, read_config

GATE = Path(__file__).parents[2] / ".github" / "memplan-gate.sh"

MODEL = """\
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, {factor} * width)
        self.down = nn.Linear({factor} * width, width)

    def forward(self, x):
        hidden = self.up(x)
        active = torch.nn.functional.gelu(hidden)
        return x + self.down(active)


class Net(nn.Module):
    def __init__(self, width=128, layers=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def build():
    return Net(), (torch.randn(512, 128),)
"""

CONFIG = """\
[[tool.memplan.model]]
name = "net"
entry = "model.py:build"
limit = "{limit}"
max_regression = "2%"
"""


def test_config_is_read_from_the_folder_or_above(tmp_path):
    (tmp_path / "pyproject.toml").write_text(CONFIG.format(limit="24MiB"))
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    expected = (ModelConfig("model.py:build", "net", "24MiB", "2%"),)
    assert config_file(inner) == config_file(tmp_path / "pyproject.toml")
    assert read_config(config_file(inner)) == expected


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('name = "x"', "no 'entry'"),
        ('entry = "a:b"\nlimits = "1GiB"', "unknown key 'limits'"),
        ('entry = "a:b"\nlimit = "lots"', r"model\[0\]: cannot read 'lots'"),
        ('entry = "a:b"\nlimit = "60%"', "cannot read '60%' as bytes"),
        ('entry = "a:b"\nmemory_budget = "0%"', "cannot read '0%'"),
        ('entry = "a:b"\ninput = 5', "input cannot be 5"),
        ('entry = "a:b"\nmax_regression = "x"', "cannot read"),
        ('entry = "a:b"\ntrain = "yes"', "train cannot be"),
    ],
)
def test_config_that_cannot_be_read_says_why(tmp_path, table, said):
    (tmp_path / "pyproject.toml").write_text(f"[[tool.memplan.model]]\n{table}\n")
    with pytest.raises(OptionError, match=said):
        read_config(tmp_path / "pyproject.toml")


def test_a_config_that_is_not_there_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text(CONFIG.format(limit="24MiB"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="no file or folder absent"):
        config_file(Path("absent"))


def test_check_from_a_folder_below_and_what_each_model_lacks(tmp_path, monkeypatch, capsys):
    """Entries are relative to the pyproject.toml; a budget that nothing keeps is an answer, code that raises is none."""
    (tmp_path / "model.py").write_text(MODEL.format(factor=1))
    tables = {
        "tight": 'entry = "model.py:build"\nmemory_budget = "1KiB"',
        "large": 'entry = "model.py:build"\nlimit = "1KiB"',
        "absent": 'entry = "model.py:absent"',
    }
    config = "".join(f'[[tool.memplan.model]]\nname = "{name}"\n{table}\n' for name, table in tables.items())
    (tmp_path / "pyproject.toml").write_text(config)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert run(["check", "--model", "tight", "--model", "large", "--format", "json"]) == 1
    tight, large = json.loads(capsys.readouterr().out)["models"]
    assert "cannot be kept" in tight["failures"][0] and "over the limit" in large["failures"][0]
    assert run(["check"]) == 2
    told = " ".join(capsys.readouterr().out.split())  # whatever the width that lines are broken for
    assert "absent could not be analysed (1 of 3); tight, large over budget (2 of 3)" in told


def test_nothing_to_check_is_2(tmp_path, capsys):
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert run(["check", "--config", str(tmp_path)]) == 2
    assert "nothing to check" in capsys.readouterr().err


def git(folder: Path, *line: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *line], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Two commits: the second makes the hidden activation half again as wide."""
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "--quiet")
    (folder / "pyproject.toml").write_text(CONFIG.format(limit="1GiB"))
    for factor in (4, 6):
        (folder / "model.py").write_text(MODEL.format(factor=factor))
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "-m", f"factor {factor}")
    return folder


@pytest.fixture(scope="module")
def gate(repository):
    """What the action's script does in that repository, against the first commit."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "BASE_REF": "HEAD~1",
        "FAIL_ON": "peak:2%",
        "COMMENT_FILE": "comment.md",
        "SARIF_FILE": "memplan.sarif",
        "GITHUB_ACTIONS": "true",
        "GITHUB_STEP_SUMMARY": str(repository / "summary.md"),
        "GITHUB_OUTPUT": str(repository / "output"),
    }
    return subprocess.run(
        ["bash", str(GATE)], cwd=repository, env=environment, capture_output=True, text=True, check=False
    )


def test_the_action_stops_a_change_that_makes_an_activation_larger(gate, repository):
    """The annotation, the summary and the SARIF file all point at a line of the block whose activation grew."""
    assert gate.returncode == 1, gate.stderr
    (line,) = [text for text in gate.stdout.splitlines() if text.startswith("::error")]
    assert "file=model.py,line=12," in line or "file=model.py,line=13," in line
    assert "peak grew from" in line
    summary = (repository / "summary.md").read_text()
    assert "❌ memplan: net over budget" in summary and "model.py:1" in summary and "| net |" in summary
    result = json.loads((repository / "memplan.sarif").read_text())["runs"][0]["results"][0]
    place = result["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "model.py" and place["region"]["startLine"] in (12, 13)
    assert "comment-file=" in (repository / "output").read_text()


def test_the_action_leaves_the_repository_as_it_was(gate, repository):
    listed = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1


def test_the_same_code_gives_the_same_numbers_and_a_lower_limit_fails(repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    for name in ("one.json", "two.json"):
        assert run(["check", "-o", name]) == 0
    assert (repository / "one.json").read_text() == (repository / "two.json").read_text()
    assert run(["compare", "one.json", "two.json"]) == 0
    (repository / "tight.toml").write_text(CONFIG.format(limit="1MiB"))
    capsys.readouterr()
    assert run(["check", "--config", "tight.toml", "--format", "json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["models"][0]["failures"] and answer["peak_bytes"] > 1 << 20


def test_a_model_that_cannot_be_loaded_is_2_and_the_others_are_still_judged(repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    broken = '[[tool.memplan.model]]\nname = "gone"\nentry = "model.py:missing"\n'
    (repository / "broken.toml").write_text(CONFIG.format(limit="1GiB") + broken)
    assert run(["check", "--config", "broken.toml", "--format", "json"]) == 2
    models = json.loads(capsys.readouterr().out)["models"]
    assert [m["ok"] for m in models] == [True, False] and "missing" in models[1]["error"]

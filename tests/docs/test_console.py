"""Runs every ``memplan`` command that the guides show; ``MEMPLAN_UPDATE_DOCS=1`` writes what they print into the guides."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from memplan.cli import run

pytest.importorskip("torch")

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
EXIT_1 = {"memplan plan train.py:build --memory-budget 4MiB"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copytree(DOCS / "examples", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["cli.md", "ci.md"])
def test_every_command_of_a_guide_runs(folder, capsys, name):
    guide = DOCS / name
    text = guide.read_text()
    for block in BLOCK.findall(text):
        shown = []
        for line in (part for part in block.splitlines() if part.startswith("$ memplan")):
            command = line.removeprefix("$ ").partition("  #")[0].strip()
            status = run(shlex.split(command)[1:])
            captured = capsys.readouterr()
            assert status == (1 if command in EXIT_1 else 0), captured.err
            shown += [line, *(part.rstrip() for part in (captured.out or captured.err).rstrip().splitlines())]
        if os.environ.get("MEMPLAN_UPDATE_DOCS") and name == "cli.md":
            text = text.replace(block, "\n".join(shown) + "\n")
    if text != guide.read_text():
        guide.write_text(text)

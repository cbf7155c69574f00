"""Runs the recipes of the documentation, each in a process of its own, and checks that something was planned."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
TRAINER, LIGHTNING, AFTERWARDS = re.findall(r"```python\n(.*?)```", (DOCS / "recipes.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("code", "needs"),
    [(TRAINER, ("transformers", "accelerate")), (LIGHTNING, ("lightning",))],
    ids=["trainer", "lightning"],
)
def test_a_recipe_trains_and_is_planned(tmp_path, code, needs):
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MEMPLAN_RUNTIME_ESTIMATOR": "analytic"}
    done = subprocess.run(
        [sys.executable, "-c", code + AFTERWARDS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    planned = re.findall(r"^(\d+) of (\d+) bytes, (\d+) ops run again$", done.stdout, re.MULTILINE)
    assert planned and any(int(peak) < int(unplanned) for peak, unplanned, _ in planned)

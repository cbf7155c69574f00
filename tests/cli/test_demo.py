"""``memplan demo``, smaller than a user runs it."""

from __future__ import annotations

import re

import pytest

from memplan.cli import demo, run

pytest.importorskip("torch")


def test_the_demo_keeps_its_budget_and_says_so(monkeypatch, capsys):
    for name, value in {"_WIDTH": 64, "_LAYERS": 3, "_TOKENS": 128, "_REPEATS": 1}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setenv("MEMPLAN_RUNTIME_ESTIMATOR", "analytic")
    assert run(["demo", "--memory-budget", "80%"]) == 0
    rows = dict(re.findall(r"^(eager|memplan) +([\d.]+) MiB", out := capsys.readouterr().out, re.MULTILINE))
    assert float(rows["memplan"]) < float(rows["eager"])
    assert "predicted" in out and "gradients" in out

"""``memplan demo``, smaller than a user runs it."""

from __future__ import annotations

import re

import pytest

from memplan.cli import demo, run

pytest.importorskip("transformers")


def test_the_demo_keeps_its_budget_and_trains_alike(monkeypatch, capsys):
    for name, value in {"LAYERS": 3, "WIDTH": 64, "HEADS": 4, "TOKENS": 64, "VOCABULARY": 256, "STEPS": 3}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setenv("MEMPLAN_RUNTIME_ESTIMATOR", "analytic")
    assert run(["demo", "--memory-budget", "70%"]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^(?:eager|memplan) +([\d.]+) MiB +\d+ ms +(.+)$", printed, re.MULTILINE)
    (plain, plain_losses), (planned, losses) = rows
    assert float(planned) <= 0.75 * float(plain)
    assert losses == plain_losses
    assert "predicted" in printed

"""A step that ran, recorded: measured beside planned, in the trace as well."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
from torch import nn

import memplan
from memplan.analysis import Analysis
from memplan.report.interchange import chrome_trace


def test_a_recorded_step_shows_what_it_held_beside_its_plan():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)))
    x = torch.randn(1024, 64)
    options = {"memory_budget": "70%", "runtime_estimator": "analytic"}
    run = torch.compile(model, backend="memplan", options=options)

    def step() -> None:
        model.zero_grad()
        run(x).square().mean().backward()

    step()
    model.zero_grad()
    analysis = memplan.record(step)
    assert analysis.plan.recomputed and analysis.unplanned_peak_bytes > analysis.peak_bytes
    assert analysis.measured_peak_bytes == pytest.approx(analysis.peak_bytes, rel=0.1)
    assert analysis.measured_peak_bytes < analysis.unplanned_peak_bytes
    assert "Measured:" in analysis._repr_html_()
    assert Analysis.from_json(analysis.to_json()).measured == analysis.measured

    trace = json.loads(chrome_trace(analysis))
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert names == {1: "memplan: planned", 2: "memplan: without a plan", 3: "memplan: measured"}
    held = [e for e in trace["traceEvents"] if e["pid"] == 3 and e["ph"] == "C"]
    assert max(e["args"]["measured"] for e in held) == trace["otherData"]["measured_peak_bytes"]
    assert [e["ts"] for e in held] == sorted(e["ts"] for e in held)

"""Files for other tools, read back by those tools' own code or rules."""

from __future__ import annotations

import csv
import io
import json
import pickle
import pickletools

import pytest
from samples import planned_analysis, unplanned_analysis

from memplan.analysis import lifetimes
from memplan.report.interchange import buffers_csv, chrome_trace, first_fit, graph_dot, memory_viz

ANALYSES = [unplanned_analysis(), planned_analysis(), unplanned_analysis(layers=0)]


def as_viewer_text(lines: str) -> str:
    return lines


@pytest.mark.parametrize("analysis", ANALYSES)
def test_torchs_viewer_reads_the_snapshot(analysis):
    viewer = pytest.importorskip("torch.cuda._memory_viz")
    snapshot = pickle.loads(memory_viz(analysis))
    assert "total_allocated" in viewer.segsum(snapshot)
    assert f"{len(snapshot['device_traces'][0])} entries" in viewer.trace(snapshot)
    for report in (viewer.segments, viewer.memory):
        assert "<gaps>" not in report(snapshot, format_flamegraph=as_viewer_text)
    assert "trace_plot" in viewer.trace_plot(snapshot) or viewer.trace_plot(snapshot)


@pytest.mark.parametrize("analysis", ANALYSES)
def test_the_snapshot_is_plain_protocol_4_and_tiles_its_segment(analysis):
    raw = memory_viz(analysis)
    opcodes = list(pickletools.genops(raw))
    assert opcodes[0][1] == 4
    assert not {op.name for op, _, _ in opcodes} & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "NEWOBJ"}
    (segment,) = pickle.loads(raw)["segments"]
    at = segment["address"]
    for block in segment["blocks"]:
        assert block["address"] == at and block["size"] > 0
        at += block["size"]
    assert at == segment["address"] + segment["total_size"]


@pytest.mark.parametrize("analysis", ANALYSES)
def test_the_replayed_trace_peaks_where_the_step_does(analysis):
    (trace,) = pickle.loads(memory_viz(analysis))["device_traces"]
    held: dict[int, int] = {}
    peak = 0
    for event in trace:
        if event["action"] == "alloc":
            assert all(event["addr"] + event["size"] <= a or a + s <= event["addr"] for a, s in held.items())
            held[event["addr"]] = event["size"]
            peak = max(peak, sum(held.values()))
        elif event["action"] == "free_completed":
            assert held.pop(event["addr"]) == event["size"]
    assert peak == analysis.peak_bytes - analysis.breakdown.get("workspace", 0)


def test_first_fit_never_overlaps():
    program = planned_analysis().program
    offsets, height = first_fit(program)
    spans = [(x, offsets[x], offsets[x] + program.storages[x.storage].size) for x in lifetimes(program)]
    for k, (a, low, high) in enumerate(spans):
        assert 0 <= low and high <= height
        for b, other_low, other_high in spans[:k]:
            assert a.end <= b.start or b.end <= a.start or high <= other_low or other_high <= low


@pytest.mark.parametrize("analysis", ANALYSES)
def test_the_trace_keeps_the_rules_of_the_trace_event_format(analysis):
    """Required keys by phase of event, monotone counters, slices that do not overlap on a thread."""
    events = json.loads(chrome_trace(analysis))["traceEvents"]
    ends: dict[int, float] = {}
    peaks: dict[int, float] = {}
    for event in events:
        assert {"ph", "pid", "name", "ts"} <= set(event)
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["ts"] >= ends.get(event["pid"], 0.0) - 1e-6
            ends[event["pid"]] = event["ts"] + event["dur"]
        elif event["ph"] == "C":
            assert all(isinstance(v, int) and v >= 0 for v in event["args"].values())
            peaks[event["pid"]] = max(peaks.get(event["pid"], 0), sum(event["args"].values()))
        else:
            assert event["ph"] == "M"
    if analysis.program.steps:
        assert peaks[1] == analysis.peak_bytes
    if analysis.unplanned:
        assert peaks[2] == analysis.unplanned_peak_bytes


def test_csv_is_a_placement_instance_of_the_step():
    analysis = planned_analysis()
    rows = list(csv.DictReader(io.StringIO(buffers_csv(analysis))))
    load = max(
        sum(int(r["size"]) for r in rows if int(r["lower"]) <= t < int(r["upper"]))
        for t in range(len(analysis.program.steps))
    )
    assert load == analysis.peak_bytes - analysis.breakdown.get("workspace", 0)
    assert {"name", "category", "module", "source"} <= set(rows[0])


def test_dot_names_every_kernel_once():
    analysis = planned_analysis()
    text = graph_dot(analysis)
    kernels = [s for s in analysis.program.steps if s.kind == "run"]
    assert text.startswith("digraph") and text.count('[label="') >= len(kernels) and text.count("fillcolor") == 3

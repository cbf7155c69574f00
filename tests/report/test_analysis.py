"""The Analysis: figures that agree with the validator and with each other, and that survive a file."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from samples import KiB, mlp_problem, planned_analysis, program_of, recomputing_sequence, unplanned_analysis

from memplan.analysis import Analysis, FrontierPoint, lifetimes, timeline
from memplan.decisions import alive_at_peak, decisions_of, family
from memplan.errors import InputError
from memplan.plans import Offload, Plan
from memplan.problem import SCHEMA_VERSION
from memplan.validate import check_sequence


def test_peak_and_time_are_the_validators():
    problem = mlp_problem()
    for sequence in (tuple(range(len(problem.ops))), recomputing_sequence(problem)):
        analysis = Analysis.of(program_of(problem, sequence))
        assert (analysis.peak_bytes, analysis.time) == check_sequence(problem, sequence)


@pytest.mark.parametrize("analysis", [unplanned_analysis(), planned_analysis()], ids=["unplanned", "planned"])
def test_every_figure_adds_up(analysis):
    assert sum(analysis.breakdown.values()) == analysis.peak_bytes
    assert analysis.by_module().total == sum(b.size for b in analysis.at_peak)
    assert max(i.total for i in analysis.timeline) == analysis.peak_bytes
    assert all(sum(i.by_category.values()) == i.total for i in analysis.timeline)
    assert [i.total for i in analysis.timeline] == [
        load for load, step in zip(analysis.replay.loads, analysis.program.steps) if step.kind == "run"
    ]


def test_lifetimes_give_the_timeline_back():
    program = planned_analysis().program
    for now in timeline(program):
        alive = sum(program.storages[x.storage].size for x in lifetimes(program) if x.start <= now.step < x.end)
        assert alive + program.steps[now.step].workspace == now.total


def test_decisions_say_what_is_recomputed_what_it_frees_and_what_it_costs():
    (decision,) = planned_analysis().decisions
    assert (decision.kind, decision.what, decision.module) == ("recompute", "softmax", "layers.*.attn")
    assert (decision.count, decision.runs, decision.time) == (3, 3, 15.0)
    assert decision.freed == 3 * 8 * 64 * KiB
    assert decision.source == "model.py:30"


def test_sources_are_relative_wherever_they_stand(tmp_path, monkeypatch):
    """In storages, decisions and the decisions of a frontier: analyses of two checkouts compare."""
    monkeypatch.chdir(tmp_path)
    made = planned_analysis()
    (decision,) = made.decisions
    absolute = replace(decision, source=f"{tmp_path}/model.py:30")
    point = FrontierPoint(1, 1, 1.0, 1.0, decisions=(absolute,))
    analysis = Analysis.of(made.program, made.plan, decisions=(absolute,), frontier=(point,))
    assert analysis.decisions == analysis.frontier[0].decisions == (decision,)


def test_offloads_are_decisions_too():
    problem = mlp_problem()
    stay = Offload(buffer=3, made_at=1, out_from=2, out_until=3, in_from=8, in_until=9, tier="host")
    plan = Plan(tuple(range(len(problem.ops))), None, 0, 0.0, 0.0, offloads=(stay,))
    (decision,) = decisions_of(problem, plan)
    assert (decision.kind, decision.what, decision.count, decision.runs) == ("offload", "softmax", 1, 1)


def test_alive_at_peak_adds_up_to_the_peak():
    problem = mlp_problem()
    peak, _ = check_sequence(problem, tuple(range(len(problem.ops))))
    assert peak - KiB <= sum(problem.buffers[b].size for b in alive_at_peak(problem)) <= peak


@pytest.mark.parametrize("analysis", [unplanned_analysis(), planned_analysis()], ids=["unplanned", "planned"])
def test_a_file_gives_the_same_analysis_back(analysis, tmp_path):
    analysis.save(tmp_path / "a.json")
    assert Analysis.load(tmp_path / "a.json") == analysis
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["schema_version"] == SCHEMA_VERSION
    assert data["peak_bytes"] == analysis.peak_bytes and isinstance(data["peak_bytes"], int)
    assert data["versions"]["memplan"] and data["target"] == "cpu" and data["breakdown"] == analysis.breakdown


def test_a_broken_file_is_refused_with_its_fault(tmp_path):
    data = json.loads(unplanned_analysis().to_json())
    del data["frontier"]
    with pytest.raises(InputError, match="frontier"):
        Analysis.from_json(json.dumps(data))
    with pytest.raises(InputError, match="not a memplan analysis"):
        Analysis.from_json(mlp_problem().to_json())


def test_a_damaged_file_is_refused_and_nothing_else_happens():
    """Whatever part of a document is replaced by something of another type, or a number by one that cannot be."""

    def damaged(value, path=()):
        if isinstance(value, dict):
            for key, part in value.items():
                yield from damaged(part, (*path, key))
        elif isinstance(value, list) and value:
            yield from damaged(value[0], (*path, 0))
            yield path, None
        elif isinstance(value, int) and path[-1] in ("size", "workspace", 0):
            yield path, "5"
            yield path, 10**9 if path[-1] == 0 else -5 if path[-1] == "size" else 0.5

    whole = json.loads(planned_analysis().to_json())
    faults = [(path, bad) for path, bad in damaged(whole) if path[0] in ("program", "unplanned", "plan", "frontier")]
    assert len(faults) > 20
    for path, bad in faults:
        data = copy.deepcopy(whole)
        place = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = bad
        if path[0] == "plan" and "offloads" not in path and bad is not None:
            continue  # a sequence is judged by its problem, which the file has not
        with pytest.raises(InputError, match="lacks or misspells|no number of bytes|does not exist"):
            Analysis.from_json(json.dumps(data))
    with pytest.raises(InputError, match="sequence"):
        Plan.from_json('{"kind": "plan", "schema_version": 1}')
    with pytest.raises(InputError, match="versions|dictionary"):
        Analysis.from_json(json.dumps(whole | {"versions": "abc"}))


def test_fits():
    analysis = unplanned_analysis()
    assert analysis.fits(analysis.peak_bytes) and not analysis.fits(analysis.peak_bytes - 1) and analysis.fits("80GiB")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("softmax_3", "softmax"), ("mm_1_2", "mm"), ("h.3.attn", "h.*.attn"), ("relu", "relu"), ("h.0", "h.*"), ("", "")],
)
def test_family(name, expected):
    assert family(name) == expected

"""``memplan solve`` on instance files: answers, exit statuses, errors that name the place."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from samples import mlp_problem

from memplan.cli import run
from memplan.graph_files import load_graph
from memplan.plans import Offload
from memplan.problem import Tier
from memplan.validate import check_plan, check_sequence


@pytest.fixture
def graph(tmp_path):
    """A chain of 12 nodes, each also read much later: recomputation pays."""
    n = 12
    nodes = [{"id": f"n{i}", "cost_ram": 100 if i < n // 2 else 10, "cost_cpu": 1 + i} for i in range(n)]
    links = [{"source": f"n{i}", "target": f"n{i + 1}"} for i in range(n - 1)]
    links += [{"source": f"n{i}", "target": f"n{n - 1 - i}"} for i in range(n // 2 - 1)]
    data = {"nodes": nodes, "links": links, "graph": {"order": [f"n{i}" for i in range(n)]}}
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(data))
    return path


def test_recompute_answers_in_the_files_own_ids(graph, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert run(["solve", "recompute", str(graph), "--budget", "80%", "-o", str(out)]) == 0
    answer = json.loads(out.read_text())
    file = load_graph(graph)
    peak, time = check_sequence(file.problem, file.sequence_ops(answer["sequence"]))
    assert (peak, time) == (answer["peak"], answer["time"])
    assert (
        peak <= 0.8 * answer["stored_peak"] and answer["bound"] <= time and answer["status"] in ("optimal", "feasible")
    )
    captured = capsys.readouterr()
    assert captured.out == "" and "peak" in captured.err


def test_recompute_proven_infeasible_is_1(graph, capsys):
    assert run(["solve", "recompute", str(graph), "--budget", "20"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "infeasible" in captured.err


def test_order_runs_every_op_once(graph, capsys):
    assert run(["solve", "order", str(graph)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert sorted(answer["sequence"]) == sorted(load_graph(graph).ids)
    assert answer["bound"] <= answer["peak"] <= answer["stored_peak"]


INSTANCE = "id,lower,upper,size\na,0,2,4\nb,1,3,4\nc,2,4,4\n"


def test_placement_prints_offsets(tmp_path, capsys):
    path = tmp_path / "instance.csv"
    path.write_text(INSTANCE)
    assert run(["solve", "placement", str(path), "--capacity", "8"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "id,lower,upper,size,offset" and len(rows) == 4
    assert max(int(row.split(",")[3]) + int(row.split(",")[4]) for row in rows[1:]) == 8
    assert run(["solve", "placement", str(path), "--capacity", "7"]) == 1
    path.write_text(INSTANCE + "d,3,1,4\n")
    assert run(["solve", "placement", str(path)]) == 2
    assert "line 5" in capsys.readouterr().err


def test_a_memplan_problem_is_a_graph_too(tmp_path, capsys):
    mlp_problem().save(tmp_path / "p.json")
    assert run(["solve", "order", str(tmp_path / "p.json")]) == 0
    assert json.loads(capsys.readouterr().out)["sequence"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "line 1"), ('{"nodes": [{}], "links": []}', "nodes[0]"), ("[]", "no JSON object")],
)
def test_bad_input_is_2_and_names_the_place(tmp_path, capsys, content, said):
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert run(["solve", "order", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_an_existing_output_is_kept_without_force(graph, tmp_path, capsys):
    out = tmp_path / "plan.json"
    out.write_text("mine")
    assert run(["solve", "order", str(graph), "-o", str(out)]) == 2
    assert out.read_text() == "mine" and "--force" in capsys.readouterr().err
    assert run(["solve", "order", str(graph), "-o", str(out), "--force"]) == 0


@pytest.mark.parametrize("budget", ["x", "-3", "0%", ""])
def test_a_budget_that_cannot_be_read_is_2(graph, budget):
    assert run(["solve", "recompute", str(graph), "--budget", budget]) == 2


@pytest.mark.skipif("MEMPLAN_DATA" not in os.environ, reason="public instances: set MEMPLAN_DATA")
def test_a_public_joint_graph(capsys):
    path = Path(os.environ["MEMPLAN_DATA"]) / "joint" / "res.json"
    assert run(["solve", "recompute", str(path), "--budget", "75%", "--time-limit", "5"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["peak"] <= 0.75 * answer["stored_peak"]


def test_recompute_with_a_tier_tells_what_is_sent_away(graph, capsys):
    command = ["solve", "recompute", str(graph), "--budget", "60%", "--tier"]
    assert run([*command, "disk:100MB/s:0.1GB/s:0.5us:1KiB"]) == 0
    answer = json.loads(capsys.readouterr().out)
    file = load_graph(graph)
    problem = replace(file.problem, tiers=(Tier("disk", 1024, 100.0, 100.0, 0.5),))
    offloads = tuple(Offload(**{k: v for k, v in stay.items() if k != "name"}) for stay in answer["offloads"])
    found = check_plan(problem, file.sequence_ops(answer["sequence"]), offloads)
    assert offloads and found == (answer["peak"], pytest.approx(answer["time"]))
    assert answer["peak"] <= 0.6 * answer["stored_peak"]


@pytest.mark.parametrize(
    "tier", ["disk", "disk:2GB:2GB/s:1us", "disk:2GB/s:0/s:1us", "disk:2GB/s:2GB/s:1s", ":1/s:1/s:1"]
)
def test_a_tier_that_cannot_be_read_is_2(graph, tier, capsys):
    assert run(["solve", "recompute", str(graph), "--budget", "80%", "--tier", tier]) == 2
    assert "tier" in (found := capsys.readouterr().err) or "rate" in found or "latency" in found

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import measure
import worker
from budgets import table, verdict
from dominance import Point, points, report, verdicts
from frontier import budgets
from measure import Results, time_ratio
from rivals import Contender, hand_made, stock_budgets

MEGABYTE = 10**6


def record(peak: int, time: float, error: float = 1e-7, **more: object) -> dict:
    pairs = [[1.0, time, 1.0, time]] * 3
    given = {"loss": "0x1", "gradients": "a", "buffers": "b", "revision": "r"}
    return {"peak": peak * MEGABYTE, "pairs": pairs, "error": error, "first_step_s": 1.0, **given, **more}


def plan(peak: int, time: float = 1.0) -> dict:
    return {"peak": peak * MEGABYTE, "time": time, "unplanned_time": 1.0}


def test_names_of_contenders_read_back():
    for contender in hand_made() + stock_budgets():
        assert Contender.parse(str(contender)) == contender
    with pytest.raises(ValueError, match="no contender 'jax'"):
        Contender.parse("jax")


def test_time_ratio_is_the_median_over_pairs():
    assert time_ratio({"pairs": [[1, 2, 1, 1], [1, 3, 1, 1], [2, 2, 1, 1]]}) == 2
    assert time_ratio({}) is None


def test_a_rival_is_dominated_by_a_smaller_point_about_as_fast():
    rows = {
        "eager": record(100, 1.0),
        "eager+blocks": record(40, 1.3),
        "eager+pairs": record(20, 1.4),
        "inductor": record(90, 0.8),
        "memplan": record(100, 1.01, plan=plan(100)),
        "memplan@35%": record(35, 1.2, plan=plan(35, 1.2)),
    }
    judged = {v.rival.name: v for v in verdicts("m", rows)}
    assert judged["eager"].answer is not None
    assert judged["eager+blocks"].answer == Point("memplan@35%", 35 * MEGABYTE, 1.2, 1.0)
    assert judged["eager+pairs"].answer is None and "lowest peak" in judged["eager+pairs"].cause
    assert judged["inductor"].answer is None and "1.500" in judged["inductor"].cause
    data = {"environment": {"processor": "p", "cores": 2, "packages": {}, "revision": "r"}, "rows": {"m": rows}}
    assert "all rival points: 2 of 4 dominated (50%)" in report(data)


def test_wrong_gradients_show_in_a_point():
    rows = {"eager": record(1, 1.0), "inductor@0.5": record(1, 1.0, error=1e-3)}
    assert points(rows)[1].error > 1000


def test_budgets_run_from_unplanned_to_smallest():
    found = budgets(1000, 300, 12)
    assert found["smallest"] == 300
    assert "25%" not in found and found["35%"] == 350
    assert len(found) == 11 and all(300 <= budget < 1000 for budget in found.values())


def test_verdict_names_what_was_broken():
    unplanned = record(100, 1.0)
    assert verdict(record(50, 1.0, budget=50 * MEGABYTE), unplanned, False) == "kept"
    assert verdict(record(51, 1.0, budget=50 * MEGABYTE), unplanned, False) == "over by 1000000 bytes"
    assert verdict(record(50, 1.0, budget=50 * MEGABYTE) | {"gradients": "c"}, unplanned, False) == "other bits"
    assert "confirmed" in verdict({"infeasible": {"smallest": 3}}, unplanned, True)
    assert "| m | memplan |" in table({"rows": {"m": {"memplan": unplanned | {"plan": plan(100)}}}})


def test_gradients_under_autocast_are_compared_with_float64_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "OUT", tmp_path)
    model = measure.Model("gpt", "small", bf16=True)
    worker.save_reference(model)
    workload = worker.build(model)
    torch.manual_seed(1)
    workload.model(**workload.inputs).backward()
    gradients = {name: p.grad for name, p in workload.model.named_parameters()}
    assert 1e-4 < worker.relative_error(gradients, torch.load(model.reference)) < 1e-1


def test_results_are_resumed(tmp_path):
    from measure import Model

    Results(tmp_path / "r.json", {"revision": "abc"}).put(Model("gpt"), "eager", {"peak": 1})
    assert Results(tmp_path / "r.json", {}).get(Model("gpt"), "eager") == {"peak": 1, "revision": "abc"}

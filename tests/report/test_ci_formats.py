"""Verdicts in the formats of continuous integration, each read by its own reader."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from samples import KiB, planned_analysis, unplanned_analysis

from memplan.analysis import Analysis
from memplan.errors import BudgetInfeasibleError, LiveBuffer, OptionError
from memplan.gate import Rule, Verdict, changes, exit_code, judge, refusal
from memplan.report import ci, text
from memplan.report.markdown import analysis_markdown

SMALL, LARGE = unplanned_analysis(), unplanned_analysis(width=80 * KiB)
GOOD = judge("good", SMALL, SMALL, "1GiB", [Rule.parse("peak:0%")])
OVER = judge("over", LARGE, None, LARGE.peak_bytes - 1)
GROWN = judge("grown", LARGE, SMALL, None, [Rule.parse("peak:2%")])
BROKEN = Verdict("broken", error="train.py:build failed: ImportError: no module | named <x>\nsecond line")
ALL = [GOOD, OVER, GROWN, BROKEN]


def test_exit_status():
    assert exit_code([GOOD]) == 0 and exit_code([GOOD, OVER]) == 1 and exit_code(ALL) == 2


def test_junit_is_read_by_junitparser():
    junitparser = pytest.importorskip("junitparser")
    xml = junitparser.JUnitXml.fromstring(ci.junit(ALL).partition("?>\n")[2])
    (suite,) = list(xml)
    assert (suite.tests, suite.failures, suite.errors) == (4, 2, 1)
    results = {case.name: [type(r).__name__ for r in case.result] for case in suite}
    assert results == {"good": [], "over": ["Failure"], "grown": ["Failure"], "broken": ["Error"]}


def test_sarif_keeps_its_schema():
    """pydantic-sarif is generated from the schema of SARIF 2.1.0 and forbids what that does not name."""
    model = pytest.importorskip("pydantic_sarif.model")
    raw = ci.sarif(ALL)
    log = model.StaticAnalysisResultsFormatSarifVersion210JsonSchema.model_validate_json(raw)
    results = log.runs[0].results
    assert [str(r.ruleId) for r in results] == ["over-limit", "regression", "not-analysed"]
    assert results[1].locations[0].physicalLocation.artifactLocation.uri == "model.py"
    assert results[1].locations[0].physicalLocation.region.startLine == 30


ALIVE = (LiveBuffer("addmm", 3 << 20, "activation", "up", "model.py:7"), LiveBuffer("w|", 1 << 20, "parameter", "", ""))
REFUSED = refusal("tight", BudgetInfeasibleError(1 << 20, 4194305, 4 << 20, "gelu_backward", ALIVE))


def test_a_refused_budget_in_every_format():
    """Each document is read by its format's reader and tells the least budget, what stands in the way and where."""
    assert exit_code([REFUSED]) == 1
    (model,) = json.loads(ci.verdict_json([REFUSED]))["models"]
    told = {"budget_bytes": 1 << 20, "smallest_feasible_bytes": 4194305, "bound_bytes": 4 << 20}
    told |= {"tightest": "gelu_backward", "alive": [dataclasses.asdict(b) for b in ALIVE]}
    assert model["refused"] == told and not model["ok"] and model["peak_bytes"] is None
    (annotation,) = ci.workflow_commands([REFUSED]).splitlines()
    assert annotation.startswith("::error file=model.py,line=7,") and "(4194305 bytes)" in annotation
    markdown = ci.verdict_markdown([REFUSED])
    assert "(4194305 bytes)" in markdown and "alive at gelu_backward</summary>" in markdown
    assert "| 3.0 MiB | activation | addmm | up | model.py:7 |" in markdown and "| w\\| |" in markdown
    junitparser = pytest.importorskip("junitparser")
    (suite,) = junitparser.JUnitXml.fromstring(ci.junit([REFUSED]).partition("?>\n")[2])
    (failure,) = next(iter(suite)).result
    assert (suite.failures, suite.errors, failure.type) == (1, 0, "infeasible") and "gelu_backward" in failure.text
    sarif = pytest.importorskip("pydantic_sarif.model").StaticAnalysisResultsFormatSarifVersion210JsonSchema
    (result,) = sarif.model_validate_json(ci.sarif([REFUSED])).runs[0].results
    assert str(result.ruleId) == "infeasible" and "(4194305 bytes)" in result.message.text
    assert result.locations[0].physicalLocation.region.startLine == 7


def test_annotations_escape_and_point_at_the_line():
    lines = ci.workflow_commands(ALL).splitlines()
    assert len(lines) == 3 and all(line.startswith("::error ") for line in lines)
    assert lines[1].startswith("::error file=model.py,line=30,title=memplan grown::grown: peak grew")
    assert "%0A" in lines[2] and "file=" not in lines[2]
    assert ci.workflow_commands([GOOD]) == ""


def test_markdown_puts_the_verdict_first_and_folds_the_changes():
    markdown = ci.verdict_markdown(ALL)
    assert markdown.startswith(
        "### ❌ memplan: broken could not be analysed (1 of 4); over, grown over budget (2 of 4)"
    )
    assert "| model | base | head | Δ | limit | |" in markdown and "<details><summary>grown" in markdown
    assert "model.py:30" in markdown and "<x>" not in markdown
    for row in re.findall(r"^\|.*\|$", markdown, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) in (6, 7)


def test_markdown_stays_within_a_comment():
    many = [judge(f"model {k}", LARGE, SMALL, None, [Rule.parse("peak:2%")]) for k in range(400)]
    markdown = ci.verdict_markdown(many)
    assert len(markdown.encode()) <= 65_536 and "cut here" in markdown
    assert markdown.count("<details>") == markdown.count("</details>")


def test_json_has_exact_bytes():
    data = json.loads(ci.verdict_json(ALL))
    assert data["peak_bytes"] == SMALL.peak_bytes and data["schema_version"] == 1 and data["ok"] is False
    assert data["models"][2]["changes"][0]["delta"] > 0 and data["models"][3]["peak_bytes"] is None


def test_changes_name_what_grew_most_first_and_nothing_else():
    grown = changes(SMALL, LARGE)
    assert grown[0].what == "softmax" and grown[0].source.startswith("model.py:3")
    assert [c.delta for c in grown] == sorted((c.delta for c in grown), reverse=True)
    assert sum(c.delta for c in grown) == LARGE.peak_bytes - SMALL.peak_bytes
    assert changes(SMALL, unplanned_analysis(name="other")) == ()


def test_another_environment_is_warned_about():
    other = Analysis(LARGE.program, versions={**LARGE.versions, "torch": "0.1"}, target="a100-80gb")
    warnings = judge("m", other, SMALL).warnings
    assert any("torch: " in w for w in warnings) and any("target: cpu" in w for w in warnings)
    assert "::warning" in ci.workflow_commands([judge("m", other, SMALL)])


@pytest.mark.parametrize(
    ("rule", "fails"),
    [("peak:30%", False), ("peak:10%", True), ("peak:1GiB", False), ("peak:0", True), ("time:0%", False)],
)
def test_rules(rule, fails):
    assert bool(Rule.parse(rule).broken(SMALL, LARGE)) is fails


@pytest.mark.parametrize("text", ["peak", "peak:x", "weight:2%", "peak:-1%", ""])
def test_a_rule_that_cannot_be_read_is_refused(text):
    with pytest.raises(OptionError):
        Rule.parse(text)


@pytest.mark.parametrize("analysis", [SMALL, planned_analysis(), unplanned_analysis(layers=0)])
def test_every_text_view_is_complete(analysis):
    plain = text.as_text(analysis)
    assert str(analysis.peak_bytes) in plain and "At the peak" in plain and "\x1b" not in plain
    assert all(b.name in plain for b in analysis.at_peak)
    assert str(analysis.peak_bytes) in analysis_markdown(analysis)
    if analysis.plan:
        assert "recomputing the 3 softmax of layers.*.attn frees 1.5 MiB for" in plain

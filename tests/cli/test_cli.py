"""The command line as a whole: start-up, streams, exit statuses, formats of saved analyses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from samples import KiB, planned_analysis, unplanned_analysis

from memplan.cli import run
from memplan.cli.entry import parse_shape
from memplan.errors import OptionError
from memplan.gate import analyses_to_json
from memplan.report import put


def test_importing_the_command_line_imports_nothing_heavy():
    heavy = "torch", "numpy", "numba", "rich.console", "plotly", "networkx"
    code = f"import sys, memplan.cli; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


@pytest.mark.parametrize("command", ["analyze", "plan", "frontier", "check", "compare", "export", "solve", "env"])
def test_every_command_has_help(command, capsys):
    assert run([command, "--help"]) == 0
    assert "Usage: memplan" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["analyze", "plan", "frontier"])
def test_help_says_that_code_is_executed(command, capsys):
    run([command, "--help"])
    assert "executes the code" in " ".join(capsys.readouterr().out.split())


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("memplan ")


@pytest.mark.parametrize(
    "line",
    [
        ["bogus"],
        ["analyze"],
        ["analyze", "train.py:build", "--format", "yaml"],
        ["env", "--format", "sarif"],
        ["targets", "--format", "junit"],
        ["passes", "--format", "github"],
        ["analyze", "no_such_file.py:build"],
        ["analyze", "no_such_module_anywhere:build"],
        ["analyze", "json"],
        ["analyze", "json:no_such_name"],
        ["analyze", "json:loads", "--limit", "many"],
        ["compare", "missing.json", "missing.json"],
        ["export", "missing.json", "--format", "csv"],
    ],
)
def test_what_cannot_be_answered_is_2(line, capsys):
    assert run(line) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize("fault", ["raise ValueError('boom')", "import sys; sys.exit(1)", "1 +"])
def test_code_of_the_users_that_fails_is_2(tmp_path, capsys, fault):
    (tmp_path / "train.py").write_text(fault)
    assert run(["analyze", f"{tmp_path}/train.py:build"]) == 2
    assert "train.py failed" in capsys.readouterr().err


def test_a_bug_of_ours_is_2_and_debug_shows_it(monkeypatch, capsys):
    def broken(path):
        raise ZeroDivisionError("deliberate")

    monkeypatch.setattr("memplan.gate.read_analyses", broken)
    monkeypatch.delenv("MEMPLAN_DEBUG", raising=False)
    assert run(["compare", "a", "b"]) == 2
    assert "internal error: ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setenv("MEMPLAN_DEBUG", "1")
    assert run(["compare", "a", "b"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_crash(tmp_path):
    path = tmp_path / "a.json"
    planned_analysis(layers=40).save(path)
    line = f"{sys.executable} -m memplan.cli export {path} --format csv | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], check=False, capture_output=True, text=True)
    assert done.stdout.startswith("id,lower") and done.stderr == "" and done.returncode != 1


def test_a_reader_that_never_came_is_not_over_budget():
    """What typer makes of EPIPE inside a command is a status of 1, which says "over budget"."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "memplan.cli", "--help"], check=False, stdout=write, stderr=-1)
    os.close(write)
    assert (done.returncode, done.stderr) == (2, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_an_error_that_cannot_be_told_is_not_over_budget():
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "memplan.cli", "export", "absent.json", "--format", "csv"]
        assert subprocess.run(line, check=False, stderr=full).returncode not in (0, 1)


def test_ctrl_c_is_no_answer(monkeypatch, capsys):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("memplan.gate.read_analyses", interrupted)
    assert run(["compare", "a", "b"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "interrupted\n"


def test_a_write_that_fails_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "answer.txt"
    put(path, "older")

    def half(self, raw):
        with open(self, "wb") as file:
            file.write(raw[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        put(path, "newer")
    assert [f.read_text() for f in tmp_path.iterdir()] == ["older"]


@pytest.mark.parametrize("place", [".", "absent/a.json"])
def test_an_output_that_cannot_be_written_is_told_before_any_work(tmp_path, monkeypatch, capsys, place):
    monkeypatch.chdir(tmp_path)
    for line in (["analyze", "x.py:build", "-o", place, "--force"], ["compare", "a", "b", "--comment", place]):
        assert run(line) == 2
        assert "folder" in capsys.readouterr().err


@pytest.fixture
def files(tmp_path):
    base, head = unplanned_analysis(), unplanned_analysis(width=80 * KiB)
    base.save(tmp_path / "base.json")
    head.save(tmp_path / "head.json")
    return str(tmp_path / "base.json"), str(tmp_path / "head.json")


def test_compare_finds_the_regression_and_its_line(files, capsys):
    base, head = files
    assert run(["compare", base, base]) == 0
    capsys.readouterr()
    assert run(["compare", base, head, "--fail-on", "peak:2%"]) == 1
    assert "model.py:3" in capsys.readouterr().out
    assert run(["compare", base, head, "--fail-on", "peak:50%"]) == 0
    assert run(["compare", base, head, "--fail-on", "gibberish"]) == 2


@pytest.mark.parametrize("fmt", ["table", "json", "markdown", "github", "junit", "sarif"])
def test_compare_in_every_format(files, fmt, capsys):
    assert run(["compare", *files, "--format", fmt]) == 1
    assert "softmax" in capsys.readouterr().out or fmt in ("github", "sarif")


def test_compare_writes_the_step_summary_and_the_comment(files, tmp_path, monkeypatch, capsys):
    summary, comment = tmp_path / "summary.md", tmp_path / "comment.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert run(["compare", *files, "--comment", str(comment)]) == 1
    assert capsys.readouterr().out.startswith("::error file=model.py,line=3")
    assert summary.read_text() == "before\n" + comment.read_text() + "\n"
    assert comment.read_text().startswith("### ❌ memplan: mlp over budget")


def test_compare_matches_models_by_name(tmp_path, capsys):
    small, large = unplanned_analysis(), unplanned_analysis(width=80 * KiB)
    (tmp_path / "base.json").write_text(analyses_to_json({"a": small, "b": small, "gone": small}))
    (tmp_path / "head.json").write_text(analyses_to_json({"b": large, "a": small, "new": large}))
    line = ["compare", str(tmp_path / "base.json"), str(tmp_path / "head.json"), "--format", "json"]
    assert run(line) == 1
    captured = capsys.readouterr()
    assert {m["name"]: m["ok"] for m in json.loads(captured.out)["models"]} == {"b": False, "a": True, "new": True}
    assert "gone" in captured.err


@pytest.mark.parametrize(
    ("fmt", "suffix"), [("csv", "csv"), ("dot", "dot"), ("chrome-trace", "trace.json"), ("memory-viz", "pickle")]
)
def test_export_by_format_and_by_suffix(tmp_path, fmt, suffix):
    planned_analysis().save(tmp_path / "plan.json")
    by_format, by_suffix = tmp_path / "one", tmp_path / f"two.{suffix}"
    assert run(["export", str(tmp_path / "plan.json"), "--format", fmt, "-o", str(by_format)]) == 0
    assert run(["export", str(tmp_path / "plan.json"), "-o", str(by_suffix)]) == 0
    assert by_format.read_bytes() == by_suffix.read_bytes()
    assert run(["export", str(tmp_path / "plan.json"), "-o", str(tmp_path / "x.unknown")]) == 2


def test_a_plan_alone_is_no_analysis_and_the_error_says_what_it_is(tmp_path, capsys):
    planned_analysis().plan.save(tmp_path / "plan.json")
    assert run(["export", str(tmp_path / "plan.json"), "--format", "csv"]) == 2
    assert "not a memplan analysis file, but a file of kind 'plan'" in capsys.readouterr().err


def test_colour_is_for_terminals_and_off_with_no_color(files):
    environment = os.environ | {"NO_COLOR": "1", "TERM": "xterm-256color", "FORCE_COLOR": ""}
    line = [sys.executable, "-m", "memplan.cli", "compare", files[0], files[0]]
    for env in (environment, os.environ):
        assert "\x1b" not in subprocess.run(line, check=False, capture_output=True, text=True, env=dict(env)).stdout


def test_env_targets_and_passes(capsys):
    for command in ("env", "targets", "passes"):
        assert run([command]) == 0 and run([command, "--format", "json"]) == 0
        out = capsys.readouterr().out
        assert json.loads(out.splitlines()[-1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8x1024:int64", ("", (8, 1024), "int64")),
        ("ids=8x16", ("ids", (8, 16), "float32")),
        ("t=scalar:int64", ("t", (), "int64")),
        ("7", ("", (7,), "float32")),
    ],
)
def test_shapes(text, expected):
    assert parse_shape(text) == expected


@pytest.mark.parametrize("text", ["", "8x", "a b", "x8", "8:"])
def test_a_shape_that_cannot_be_read_is_refused(text):
    with pytest.raises(OptionError):
        parse_shape(text)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["-o", "answer.xyz"], "cannot tell a format"),
        (["--optimizer", "lion"], "known are sgd"),
        (["--target", "h200x"], "did you mean h200-141gb"),
    ],
)
def test_a_slip_is_told_before_the_model_is_built(tmp_path, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    assert run(["analyze", "absent.py:build", *given]) == 2
    captured = capsys.readouterr().err
    assert said in captured and "executing" not in captured


def test_a_full_disk_is_an_answer_of_2(tmp_path, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    saved = tmp_path / "saved.json"
    unplanned_analysis().save(saved)
    (tmp_path / "full.csv").symlink_to("/dev/full")
    assert run(["export", str(saved), "-o", str(tmp_path / "full.csv"), "--force"]) == 2
    assert "No space left" in capsys.readouterr().err


def test_check_outside_a_project_says_what_it_looked_for(tmp_path, capsys):
    assert run(["check", "--config", str(tmp_path)]) == 2
    assert "there is no pyproject.toml in or above" in capsys.readouterr().err

"""Verdicts for continuous integration: table, JSON, Markdown, GitHub annotations, JUnit, SARIF."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memplan import __version__
from memplan.errors import BudgetInfeasibleError
from memplan.gate import Change, Verdict, exit_code
from memplan.problem import SCHEMA_VERSION
from memplan.report.words import share
from memplan.units import format_bytes

_SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_RULES = {
    "over-limit": "The predicted peak memory is over its limit.",
    "infeasible": "No plan keeps the memory budget.",
    "regression": "The predicted peak memory grew more than is allowed.",
    "not-analysed": "The model could not be analysed.",
}
_COMMENT_LIMIT = 64_000  # bytes; GitHub refuses comments above 65,536 characters
_SHOWN = 15  # changed buffers listed a model


def signed(size: int) -> str:
    """'+1.5 MiB', '−3 B', '0 B'."""
    return ("+" if size > 0 else "−" if size < 0 else "") + format_bytes(abs(size))


def verdict_view(verdicts: Sequence[Verdict]) -> Group:
    """For a terminal: the verdict first, one row a model, then what changed."""
    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    for column in ("base", "head", "Δ", "limit"):
        table.add_column(column, justify="right")
    table.add_column("")
    parts: list[RenderableType] = [Text(summary(verdicts), style="bold"), table]
    for v in verdicts:
        mark = Text("ok", style="green") if v.ok else Text("error" if v.error else "FAILED", style="bold red")
        table.add_row(*_cells(v), mark)
        for line in (*v.failures, *([v.error] if v.error else [])):
            parts.append(Text(f"{v.name}: {line}" + (f"  ({v.culprit})" if v.culprit else ""), style="red"))
        parts += [Text(f"{v.name}: environment differs: {w}", style="yellow") for w in v.warnings]
        if v.changes:
            parts.append(_change_table(v.changes[:_SHOWN]))
    return Group(*parts)


def _change_table(changes: Sequence[Change]) -> Table:
    table = Table(title="Changed at the peak", title_justify="left", box=None, pad_edge=False)
    table.add_column("Δ", justify="right", no_wrap=True)
    for column in ("category", "buffer", "module", "source"):
        table.add_column(column, overflow="fold")
    for c in changes:
        table.add_row(signed(c.delta), c.category, c.what, c.module, c.source)
    return table


def summary(verdicts: Sequence[Verdict]) -> str:
    """The verdict in one line."""
    unknown = [v.name for v in verdicts if v.error]
    over = [v.name for v in verdicts if v.failures and not v.error]
    if not unknown and not over:
        return f"memplan: {len(verdicts)} of {len(verdicts)} models within budget"
    said = [
        f"{', '.join(names)} {what} ({len(names)} of {len(verdicts)})"
        for names, what in ((unknown, "could not be analysed"), (over, "over budget"))
        if names
    ]
    return f"memplan: {'; '.join(said)}"


def _cells(v: Verdict) -> tuple[str, str, str, str, str]:
    base = format_bytes(v.base.peak_bytes) if v.base else "–"
    head = format_bytes(v.head.peak_bytes) if v.head else "–"
    delta = f"{signed(v.delta)} ({share(v.delta, v.base.peak_bytes)})" if v.base and v.head else "–"
    return v.name, base, head, delta, format_bytes(v.limit) if v.limit is not None else "–"


def verdict_json(verdicts: Sequence[Verdict]) -> str:
    """Exact bytes of every model; the first one's stand at the top level as well."""
    models = [
        {
            "name": v.name,
            "ok": v.ok,
            "peak_bytes": v.head.peak_bytes if v.head else None,
            "base_peak_bytes": v.base.peak_bytes if v.base else None,
            "limit_bytes": v.limit,
            "breakdown": v.head.breakdown if v.head else {},
            "versions": dict(v.head.versions) if v.head else {},
            "target": v.head.target if v.head else "",
            "failures": list(v.failures),
            "refused": _refusal(v.refused) if v.refused else None,
            "warnings": list(v.warnings),
            "error": v.error,
            "changes": [vars(c) | {"delta": c.delta} for c in v.changes],
        }
        for v in verdicts
    ]
    top = {key: models[0][key] for key in ("peak_bytes", "breakdown", "versions", "target")} if models else {}
    head = {"schema_version": SCHEMA_VERSION, "kind": "verdicts", "ok": exit_code(verdicts) == 0}
    return json.dumps(head | top | {"models": models}) + "\n"


def _refusal(error: BudgetInfeasibleError) -> dict[str, Any]:
    return {
        "budget_bytes": error.budget,
        "smallest_feasible_bytes": error.smallest,
        "bound_bytes": error.bound,
        "tightest": error.tightest,
        "alive": [vars(b) for b in error.alive],
    }


def verdict_markdown(verdicts: Sequence[Verdict]) -> str:
    """Verdict first, one table, changes folded; cut to what a GitHub comment takes."""
    icon = "✅" if exit_code(verdicts) == 0 else "❌"
    lines = [
        f"### {icon} {summary(verdicts)}",
        "",
        "| model | base | head | Δ | limit | |",
        "|---|--:|--:|--:|--:|---|",
    ]
    lines += [f"| {' | '.join(map(_cell, _cells(v)))} | {'ok' if v.ok else '**failed**'} |" for v in verdicts]
    for v in verdicts:
        said = [*(v.refused.verdict if v.refused else v.failures), *([v.error] if v.error else [])]
        lines += ["", *(f"- **{_cell(v.name)}**: {_cell(line)}" for line in said)] if said else []
        lines += [f"> environment differs: {_cell(w)}" for w in v.warnings]
    for v in verdicts:
        if v.refused:
            lines += _alive_markdown(v.name, v.refused)
        if not v.changes:
            continue
        lines += ["", f"<details><summary>{_cell(v.name)}: what changed at the peak</summary>", ""]
        lines += ["| Δ | category | buffer | module | source |", "|--:|---|---|---|---|"]
        lines += [
            f"| {signed(c.delta)} | {c.category} | {_cell(c.what)} | {_cell(c.module)} | {_cell(c.source)} |"
            for c in v.changes[: 4 * _SHOWN]
        ]
        lines += ["", "</details>"]
    return cut("\n".join(lines) + "\n")


def _alive_markdown(name: str, error: BudgetInfeasibleError) -> list[str]:
    lines = ["", f"<details><summary>{_cell(name)}: what stands in the way, alive at {_cell(error.tightest)}</summary>"]
    lines += ["", "| bytes | category | buffer | module | source |", "|--:|---|---|---|---|"]
    lines += [
        f"| {format_bytes(b.size)} | {b.category} | {_cell(b.name)} | {_cell(b.module)} | {_cell(b.source)} |"
        for b in error.alive[: 4 * _SHOWN]
    ]
    return [*lines, "", "</details>"]


def cut(text: str) -> str:
    """At most 64 KB of UTF-8, ended at a line, saying that it was cut."""
    raw = text.encode()
    if len(raw) <= _COMMENT_LIMIT:
        return text
    kept = raw[: _COMMENT_LIMIT - 200].decode(errors="ignore").rpartition("\n")[0]
    closing = "\n\n</details>" * (kept.count("<details>") - kept.count("</details>"))
    return f"{kept}{closing}\n\n(cut here: the full answer is in the job's log)\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def workflow_commands(verdicts: Sequence[Verdict]) -> str:
    """GitHub annotations as workflow commands, one a failure, at the line that is to blame."""
    lines = []
    for v in verdicts:
        title = f"memplan {_property(v.name)}"
        for _, text in _problems(v):
            file, line = _place(v.culprit)
            where = f"file={_property(file)},line={line}," if file else ""
            lines.append(f"::error {where}title={title}::{_data(f'{v.name}: {text}')}")
        lines += [f"::warning title={title}::{_data(f'environment differs: {w}')}" for w in v.warnings]
    return "\n".join(lines) + "\n" if lines else ""


def _problems(v: Verdict) -> list[tuple[str, str]]:
    """(rule, text) of everything wrong with a model."""
    found = [("infeasible" if v.refused else _rule(text), text) for text in v.failures]
    return found + ([("not-analysed", v.error)] if v.error else [])


def _rule(failure: str) -> str:
    return "over-limit" if "over the limit" in failure else "regression"


def _place(source: str) -> tuple[str, int]:
    file, _, line = source.rpartition(":")
    return (file, int(line)) if file and line.isdigit() else ("", 0)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def junit(verdicts: Sequence[Verdict]) -> str:
    """One test case a model; a failure is over budget, an error could not be analysed."""
    counts = {
        "tests": str(len(verdicts)),
        "failures": str(sum(bool(v.failures) and not v.error for v in verdicts)),
        "errors": str(sum(bool(v.error) for v in verdicts)),
    }
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "memplan", **counts})
    for v in verdicts:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "memplan", "name": v.name, "time": "0"})
        if v.error:
            ElementTree.SubElement(case, "error", {"message": v.error, "type": "not-analysed"})
        elif v.failures:
            failure = ElementTree.SubElement(case, "failure", {"message": v.failures[0], "type": _problems(v)[0][0]})
            listed = [f"{signed(c.delta)} {c.category} {c.what} {c.module} {c.source}" for c in v.changes[:_SHOWN]]
            failure.text = "\n".join([*v.failures, *listed])
        if v.head:
            out = ElementTree.SubElement(case, "system-out")
            out.text = f"peak_bytes={v.head.peak_bytes} limit={v.limit}"
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def sarif(verdicts: Sequence[Verdict]) -> str:
    """SARIF 2.1.0: one result a failure, located at the line to blame."""
    driver = {
        "name": "memplan",
        "version": __version__,
        "rules": [{"id": key, "shortDescription": {"text": text}} for key, text in _RULES.items()],
    }
    results = [_sarif_result(v, rule, text) for v in verdicts for rule, text in _problems(v)]
    run = {"tool": {"driver": driver}, "results": results, "columnKind": "unicodeCodePoints"}
    return json.dumps({"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _sarif_result(v: Verdict, rule: str, text: str) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": rule,
        "ruleIndex": list(_RULES).index(rule),
        "level": "error",
        "message": {"text": f"{v.name}: {text}"},
        "partialFingerprints": {"memplan/v1": f"{rule}:{v.name}"},
    }
    file, line = _place(v.culprit)
    if file:
        artifact = {"uri": file.replace("\\", "/")} | ({} if file.startswith("/") else {"uriBaseId": "%SRCROOT%"})
        result["locations"] = [
            {"physicalLocation": {"artifactLocation": artifact, "region": {"startLine": max(1, line)}}}
        ]
    return result

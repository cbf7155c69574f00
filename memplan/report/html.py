"""An Analysis as one HTML file that needs no network: plotly's script, our style and the data are inside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from memplan.analysis import CATEGORIES, Analysis, Instant, Lifetime, ModuleNode, lifetimes, timeline
from memplan.problem import Phase
from memplan.program import Program
from memplan.report.interchange import first_fit
from memplan.report.words import advice, decision_sentence, format_time, headline, share
from memplan.units import format_bytes

_POINTS = 4000  # steps drawn; a browser stays smooth, and a screen is narrower than that
_RECTANGLES = 1500  # buffers drawn in the map, the largest of size × lifetime
_SENTENCES = 8  # decisions told of each budget
_ROWS = 500  # buffers listed; the JSON export has all
# Okabe and Ito's palette, which people with any common colour blindness can tell apart; grey for workspace and inputs.
_COLORS = {
    "parameter": "#0072B2",
    "buffer": "#56B4E9",
    "input": "#9AA5B1",
    "gradient": "#D55E00",
    "activation": "#009E73",
    "temporary": "#E8CF3A",
    "output": "#CC79A7",
    "optimizer": "#E69F00",
    "workspace": "#5F6670",
}


def report_html(analysis: Analysis) -> str:
    """The whole report; about 5 MB, nearly all of it plotly's script."""
    from plotly.offline import get_plotlyjs

    assets = resources.files("memplan.report") / "assets"
    stride = _stride(len(analysis.timeline))
    return Template(assets.joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{analysis.name or 'Step'}: peak {format_bytes(analysis.peak_bytes)}"),
        headline=escape(headline(analysis)),
        cards=_cards(analysis),
        resolution=f"Each point is the fullest of {stride} steps." if stride > 1 else "",
        map_note=_map_note(analysis.program),
        frontier=_frontier(analysis),
        plan=_decisions(analysis),
        advice=_advice(analysis),
        at_peak=_at_peak(analysis),
        footer=_footer(analysis),
        data=json.dumps(payload(analysis), separators=(",", ":")).replace("</", "<\\/"),
        style=assets.joinpath("report.css").read_text(encoding="utf-8"),
        script=assets.joinpath("report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )


def notebook_html(analysis: Analysis) -> str:
    """A small table for a notebook's cell: no script, inherits the notebook's colours."""
    rows = [
        (category, format_bytes(size), share(size, analysis.peak_bytes))
        for category, size in sorted(analysis.breakdown.items(), key=lambda item: -item[1])
    ]
    top = [(format_bytes(b.size), b.category, b.name, b.module, b.source) for b in analysis.at_peak[:10]]
    return (
        f"<p><b>{escape(analysis.name)}</b> {escape(headline(analysis))}</p>"
        + _table(("category", "bytes", "share"), rows, numbers=(1, 2))
        + f"<details><summary>Alive at the peak ({len(analysis.at_peak)})</summary>"
        + _table(("bytes", "category", "buffer", "module", "source"), top, numbers=(0,))
        + "</details>"
        + "".join(f"<p>{escape(line)}</p>" for line in advice(analysis))
    )


def payload(analysis: Analysis) -> dict[str, Any]:
    """What the charts draw, as plain types."""
    program = analysis.program
    lives = lifetimes(program)
    order = {name: k for k, name in enumerate(CATEGORIES)}
    points = analysis.frontier
    return {
        "categories": [{"name": name, "color": _COLORS[name]} for name in CATEGORIES],
        "storages": [[s.name, s.size, order[s.category], s.module, s.source] for s in program.storages],
        "lives": [[x.storage, x.start, x.end] for x in lives],
        "map": _map(program, lives),
        "steps": _series(program, analysis.timeline, by_category=True),
        "unplanned": _series(analysis.unplanned, timeline(analysis.unplanned), False) if analysis.unplanned else None,
        "budget": analysis.plan.budget if analysis.plan else None,
        "base_time": analysis.unplanned_time,
        "modules": _modules(analysis.by_module()),
        "frontier": {
            "budget": [p.budget for p in points],
            "peak": [p.peak for p in points],
            "time": [p.time for p in points],
            "status": [p.status for p in points],
            "does": [[decision_sentence(d, analysis.unplanned_time) for d in p.decisions[:_SENTENCES]] for p in points],
        },
    }


def _stride(steps: int) -> int:
    return max(1, -(-steps // _POINTS))


def _series(program: Program, instants: Sequence[Instant], by_category: bool) -> dict[str, Any]:
    """Columns for the timeline; of every ``_stride`` steps the fullest stands for all."""
    stride = _stride(len(instants))
    kept = [max(instants[k : k + stride], key=lambda i: i.total) for k in range(0, len(instants), stride)]
    series: dict[str, Any] = {
        "steps": len(program.steps),
        "time": round(sum(step.time for step in program.steps), 3),
        "index": [i.step for i in kept],
        "start": [round(i.start, 3) for i in kept],
        "total": [i.total for i in kept],
    }
    if by_category:
        used = [c for c in CATEGORIES if any(i.by_category[c] for i in kept)]
        series |= {
            "phase": _parts(kept),
            "label": [_label(program, i) for i in kept],
            "bytes": {c: [i.by_category[c] for i in kept] for c in used},
        }
    return series


def _parts(instants: Sequence[Instant]) -> list[str]:
    """The part of the step that each instant falls into: once the backward began, a repeated forward op is in it."""
    order = list(Phase)
    reached, found = 0, []
    for now in instants:
        reached = max(reached, order.index(now.phase))
        found.append(str(order[reached]))
    return found


def _label(program: Program, now: Instant) -> str:
    """'softmax_3 (forward, again) makes softmax_3 512.0 KiB<br>layers.3.attn<br>model.py:33'; text, not markup."""
    step = program.steps[now.step]
    again = ", again" if step.recompute else ""
    parts = [f"{step.name} ({step.phase}{again})"]
    for s in step.makes[:1]:
        storage = program.storages[s]
        parts += [f"makes {storage.name} {format_bytes(storage.size)}", storage.module, storage.source]
    return "<br>".join(part.replace("<", "‹").replace(">", "›") for part in parts if part)


def _map(program: Program, lives: Sequence[Lifetime]) -> list[tuple[int, int]]:
    """(index of the life, offset) of the buffers that matter most."""
    offsets, _ = first_fit(program)
    weight = [program.storages[x.storage].size * (x.end - x.start) for x in lives]
    largest = sorted(range(len(lives)), key=lambda k: -weight[k])[:_RECTANGLES]
    return [(k, offsets[lives[k]]) for k in sorted(largest) if weight[k]]


def _map_note(program: Program) -> str:
    count = len(lifetimes(program))
    some = f"The {_RECTANGLES} that matter most of {count} buffers. " if count > _RECTANGLES else ""
    return f"{some}A rectangle is a buffer: as wide as its life, as high as its size, laid out first fit."


def _modules(root: ModuleNode) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"path": [], "name": [], "parent": [], "total": []}

    def visit(node: ModuleNode, parent: str) -> None:
        path = node.path or "the step"
        for key, value in (("path", path), ("name", node.name or path), ("parent", parent), ("total", node.total)):
            columns[key].append(value)
        for child in node.children:
            visit(child, path)

    visit(root, "")
    return columns


def _cards(analysis: Analysis) -> str:
    cards = [("Peak", format_bytes(analysis.peak_bytes), f"{analysis.peak_bytes} bytes")]
    if analysis.unplanned:
        saved = analysis.unplanned_peak_bytes - analysis.peak_bytes
        cards.append(("Without a plan", format_bytes(analysis.unplanned_peak_bytes), f"{format_bytes(saved)} more"))
    if analysis.plan and analysis.plan.budget is not None:
        cards.append(("Budget", format_bytes(analysis.plan.budget), f"{analysis.plan.budget} bytes"))
    if analysis.time:
        added = analysis.time - analysis.unplanned_time
        small = f"+{share(added, analysis.unplanned_time)} by the plan" if analysis.unplanned else "predicted"
        cards.append(("Time", format_time(analysis.time), small))
    if analysis.plan:
        cards.append(
            ("Gap", f"{100 * analysis.plan.gap:.2f} %", f"no plan is faster by more ({analysis.plan.bound_scope})")
        )
    return "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>"
        for title, value, small in cards
    )


def _frontier(analysis: Analysis) -> str:
    if not analysis.frontier:
        return ""
    last = len(analysis.frontier) - 1
    return (
        '<section aria-labelledby="h-frontier"><h2 id="h-frontier">Peak against time</h2>'
        f'<p class="controls"><label>Budget <input type="range" id="budget" min="0" max="{last}" value="{last}"></label>'
        '<output id="budget-says" for="budget"></output></p>'
        '<div id="frontier" class="chart" role="img" aria-label="Time against peak, one point a budget"></div>'
        '<ul class="advice" id="budget-does" aria-live="polite"></ul></section>'
    )


def _decisions(analysis: Analysis) -> str:
    if not analysis.plan:
        return ""
    whole = analysis.unplanned_time
    rows = [
        (d.kind, d.what, d.module, d.source, str(d.count), str(d.runs), format_bytes(d.freed), share(d.time, whole))
        for d in analysis.decisions
    ]
    columns = ("decision", "ops", "module", "source", "count", "runs", "frees at the old peak", "time")
    body = _table(columns, rows, numbers=(4, 5, 6, 7)) if rows else "<p>Nothing changes: the step fits as it is.</p>"
    return (
        '<section aria-labelledby="h-plan"><h2 id="h-plan">What the plan does</h2>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Decisions">{body}</div></section>'
    )


def _advice(analysis: Analysis) -> str:
    said = advice(analysis)
    if not said:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in said)
    return (
        f'<section aria-labelledby="h-advice"><h2 id="h-advice">In words</h2><ul class="advice">{items}</ul></section>'
    )


def _at_peak(analysis: Analysis) -> str:
    buffers = analysis.at_peak
    rows = [(format_bytes(b.size), b.category, b.name, b.module, b.source) for b in buffers[:_ROWS]]
    table = _table(("bytes", "category", "buffer", "module", "source"), rows, numbers=(0,), name="peak-table")
    rest = buffers[_ROWS:]
    return table + (f"<p>{len(rest)} more, {format_bytes(sum(b.size for b in rest))} together</p>" if rest else "")


def _footer(analysis: Analysis) -> str:
    said = [", ".join(f"{name} {value}" for name, value in analysis.versions.items())]
    said += [f"target {analysis.target}"] if analysis.target else []
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in analysis.notes)
    return notes + escape("; ".join(s for s in said if s))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int], name: str = "") -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        kind = {k: ' class="n"' for k in numbers}
        return "".join(f"<{tag}{kind.get(k, '')}>{escape(v)}</{tag}>" for k, v in enumerate(values))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    label = f' id="{name}"' if name else ""
    return f"<table{label}><thead><tr>{cells('th', columns)}</tr></thead><tbody>{body}</tbody></table>"

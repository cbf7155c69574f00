"""An Analysis as Markdown: for a README, an issue or a step summary."""

from __future__ import annotations

from memplan.analysis import Analysis
from memplan.report.ci import cut
from memplan.report.words import advice, headline, share
from memplan.units import format_bytes

_TOP = 20


def analysis_markdown(analysis: Analysis) -> str:
    """Headline, bytes by category, the largest buffers at the peak (folded), advice; at most 64 KB."""
    lines = [
        f"### {analysis.name or 'Step'}",
        "",
        headline(analysis),
        "",
        "| category | bytes | share |",
        "|---|--:|--:|",
    ]
    for category, size in sorted(analysis.breakdown.items(), key=lambda item: -item[1]):
        lines.append(f"| {category} | {format_bytes(size)} | {share(size, analysis.peak_bytes)} |")
    lines += ["", f"<details><summary>The largest of {len(analysis.at_peak)} buffers alive at the peak</summary>", ""]
    lines += ["| bytes | category | buffer | module | source |", "|--:|---|---|---|---|"]
    for b in analysis.at_peak[:_TOP]:
        lines.append(f"| {format_bytes(b.size)} | {b.category} | {b.name} | {b.module} | {b.source} |")
    lines += ["", "</details>"]
    said = advice(analysis)
    lines += ["", "What would help:", "", *(f"- {line}" for line in said)] if said else []
    lines += [f"\n> {note}" for note in analysis.notes]
    return cut("\n".join(lines) + "\n")

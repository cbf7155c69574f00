"""An Analysis for a terminal (rich) and as plain text or JSON."""

from __future__ import annotations

from io import StringIO

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from memplan.analysis import Analysis, FrontierPoint, ModuleNode
from memplan.errors import LiveBuffer
from memplan.report.words import decision_sentence, format_time, headline, outlook, share
from memplan.units import format_bytes

_WIDTH = 140  # of a text file; a terminal's own width is used there
_TOP = 10  # buffers shown without --why
_SMALL = 0.01  # modules below this share of the peak are summed up


def as_json(analysis: Analysis) -> str:
    return analysis.to_json() + "\n"


def as_text(analysis: Analysis) -> str:
    return plain(analysis_view(analysis, why=True))


def plain(view: RenderableType) -> str:
    """Any view without colours, for a file or a pipe."""
    console = Console(file=StringIO(), width=_WIDTH, no_color=True, highlight=False)
    console.print(view)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def analysis_view(analysis: Analysis, depth: int = 2, why: bool = False) -> Group:
    """Headline, bytes by category, tree by module to ``depth``, buffers at the peak (all with ``why``), advice."""
    parts: list[RenderableType] = [Text(_title(analysis), style="bold"), Text(headline(analysis)), Text("")]
    parts += [category_table(analysis), Text(""), module_tree(analysis, depth), Text("")]
    parts += [buffer_table(analysis.at_peak if why else analysis.at_peak[:_TOP], len(analysis.at_peak))]
    if analysis.plan:
        parts += [Text(""), decision_table(analysis)]
    said = outlook(analysis)
    if said:
        parts += [Text(""), Text("What would help", style="bold"), *(Text(f"  • {line}") for line in said)]
    parts += [Text(f"note: {note}", style="yellow") for note in analysis.notes]
    return Group(*parts)


def category_table(analysis: Analysis) -> Table:
    table = Table("category", title="At the peak", title_justify="left", box=None, pad_edge=False)
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    for category, size in sorted(analysis.breakdown.items(), key=lambda item: -item[1]):
        bar = "█" * round(30 * size / max(1, analysis.peak_bytes))
        table.add_row(category, format_bytes(size), share(size, analysis.peak_bytes), Text(bar, style="cyan"))
    return table


def module_tree(analysis: Analysis, depth: int) -> Tree:
    """Modules that hold a noticeable share of the peak, down to ``depth`` levels."""
    root = analysis.by_module()
    tree = Tree(Text(f"By module  {format_bytes(root.total)}", style="bold"), guide_style="dim")
    _branches(tree, root, depth, max(1, int(_SMALL * root.total)))
    return tree


def _branches(tree: Tree, node: ModuleNode, depth: int, smallest: int) -> None:
    if depth == 0:
        return
    rest = 0
    for alike in _runs(node.children):
        child, total = alike[0], sum(c.total for c in alike)
        if total < smallest:
            rest += total
            continue
        said = f"each of {child.name}–{alike[-1].name} ({len(alike)} ×)" if len(alike) > 1 else child.name
        branch = tree.add(Text.assemble((f"{format_bytes(child.total):>10}  ", "cyan"), said))
        _branches(branch, child, depth - 1, smallest)
    if node.own and node.children:
        tree.add(Text.assemble((f"{format_bytes(node.own):>10}  ", "cyan"), ("(itself)", "dim")))
    if rest:
        tree.add(Text.assemble((f"{format_bytes(rest):>10}  ", "cyan"), ("(smaller ones)", "dim")))


def _runs(children: tuple[ModuleNode, ...]) -> list[list[ModuleNode]]:
    """Neighbouring numbered layers that hold the same bytes stand as one."""
    runs: list[list[ModuleNode]] = []
    for child in children:
        if runs and _follows(runs[-1][-1], child):
            runs[-1].append(child)
        else:
            runs.append([child])
    return runs


def _follows(last: ModuleNode, child: ModuleNode) -> bool:
    numbered = last.name.isdigit() and child.name.isdigit()
    return numbered and last.total == child.total and int(child.name) == int(last.name) + 1


def buffer_table(buffers: tuple[LiveBuffer, ...], of: int) -> Table:
    """Buffers, largest first; ``of``: how many are alive in all."""
    title = f"Alive at the peak ({len(buffers)} of {of}; --why shows all)" if len(buffers) < of else "Alive at the peak"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("bytes", justify="right", no_wrap=True)
    for column in ("category", "buffer", "module", "source"):
        table.add_column(column, overflow="fold")
    for b in buffers:
        table.add_row(format_bytes(b.size), b.category, b.name, b.module, b.source)
    return table


def decision_table(analysis: Analysis) -> Group:
    """The plan: budget, predicted time, bound and gap, then its decisions."""
    plan = analysis.plan
    assert plan is not None
    head = Table.grid(padding=(0, 2))
    head.add_row("budget", format_bytes(plan.budget) if plan.budget is not None else "none")
    head.add_row(
        "peak", f"{format_bytes(analysis.peak_bytes)} (unplanned {format_bytes(analysis.unplanned_peak_bytes)})"
    )
    head.add_row("time", f"{format_time(analysis.time)} (unplanned {format_time(analysis.unplanned_time)})")
    head.add_row("bound", f"{format_time(plan.bound)} ({plan.bound_scope}), gap {100 * plan.gap:.2f} %, {plan.status}")
    lines = [Text(f"  • {decision_sentence(d, analysis.unplanned_time)}") for d in analysis.decisions]
    none = Text("  nothing needs to change: the step fits as it is", style="dim")
    return Group(Text("Plan", style="bold"), head, *(lines or [none]))


def frontier_table(points: tuple[FrontierPoint, ...], unplanned_peak: int, unplanned_time: float) -> Table:
    """Peak against time, one row a budget."""
    table = Table(title="Peak against time", title_justify="left", box=None, pad_edge=False)
    for column in ("budget", "peak", "of unplanned", "time", "more time", "at least", "status"):
        table.add_column(column, justify="left" if column == "status" else "right")
    for p in points:
        table.add_row(
            format_bytes(p.budget, up=True),
            format_bytes(p.peak, up=True),
            share(p.peak, unplanned_peak),
            format_time(p.time),
            share(p.time - unplanned_time, unplanned_time),
            share(max(0.0, p.bound - unplanned_time), unplanned_time),
            p.status,
        )
    return table


def _title(analysis: Analysis) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in analysis.versions.items() if k != "platform")
    parts = (analysis.name or "step", analysis.target and f"on {analysis.target}", versions and f"({versions})")
    return " ".join(part for part in parts if part)

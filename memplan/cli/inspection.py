"""``analyze``, ``plan``, ``frontier`` and ``export``: what one step holds, and what a budget would cost."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memplan.cli.common import (
    Entry,
    Force,
    Format,
    FormatOption,
    Inputs,
    Optimizer,
    Output,
    Target,
    TimeLimit,
    Train,
    check_output,
    emit,
    show,
    tell,
    verdict_text,
)
from memplan.interrupts import interrupts

if TYPE_CHECKING:
    from memplan.analysis import Analysis
    from memplan.gate import Verdict

Depth = Annotated[int, typer.Option(min=0, help="Levels of the module tree.")]
_ADVICE_EFFORT = 0.1  # of the solvers' default: a proposal need not be the best plan, and should come at once
Why = Annotated[bool, typer.Option("--why", help="List every buffer alive at the peak.")]


def analyze(
    entry: Entry,
    train: Train = True,
    optimizer: Optimizer = None,
    inputs: Inputs = None,
    target: Target = None,
    limit: Annotated[str | None, typer.Option(help="Exit with 1 when the peak is over it, e.g. 24GiB.")] = None,
    advice: Annotated[bool, typer.Option(help="Plan two smaller budgets, to say what would help.")] = True,
    depth: Depth = 2,
    why: Why = False,
    fmt: FormatOption = Format.TABLE,
    output: Output = None,
    force: Force = False,
) -> int:
    """Show where the bytes of a step go.

    Peak by category and module, the buffers alive at it, and what would lower it. ENTRY's code is executed. Its model needs no memory: tensors have shapes but no bytes.
    """
    from memplan.gate import judge
    from memplan.units import parse_bytes

    check_output(output, force, suffixed=True)
    if limit is not None:
        parse_bytes(limit)
    points, effort = (3, _ADVICE_EFFORT) if advice else (0, None)
    analysis = analyse(
        entry,
        train=train,
        optimizer=optimizer,
        inputs=inputs,
        target=target,
        frontier_points=points,
        effort=effort,
    )
    verdict = judge(entry, analysis, limit=limit)
    if output:
        analysis.export(output)
    print_analysis(analysis, fmt, depth, why, verdict.limit)
    for failure in verdict.failures:
        tell(failure)
    return 0 if verdict.ok else 1


def plan(
    entry: Entry,
    memory_budget: Annotated[str, typer.Option(help="Bytes, '24GiB', or '60%' of the unplanned peak.")],
    train: Train = True,
    optimizer: Optimizer = None,
    inputs: Inputs = None,
    target: Target = None,
    time_limit: TimeLimit = None,
    depth: Depth = 1,
    why: Why = False,
    fmt: FormatOption = Format.TABLE,
    output: Output = None,
    force: Force = False,
) -> int:
    """Plan a step inside a memory budget.

    What is recomputed or moved, the predicted time, its bound and the gap.
    Exit status 1: no plan fits; the smallest feasible budget is named; 2: none was found within --time-limit or before
    Ctrl-C, which ends the search with the best plan so far. ENTRY's code is executed.
    """
    from memplan.errors import BudgetInfeasibleError
    from memplan.gate import Verdict, refusal
    from memplan.units import format_bytes

    check_output(output, force, suffixed=True)
    with interrupts() as seen:
        try:
            analysis = analyse(
                entry,
                train=train,
                optimizer=optimizer,
                inputs=inputs,
                target=target,
                memory_budget=memory_budget,
                time_limit=time_limit,
                best_so_far=True,
            )
        except BudgetInfeasibleError as error:
            if error.budget < error.bound or not (seen or time_limit is not None):
                tell(str(error))
                _print_verdict(refusal(entry, error), fmt)
                return 1
            when = "before the interrupt" if seen else "within the time limit"
            said = f"no plan for {format_bytes(error.budget)} was found {when}; that is no proof that there is none"
            tell(said)
            _print_verdict(Verdict(entry, error=said), fmt)
            return 2
    if seen:
        tell("interrupted: this is the best plan found until then")
    if output:
        analysis.export(output)
    print_analysis(analysis, fmt, depth, why, None)
    return 0


def frontier(
    entry: Entry,
    points: Annotated[int, typer.Option(min=2, max=64, help="Budgets to try.")] = 9,
    train: Train = True,
    optimizer: Optimizer = None,
    inputs: Inputs = None,
    target: Target = None,
    time_limit: TimeLimit = None,
    fmt: FormatOption = Format.TABLE,
    output: Output = None,
    force: Force = False,
) -> int:
    """Show peak against time over all budgets.

    From the unplanned peak down to the smallest feasible budget. ENTRY's code is executed."""
    from memplan.report.text import frontier_table

    check_output(output, force, suffixed=True)
    analysis = analyse(
        entry,
        train=train,
        optimizer=optimizer,
        inputs=inputs,
        target=target,
        time_limit=time_limit,
        frontier_points=points,
    )
    if output:
        analysis.export(output)
    if fmt == Format.TABLE:
        show(frontier_table(analysis.frontier, analysis.unplanned_peak_bytes, analysis.unplanned_time))
    else:
        print_analysis(analysis, fmt, 1, False, None)
    return 0


def export(
    file: Annotated[Path, typer.Argument(help="An analysis or plan that -o wrote as JSON.")],
    fmt: Annotated[str | None, typer.Option("--format", help="memory-viz, chrome-trace, csv, dot, html, …")] = None,
    output: Output = None,
    force: Force = False,
) -> int:
    """Write a saved analysis for another tool."""
    from memplan.errors import InputError, OptionError
    from memplan.gate import read_analyses
    from memplan.report import render, suffix_for, write

    check_output(output, force)
    analyses = read_analyses(file)
    if len(analyses) != 1:
        raise InputError(f"{file} holds {len(analyses)} analyses; export takes one")
    (analysis,) = analyses.values()
    if fmt is None and output is None:
        raise OptionError("say what to write: --format memory-viz|chrome-trace|csv|dot|html, or -o FILE")
    if output is None and fmt is not None:
        content = render(analysis, fmt)
        if isinstance(content, str):
            emit(content)
            return 0
        output = file.with_suffix(suffix_for(fmt))
        check_output(output, force)
    assert output is not None
    write(analysis, output, fmt)
    tell(f"wrote {output}")
    return 0


def analyse(
    entry: str,
    *,
    train: bool,
    optimizer: str | None = None,
    inputs: list[str] | tuple[str, ...] | None = None,
    target: str | None = None,
    memory_budget: str | int | None = None,
    time_limit: float | None = None,
    frontier_points: int = 0,
    effort: float | None = None,
    best_so_far: bool = False,
) -> Analysis:
    """Load an entry and analyse it; says on stderr that its code runs, and sends there what that code prints.

    ``best_so_far``: Ctrl-C ends a solver's search; otherwise all of it ends. Raises BudgetInfeasibleError with sources
    relative to the working directory."""
    from memplan.analysis import relative_source
    from memplan.cli.entry import load_entry, parse_shape
    from memplan.cli.solve import progress
    from memplan.devices import profile_for
    from memplan.errors import BudgetInfeasibleError, InputError
    from memplan.optimizers import Optimizer
    from memplan.units import parse_budget

    profile = profile_for(target or "cpu")  # a slip of the keyboard is told before minutes of tracing
    if optimizer is not None:
        Optimizer.parse(optimizer, profile.kind)
    if memory_budget is not None:
        parse_budget(memory_budget, 0)
    for text in inputs or ():
        parse_shape(text)
    tell(f"memplan: executing {entry} (tensors get shapes, no memory)")
    with interrupts() as seen, progress("analysing") as said, _no_collections(), redirect_stdout(sys.stderr):

        def say(text: str) -> None:
            if seen and not best_so_far:
                raise KeyboardInterrupt
            if said is not None:
                said(text)

        # Torch logs what a forward raises, traceback and all, beside raising it.
        if not os.environ.get("MEMPLAN_DEBUG"):
            logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
        try:
            loaded = load_entry(entry, inputs or ())
            from memplan import api

            return api.analyze(
                loaded.model,
                loaded.args,
                dict(loaded.kwargs),
                training=train,
                optimizer=optimizer,
                target=target,
                memory_budget=memory_budget,
                time_limit=time_limit,
                frontier_points=frontier_points,
                effort=effort,
                name=entry,
                progress=say,
            )
        except SystemExit as error:
            raise InputError(f"{entry} failed: SystemExit: {error}") from error
        except BudgetInfeasibleError as error:
            alive = tuple(replace(b, source=relative_source(b.source)) for b in error.alive)
            raise BudgetInfeasibleError(error.budget, error.smallest, error.bound, error.tightest, alive) from error


@contextmanager
def _no_collections() -> Iterator[None]:
    """No cyclic garbage is looked for meanwhile: a trace keeps nearly all it makes, and every look walks through it (a
    ninth of the time on Llama-3-8B, for 50 MB)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def print_analysis(analysis: Analysis, fmt: Format, depth: int, why: bool, limit: int | None) -> None:
    """The answer on stdout."""
    from memplan.gate import judge
    from memplan.report import markdown, text

    if fmt == Format.TABLE:
        show(text.analysis_view(analysis, depth, why))
    elif fmt == Format.JSON:
        emit(text.as_json(analysis))
    elif fmt == Format.MARKDOWN:
        emit(markdown.analysis_markdown(analysis))
    else:
        _print_verdict(judge(analysis.name, analysis, limit=limit), fmt)


def _print_verdict(verdict: Verdict, fmt: Format) -> None:
    """A verdict on stdout, but that of the table, which stderr has said."""
    said = "" if fmt == Format.TABLE else verdict_text([verdict], fmt)
    if said:
        emit(said)


def register(app: typer.Typer) -> None:
    for command in (analyze, plan, frontier, export):
        app.command()(command)

"""``check`` and ``compare``: budgets in the repository, and regressions against a base. For continuous integration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memplan.cli.common import Force, Format, check_output, emit, show, tell, verdict_text
from memplan.report import put

if TYPE_CHECKING:
    from memplan.analysis import Analysis
    from memplan.gate import ModelConfig, Rule, Verdict

GateFormat = Annotated[
    Format | None,
    typer.Option("--format", help="How to print the verdict; github inside GitHub Actions, else table."),
]
Comment = Annotated[Path | None, typer.Option(help="Also write the verdict as Markdown (at most 64 KB) here.")]
Sarif = Annotated[Path | None, typer.Option(help="Also write the verdict as SARIF here.")]
FailOn = Annotated[
    list[str] | None,
    typer.Option(help="Allowed growth against the base, e.g. 'peak:2%' or 'activation:64MiB'; may repeat."),
]
Base = Annotated[Path | None, typer.Option(help="What check -o wrote on the base; judges max_regression too.")]


def check(
    config: Annotated[Path, typer.Option(help="pyproject.toml, or a folder in or below its own.")] = Path("."),
    only: Annotated[list[str] | None, typer.Option("--model", help="Check only this model; may repeat.")] = None,
    base: Base = None,
    fail_on: FailOn = None,
    fmt: GateFormat = None,
    comment: Comment = None,
    sarif: Sarif = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Save the analyses, for compare.")] = None,
    force: Force = False,
) -> int:
    """Check the budgets of pyproject.toml.

    Holds every [[tool.memplan.model]] against its limit. The entries' code is executed, from the folder of that file.
    """
    from memplan.errors import OptionError
    from memplan.gate import Rule, analyses_to_json, config_file, exit_code, read_analyses, read_config

    check_output(output, force)
    check_output(comment, True)
    check_output(sarif, True)
    file = config_file(config)
    models = read_config(file)
    unknown = set(only or ()) - {m.label for m in models}
    if unknown:
        raise OptionError(f"no model {min(unknown)!r}; models are {', '.join(m.label for m in models)}")
    before = read_analyses(base) if base else {}
    rules = [Rule.parse(text) for text in fail_on or ()]
    with chdir(file.parent):  # entries and source lines are relative to it, wherever the command was given
        verdicts = [_check(m, before, rules) for m in models if not only or m.label in only]
    if output:
        put(output, analyses_to_json({v.name: v.head for v in verdicts if v.head}))
    deliver(verdicts, fmt, comment, sarif)
    return exit_code(verdicts)


def _check(model: ModelConfig, before: Mapping[str, Analysis], rules: Sequence[Rule]) -> Verdict:
    from memplan.cli.inspection import analyse
    from memplan.errors import BudgetInfeasibleError, MemplanError
    from memplan.gate import Rule, Verdict, judge, refusal

    try:
        head = analyse(
            model.entry,
            train=model.train,
            optimizer=model.optimizer,
            inputs=model.input,
            target=model.target,
            memory_budget=model.memory_budget,
        )
    except BudgetInfeasibleError as error:  # an answer: the step is over its budget, whatever is planned
        return refusal(model.label, error)
    except MemplanError as error:
        return Verdict(model.label, error=str(error))
    own = [] if model.max_regression is None else [Rule.parse(f"peak:{model.max_regression}")]
    return judge(model.label, head, before.get(model.label), model.limit, list(dict.fromkeys([*own, *rules])))


def compare(
    base: Annotated[Path, typer.Argument(help="Analyses of the base: a file that check -o or analyze -o wrote.")],
    head: Annotated[Path, typer.Argument(help="Analyses of the head.")],
    fail_on: FailOn = None,
    fmt: GateFormat = None,
    comment: Comment = None,
    sarif: Sarif = None,
) -> int:
    """Compare two saved analyses.

    Peaks, the buffers that changed at them with their source lines, and whether that is allowed; without --fail-on no
    peak may grow.
    """
    from memplan.gate import Rule, exit_code, judge, read_analyses

    check_output(comment, True)
    check_output(sarif, True)
    rules = [Rule.parse(text) for text in fail_on or ("peak:0%",)]
    before, now = read_analyses(base), read_analyses(head)
    if len(before) == len(now) == 1:  # the same model under another path or name
        before = dict(zip(now, before.values()))
    verdicts = [judge(name, analysis, before.get(name), rules=rules) for name, analysis in now.items()]
    for name in before.keys() - now.keys():
        tell(f"warning: {name} is in {base} and not in {head}")
    deliver(verdicts, fmt, comment, sarif)
    return exit_code(verdicts)


def deliver(verdicts: Sequence[Verdict], fmt: Format | None, comment: Path | None, sarif: Path | None) -> None:
    """Print the verdicts; inside GitHub Actions write the step summary too; write the files that were asked for."""
    from memplan.report import ci

    in_actions = os.environ.get("GITHUB_ACTIONS") == "true"
    chosen = fmt or (Format.GITHUB if in_actions else Format.TABLE)
    if chosen == Format.TABLE:
        show(ci.verdict_view(verdicts))
    else:
        text = verdict_text(verdicts, chosen)
        if text:
            emit(text)
        tell(ci.summary(verdicts))
    markdown = ci.verdict_markdown(verdicts)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        with open(summary, "a", encoding="utf-8") as file:
            file.write(markdown + "\n")
    if comment:
        put(comment, markdown)
    if sarif:
        put(sarif, ci.sarif(verdicts))


def register(app: typer.Typer) -> None:
    app.command()(check)
    app.command()(compare)

"""What every command shares: options with their help, and writing results."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memplan.errors import OptionError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memplan.gate import Verdict


class Format(StrEnum):
    """How a command prints its answer on stdout."""

    TABLE = "table"
    JSON = "json"
    MARKDOWN = "markdown"
    GITHUB = "github"
    JUNIT = "junit"
    SARIF = "sarif"


Entry = Annotated[
    str,
    typer.Argument(
        metavar="ENTRY",
        help="file.py:name or module:attr: a callable that returns (model, example_inputs), or the two themselves. "
        "memplan imports that file and calls the function: it executes the code.",
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="Input given as a shape, e.g. 8x1024:int64 or input_ids=8x1024:int64; once an input.",
    ),
]
Train = Annotated[bool, typer.Option("--train/--inference", help="A training step, or the forward alone.")]
Optimizer = Annotated[
    str | None,
    typer.Option(
        help="adamw, adam, momentum or sgd: count its state and its update (with --train), as torch.optim runs it by "
        "default on the device, or as named: adamw:for-loop, adamw:foreach, adamw:fused.",
    ),
]
Target = Annotated[
    str | None, typer.Option(help="Device to plan for: a profile of `memplan targets` or a profile file.")
]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Write here; the suffix picks the format.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output file.")]
FormatOption = Annotated[Format, typer.Option("--format", help="How to print the answer on stdout.")]
TimeLimit = Annotated[float | None, typer.Option(min=0.0, help="Stop the solver after this many seconds.")]


def check_output(path: Path | None, force: bool, suffixed: bool = False) -> None:
    """Refuse an output that exists or cannot be written, before any work; ``suffixed``: or whose suffix names no format.
    Raises OptionError."""
    if path is None:
        return
    if path.is_dir():
        raise OptionError(f"{path} is a folder; name a file")
    if path.exists() and not force:
        raise OptionError(f"{path} exists; --force overwrites it")
    if not path.parent.is_dir():
        raise OptionError(f"there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OptionError(f"{path} cannot be written: permission denied")
    if suffixed:
        from memplan.report import suffix_of

        suffix_of(path)


def emit(text: str) -> None:
    """Data for stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def verdict_text(verdicts: Sequence[Verdict], fmt: Format) -> str:
    """Verdicts as a document of a format that is not the table."""
    from memplan.report import ci

    writers: dict[Format, Callable[[Sequence[Verdict]], str]] = {
        Format.JSON: ci.verdict_json,
        Format.MARKDOWN: ci.verdict_markdown,
        Format.GITHUB: ci.workflow_commands,
        Format.JUNIT: ci.junit,
        Format.SARIF: ci.sarif,
    }
    return writers[fmt](verdicts)


def show(view: RenderableType) -> None:
    """A rich view on stdout: coloured in a terminal, plain and 140 columns wide in a pipe."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
    Console(file=sys.stdout, width=width, highlight=False, soft_wrap=False).print(view)


def tell(text: str) -> None:
    """Progress for stderr."""
    typer.echo(text, err=True)

"""The command line. stdout is data, stderr is progress and errors.

Exit status: 0 within budget, 1 over budget, regressed or proven infeasible, 2 could not answer. Importing this module
imports neither torch nor a solver; each command imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import typer

from memplan import __version__
from memplan.cli import demo, gate, info, inspection, solve
from memplan.cli.common import tell
from memplan.errors import MemplanError

_UsageError: type[Exception] = typer.BadParameter.mro()[1]  # typer has no public name for its usage errors' base
_INTERRUPTED = 130  # how newer typers answer Ctrl-C; older ones raise Abort

app = typer.Typer(
    name="memplan",
    help="Where the bytes of a PyTorch step go, and the plan that keeps it inside a number of them.",
    epilog="Exit status: 0 within budget, 1 over budget or regressed, 2 could not answer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # rich panels cost 0.2 s of start-up
)
for module in (inspection, gate, solve, info, demo):
    module.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memplan {__version__}")
        raise typer.Exit(0)


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks of errors."),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    if debug:
        os.environ["MEMPLAN_DEBUG"] = "1"


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit status."""
    try:
        status = app(list(arguments), standalone_mode=False, prog_name="memplan")
        sys.stdout.flush()
        if status != _INTERRUPTED:
            return int(status or 0)
        tell("interrupted")
    except _UsageError as error:
        error.show()  # type: ignore[attr-defined]
    except typer.Abort:
        tell("interrupted")
    except SystemExit:  # typer's answer to a reader that left; its status, 1, would say "over budget"
        _drop_stdout()
    except MemplanError as error:
        _say(error, f"error: {error}")
    except BrokenPipeError:
        _drop_stdout()
    except OSError as error:  # a full disk, a folder without permission
        _say(error, f"error: {error.filename or 'output'}: {error.strerror or error}")
    except Exception as error:  # noqa: BLE001 - the boundary: a crash must not exit with 1, which says "over budget"
        _say(error, f"internal error: {type(error).__name__}: {error}")
    return 2


def _drop_stdout() -> None:
    """The reader left; nothing more to say."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(error: Exception, text: str) -> None:
    with suppress(OSError):  # stderr itself may stand on the full disk
        if os.environ.get("MEMPLAN_DEBUG"):
            import traceback

            traceback.print_exception(error)
        else:
            tell(f"{text}\n(memplan --debug … shows the traceback)")


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))

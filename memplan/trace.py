"""``trace.enabled``: every stage of a graph's way, as files that a person can read and tools can load.

A graph gets a directory of its own under ``trace.dir``; its files are numbered in the order in which they came to be.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from torch import fx

from memplan.options import Options
from memplan.plans import Plan
from memplan.problem import Problem
from memplan.program import Program

_graphs = itertools.count()


class Trace:
    """The files of one graph; without a directory nothing is written."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._stages = itertools.count()

    @classmethod
    def of(cls, options: Options) -> Trace:
        """Where the options say; the name tells processes and graphs apart."""
        if not options.trace_enabled:
            return cls()
        return cls(Path(options.trace_dir) / f"{os.getpid()}-graph{next(_graphs)}")

    def graph(self, stage: str, graph_module: fx.GraphModule) -> None:
        """``graph_module`` as readable Python, with shapes and source lines."""
        if self._directory is not None:
            self._write(f"{stage}.py", graph_module.print_readable(print_output=False))

    def data(self, stage: str, document: Problem | Plan | Program) -> None:
        """``document`` as JSON, which its ``load`` reads."""
        if self._directory is not None:
            self._write(f"{stage}.json", document.to_json())

    def _write(self, name: str, text: str) -> None:
        assert self._directory is not None
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / f"{next(self._stages):02}-{name}").write_text(text)


SILENT = Trace()

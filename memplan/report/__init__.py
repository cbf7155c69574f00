"""Writes an Analysis in the format that a file's suffix names. Modules load on first use: each format is its own."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from memplan.errors import OptionError

if TYPE_CHECKING:
    from memplan.analysis import Analysis

# suffix -> (format as --format names it, module, function: Analysis -> str or bytes). Longer suffixes win.
SUFFIXES = {
    ".json": ("json", "memplan.report.text", "as_json"),
    ".txt": ("table", "memplan.report.text", "as_text"),
    ".md": ("markdown", "memplan.report.markdown", "analysis_markdown"),
    ".html": ("html", "memplan.report.html", "report_html"),
    ".trace.json": ("chrome-trace", "memplan.report.interchange", "chrome_trace"),
    ".pickle": ("memory-viz", "memplan.report.interchange", "memory_viz"),
    ".csv": ("csv", "memplan.report.interchange", "buffers_csv"),
    ".dot": ("dot", "memplan.report.interchange", "graph_dot"),
}


def formats() -> tuple[str, ...]:
    """Every format, as ``memplan export --format`` names it."""
    return tuple(name for name, _, _ in SUFFIXES.values())


def suffix_of(path: Path) -> str:
    """The suffix that picks a format; raises OptionError for an unknown one."""
    found = max((s for s in SUFFIXES if path.name.endswith(s)), key=len, default=None)
    if found is None:
        raise OptionError(f"cannot tell a format from {path.name!r}; suffixes are {', '.join(SUFFIXES)}")
    return found


def suffix_for(fmt: str) -> str:
    """The suffix of a format's files; raises OptionError for an unknown format."""
    for suffix, (name, _, _) in SUFFIXES.items():
        if name == fmt:
            return suffix
    raise OptionError(f"unknown format {fmt!r}; formats are {', '.join(formats())}")


def render(analysis: Analysis, fmt: str) -> str | bytes:
    """The analysis in one format; raises OptionError for an unknown one."""
    _, module, function = SUFFIXES[suffix_for(fmt)]
    content: str | bytes = getattr(import_module(module), function)(analysis)
    return content


def write(analysis: Analysis, path: Path, fmt: str | None = None) -> None:
    """Write the analysis to a file in the format given, or in the one that the suffix names."""
    put(path, render(analysis, fmt or SUFFIXES[suffix_of(path)][0]))


def put(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a full disk or Ctrl-C leaves no part of it, and an older file as it was."""
    raw = content if isinstance(content, bytes) else content.encode()
    if path.is_symlink() or (path.exists() and not path.is_file()):  # a link or a device is written through
        path.write_bytes(raw)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(raw)
        partial.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # nobody asked for the other
        raise
    finally:
        partial.unlink(missing_ok=True)

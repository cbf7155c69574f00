"""``targets``, ``passes``, ``env``: what there is."""

from __future__ import annotations

import ast
import json
from enum import StrEnum
from typing import Annotated

import typer

from memplan.cli.common import emit, show


class Listing(StrEnum):
    """How a list is printed."""

    TABLE = "table"
    JSON = "json"


ListingOption = Annotated[Listing, typer.Option("--format", help="How to print the list on stdout.")]


def targets(fmt: ListingOption = Listing.TABLE) -> int:
    """List the device profiles that --target knows."""
    from dataclasses import asdict

    from rich.table import Table

    from memplan.devices import known_profiles, profile_for
    from memplan.units import format_bytes

    profiles = [profile_for(name) for name in known_profiles()]
    if fmt == Listing.JSON:
        emit(json.dumps([asdict(p) for p in profiles]))
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("target", "memory", "float32", "bfloat16", "bandwidth", "links"):
        table.add_column(column)
    for p in profiles:
        speeds = [f"{p.flops[k] / 1e12:.3g} TFLOP/s" if k in p.flops else "" for k in ("float32", "bfloat16")]
        links = ", ".join(f"{tier} {link.write / 1e9:.3g} GB/s" for tier, link in p.links.items())
        table.add_row(p.name, format_bytes(p.memory), *speeds, f"{p.bandwidth / 1e9:.4g} GB/s", links)
    show(table)
    return 0


def passes(fmt: ListingOption = Listing.TABLE) -> int:
    """List the graph passes and what each decides."""
    from importlib import resources

    from rich.table import Table

    found = {}
    for file in sorted(resources.files("memplan.passes").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".py") and not file.name.startswith("_"):
            said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            found[file.name.removesuffix(".py")] = said.partition("\n")[0]
    if fmt == Listing.JSON:
        emit(json.dumps(found))
        return 0
    table = Table("pass", "what it does", box=None, pad_edge=False)
    for row in found.items():
        table.add_row(*row)
    show(table)
    return 0


def env(fmt: ListingOption = Listing.TABLE) -> int:
    """Show versions and the options in force."""
    from dataclasses import asdict

    from memplan.analysis import environment
    from memplan.options import Options

    facts = {"versions": environment(), "options": asdict(Options.resolve())}
    if fmt == Listing.JSON:
        emit(json.dumps(facts))
        return 0
    for title, part in facts.items():
        emit(title)
        for key, value in part.items():
            emit(f"  {key}: {value}")
    return 0


def register(app: typer.Typer) -> None:
    for command in (passes, targets, env):
        app.command()(command)

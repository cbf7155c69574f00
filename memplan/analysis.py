"""What a step holds and when: the one object behind every table, report and check. No torch.

An Analysis keeps the Program that would run (and the unplanned one beside it); every figure is derived from them, so a
saved analysis cannot disagree with itself.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import machine, python_version, system
from typing import TYPE_CHECKING, Any

from memplan.decisions import Decision
from memplan.errors import LiveBuffer
from memplan.plans import Plan
from memplan.problem import SCHEMA_VERSION, Category, Phase, read_schema, reading
from memplan.program import Program, StepKind
from memplan.simulate import Timeline, simulate
from memplan.units import parse_bytes

if TYPE_CHECKING:
    from rich.console import Group

WORKSPACE = "workspace"  # bytes that a kernel holds only while it runs; not a buffer's category, counted beside them
CATEGORIES = (*(str(c) for c in Category), WORKSPACE)


@dataclass(frozen=True)
class Instant:
    """The bytes held while one step runs."""

    step: int  # index in the Program
    name: str
    phase: Phase
    start: float  # microseconds from the beginning of the step
    total: int  # bytes
    by_category: Mapping[str, int]  # bytes; the names are CATEGORIES


@dataclass(frozen=True)
class Lifetime:
    """One storage of the Program and the half-open span of steps that hold it."""

    storage: int
    start: int  # 0 for resident ones
    end: int  # the number of steps when it is held to the end


@dataclass(frozen=True)
class ModuleNode:
    """Bytes alive at the peak by nn.Module, as a tree; ``total`` includes the children."""

    name: str  # last part of the path
    path: str
    own: int
    total: int
    children: tuple[ModuleNode, ...] = ()


@dataclass(frozen=True)
class FrontierPoint:
    """One budget tried: the peak and the time of its plan, and what it decides."""

    budget: int
    peak: int
    time: float
    bound: float  # no plan under this budget is faster
    status: str = "feasible"
    decisions: tuple[Decision, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """The memory of one step. ``peak_bytes`` and ``breakdown`` count everything held on the device at the peak."""

    program: Program  # what runs
    plan: Plan | None = None
    unplanned: Program | None = None  # the same step as it runs without memplan; None when nothing is planned
    name: str = ""
    target: str = ""  # device profile
    versions: Mapping[str, str] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()  # what the plan does, what frees most first
    frontier: tuple[FrontierPoint, ...] = ()
    notes: tuple[str, ...] = ()  # what a reader must know, e.g. what was not counted
    measured: tuple[tuple[float, int], ...] = ()  # of a step that ran: (microseconds since it began, bytes held)

    @classmethod
    def of(
        cls,
        program: Program,
        plan: Plan | None = None,
        unplanned: Program | None = None,
        *,
        name: str = "",
        target: str = "",
        decisions: tuple[Decision, ...] = (),
        frontier: tuple[FrontierPoint, ...] = (),
        notes: tuple[str, ...] = (),
        measured: tuple[tuple[float, int], ...] = (),
        threads: int | None = None,
    ) -> Analysis:
        """The analysis of a Program, stamped with the versions of this environment; ``threads``: those that compute the
        step, where it is a CPU that does, and times and workspaces depend on them.

        Source files are named relative to the working directory or to the site-packages they lie in, so that analyses
        made in two checkouts compare, and reports can link to the repository.
        """
        planned = _with_relative_sources(program)
        before = _with_relative_sources(unplanned) if unplanned else None
        decided = _relative_decisions(decisions)
        points = tuple(replace(point, decisions=_relative_decisions(point.decisions)) for point in frontier)
        versions = environment() | ({} if threads is None else {"threads": str(threads)})
        return cls(planned, plan, before, name, target, versions, decided, points, notes, measured)

    # What is held

    @cached_property
    def replay(self) -> Timeline:
        return simulate(self.program)

    @property
    def peak_bytes(self) -> int:
        return self.replay.peak

    @property
    def measured_peak_bytes(self) -> int | None:
        """The most bytes that a step held when it ran; None for one that did not."""
        return max((held for _, held in self.measured), default=None)

    @property
    def peak_step(self) -> int:
        """Index of the Program's step at which the peak is first reached, -1 for a Program without steps."""
        return self.replay.peak_step

    @property
    def time(self) -> float:
        """Microseconds of the whole step on the target, as the cost model predicts."""
        return self.replay.time

    @cached_property
    def unplanned_peak_bytes(self) -> int:
        """The peak without a plan; the peak itself when nothing is planned."""
        return simulate(self.unplanned).peak if self.unplanned else self.peak_bytes

    @cached_property
    def unplanned_time(self) -> float:
        return sum(step.time for step in self.unplanned.steps) if self.unplanned else self.time

    @cached_property
    def at_peak(self) -> tuple[LiveBuffer, ...]:
        """The buffers alive at the peak, largest first."""
        return alive(self.replay, self.peak_step)

    @cached_property
    def breakdown(self) -> dict[str, int]:
        """Bytes by category at the peak; they add up to ``peak_bytes``."""
        held: dict[str, int] = defaultdict(int)
        for buffer in self.at_peak:
            held[buffer.category] += buffer.size
        if self.program.steps:
            held[WORKSPACE] = self.program.steps[self.peak_step].workspace
        return {c: held[c] for c in CATEGORIES if held[c]}

    @cached_property
    def timeline(self) -> tuple[Instant, ...]:
        return timeline(self.program)

    def by_module(self) -> ModuleNode:
        """Bytes alive at the peak as a tree by module path; the root is the whole step."""
        own: dict[str, int] = defaultdict(int)
        for buffer in self.at_peak:
            own[buffer.module] += buffer.size
        return _module_tree(own)

    def fits(self, limit: str | int) -> bool:
        """Whether the step stays within ``limit``: bytes, or text such as "80GiB"."""
        return self.peak_bytes <= parse_bytes(limit)

    # How it is kept and shown

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain types, the derived figures first: what ``--format json`` prints."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "analysis",
            "name": self.name,
            "target": self.target,
            "versions": dict(self.versions),
            "peak_bytes": self.peak_bytes,
            "unplanned_peak_bytes": self.unplanned_peak_bytes,
            "time_us": self.time,
            "unplanned_time_us": self.unplanned_time,
            "breakdown": self.breakdown,
            "at_peak": [asdict(b) for b in self.at_peak],
            "decisions": [asdict(d) for d in self.decisions],
            "frontier": [asdict(p) for p in self.frontier],
            "notes": list(self.notes),
            "measured_peak_bytes": self.measured_peak_bytes,
            "measured": [list(point) for point in self.measured],
            "plan": json.loads(self.plan.to_json()) if self.plan else None,
            "program": self.program.to_dict(),
            "unplanned": self.unplanned.to_dict() if self.unplanned else None,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Analysis:
        return cls.from_dict(read_schema(text, "analysis"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Analysis:
        """The reverse of ``to_dict``; derived figures are computed anew. Raises InputError for a missing part."""
        with reading("analysis"):
            return cls(
                program=Program.from_json(json.dumps(data["program"])),
                plan=Plan.from_json(json.dumps(data["plan"])) if data["plan"] else None,
                unplanned=Program.from_json(json.dumps(data["unplanned"])) if data["unplanned"] else None,
                name=data["name"],
                target=data["target"],
                versions=dict(data["versions"]),
                decisions=tuple(Decision(**d) for d in data["decisions"]),
                frontier=tuple(
                    FrontierPoint(**p | {"decisions": tuple(Decision(**d) for d in p["decisions"])})
                    for p in data["frontier"]
                ),
                notes=tuple(data["notes"]),
                measured=tuple((start, held) for start, held in data.get("measured", ())),
            )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Analysis:
        return cls.from_json(Path(path).read_text())

    def export(self, path: str | Path) -> None:
        """Write a file; the suffix picks the format (see ``memplan.report.SUFFIXES``)."""
        from memplan.report import write

        write(self, Path(path))

    def __rich__(self) -> Group:
        from memplan.report.text import analysis_view

        return analysis_view(self)

    def _repr_html_(self) -> str:
        from memplan.report.html import notebook_html

        return notebook_html(self)


def alive(replay: Timeline, at: int) -> tuple[LiveBuffer, ...]:
    """The buffers held while step ``at`` runs, largest first."""
    storages = (replay.program.storages[s] for s in replay.alive(at))
    return tuple(LiveBuffer(s.name, s.size, str(s.category), s.module, s.source) for s in storages)


def relative_source(source: str, here: str | None = None) -> str:
    """``file:line`` without the folder ``here`` (the working directory) or the path of the site-packages it lies in."""
    _, installed, within = source.rpartition(f"{os.sep}site-packages{os.sep}")
    return within if installed else source.removeprefix(f"{here or Path.cwd()}{os.sep}")


def _with_relative_sources(program: Program) -> Program:
    here = str(Path.cwd())
    return replace(
        program, storages=tuple(replace(s, source=relative_source(s.source, here)) for s in program.storages)
    )


def _relative_decisions(decisions: tuple[Decision, ...]) -> tuple[Decision, ...]:
    here = str(Path.cwd())
    return tuple(replace(d, source=relative_source(d.source, here)) for d in decisions)


def environment() -> dict[str, str]:
    """Versions that can change the figures; reads package metadata, imports nothing."""
    found = {"python": python_version(), "platform": f"{system()} {machine()}"}
    for package in ("memplan", "torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def lifetimes(program: Program) -> tuple[Lifetime, ...]:
    """When each storage is held, in the order in which they begin; a storage made twice has two."""
    since = dict.fromkeys(program.resident, 0)
    found = []
    for at, step in enumerate(program.steps):
        since.update(dict.fromkeys(step.makes, at))
        found += [Lifetime(s, since.pop(s), at + 1) for s in step.frees]
    end = len(program.steps)
    found += [Lifetime(s, start, end) for s, start in since.items()]
    return tuple(sorted(found, key=lambda life: (life.start, life.storage)))


def timeline(program: Program) -> tuple[Instant, ...]:
    """Bytes by category while each step that does work runs (those that only free or look are left out)."""
    held = dict.fromkeys(CATEGORIES, 0)
    for s in program.resident:
        held[program.storages[s].category] += program.storages[s].size
    found = []
    clock = 0.0
    for at, step in enumerate(program.steps):
        for s in step.makes:
            held[program.storages[s].category] += program.storages[s].size
        if step.kind not in (StepKind.FREE, StepKind.VIEW):
            now = held | {WORKSPACE: step.workspace}
            found.append(Instant(at, step.name, step.phase, clock, sum(now.values()), now))
        for s in step.frees:
            held[program.storages[s].category] -= program.storages[s].size
        clock += step.time
    return tuple(found)


def _natural(name: str) -> tuple[int, str]:
    """Numbered layers in the order of their numbers."""
    return (int(name), "") if name.isdigit() else (-1, name)


def _module_tree(own: Mapping[str, int]) -> ModuleNode:
    paths = {""}
    for path in own:
        parts = path.split(".") if path else []
        paths |= {".".join(parts[:k]) for k in range(1, len(parts) + 1)}
    children: dict[str, list[str]] = defaultdict(list)
    for path in paths - {""}:
        children[path.rpartition(".")[0]].append(path)

    def node(path: str) -> ModuleNode:
        below = sorted((node(c) for c in children[path]), key=lambda n: (-n.total, _natural(n.name)))
        mine = own.get(path, 0)
        name = path.rpartition(".")[2]
        return ModuleNode(name, path, mine, mine + sum(c.total for c in below), tuple(below))

    return node("")

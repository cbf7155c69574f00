"""The Program: a flat list of steps over storages. It is what runs, and what the simulator replays."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from memplan.errors import InputError
from memplan.problem import SCHEMA_VERSION, Category, Phase, Tier, read_schema, reading


class StepKind(StrEnum):
    """What a step does. A new decision kind adds its kinds of step here."""

    RUN = "run"  # run a kernel: takes ``makes`` and, while it runs, ``workspace``
    VIEW = "view"  # look at a storage another way, or read a size: no bytes, no time
    FREE = "free"  # give up storages
    HOME = "home"  # make the ticket of a resident storage that lies on ``tier``
    OFFLOAD = "offload"  # start to copy ``reads[0]`` to ``tier``; makes the ticket that stands for it there
    PREFETCH = "prefetch"  # take memory for the copy behind the ticket ``reads[0]`` and start to bring it back
    WAIT = "wait"  # until the last transfer of the ticket ``reads[0]`` has ended


@dataclass(frozen=True)
class Storage:
    """One allocation of the Program: a copy of a buffer, or a resident one."""

    name: str
    size: int  # bytes
    category: Category = Category.ACTIVATION
    module: str = ""
    source: str = ""


@dataclass(frozen=True)
class Step:
    """One step; indices name the Program's storages."""

    kind: StepKind
    name: str
    phase: Phase = Phase.FORWARD
    reads: tuple[int, ...] = ()
    makes: tuple[int, ...] = ()
    frees: tuple[int, ...] = ()
    workspace: int = 0  # bytes
    time: float = 0.0  # microseconds
    recompute: bool = False  # a repeated run of an op that ran before
    tier: str = ""  # of a transfer


@dataclass(frozen=True)
class Program:
    """Steps in execution order. ``resident`` storages are held before the first step and after the last; ``tiers``:
    what transfers to and from each slower memory cost."""

    storages: tuple[Storage, ...]
    resident: tuple[int, ...]
    steps: tuple[Step, ...]
    tiers: tuple[Tier, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What ``to_json`` writes; a tenth of ``dataclasses.asdict``'s time, which a Program of 10,000 steps notices."""
        parts = {f.name: [vars(part) for part in getattr(self, f.name)] for f in fields(self) if f.name != "resident"}
        return {"schema_version": SCHEMA_VERSION, "kind": "program", "resident": self.resident, **parts}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Program:
        """Raises InputError for a file that is no Program."""
        data = read_schema(text, "program")
        with reading("program"):
            program = cls(
                storages=tuple(Storage(**s | {"category": Category(s["category"])}) for s in data["storages"]),
                resident=tuple(data["resident"]),
                steps=tuple(
                    Step(
                        **s
                        | {"kind": StepKind(s["kind"]), "phase": Phase(s["phase"])}
                        | {k: tuple(s[k]) for k in ("reads", "makes", "frees")}
                    )
                    for s in data["steps"]
                ),
                tiers=tuple(Tier(**tier) for tier in data.get("tiers", ())),
            )
            program.check()
        return program

    def check(self) -> None:
        """Raise InputError for bytes that are no count, and for a step that names a storage which does not exist."""
        for size in (*(s.size for s in self.storages), *(abs(step.workspace) for step in self.steps)):
            if type(size) is not int or size < 0:
                raise InputError(f"{size!r} is no number of bytes")
        count = len(self.storages)
        named = [(step.name, s) for step in self.steps for s in (*step.reads, *step.makes, *step.frees)]
        for name, s in (*(("resident", s) for s in self.resident), *named):
            if not 0 <= s < count:
                raise InputError(f"{name} names storage {s}, which does not exist")

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Program:
        return cls.from_json(Path(path).read_text())

    def __str__(self) -> str:
        lines = []
        for at, step in enumerate(self.steps):
            made = " ".join(f"%{s}:{self.storages[s].size}" for s in step.makes)
            read = " ".join(f"%{s}" for s in (*step.reads, *step.frees))
            again = " again" if step.recompute else ""
            lines.append(f"{at:>5} {step.phase[:1]} {step.kind:<8} {step.name}({read}) -> {made or '-'}{again}")
        return "\n".join(lines)

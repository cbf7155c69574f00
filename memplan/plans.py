"""A plan: what runs when, what is held where. Pure data; its meaning is fixed by the Problem it was made for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from memplan.outcome import Status
from memplan.problem import SCHEMA_VERSION, read_schema, reading


@dataclass(frozen=True)
class Offload:
    """One stay of a buffer's copy away from the device, between two positions of the sequence (rules: problem.py)."""

    buffer: int
    made_at: int  # position of the run that made the copy; -1 for a resident buffer
    out_from: int  # the copy-out starts before this position runs
    out_until: int  # device bytes are free from this position on
    in_from: int  # the copy-in starts before this position runs; device bytes are taken from here on
    in_until: int  # a reader at this position or later may read
    tier: str  # name of one of the problem's tiers


@dataclass(frozen=True)
class Plan:
    """The decisions for one Problem.

    ``sequence``: op indices in execution order; an index that repeats is a recomputation.
    ``peak``: bytes, resident ones included. ``spared``: how many more the sequence would hold if its Program made every
    buffer: regions do not make their inner ones, and results are written over operands that die. ``time``/``bound``: the problem's time unit; no plan under this budget can
    be faster than ``bound`` in the scope that ``bound_scope`` states ("order fixed" or "any order").
    """

    sequence: tuple[int, ...]
    budget: int | None
    peak: int
    time: float
    bound: float
    peak_bound: int = 0  # bytes; no plan of this problem has a lower peak
    status: Status = Status.FEASIBLE
    bound_scope: str = "order fixed"
    offloads: tuple[Offload, ...] = ()
    solver: str = ""
    unplanned_peak: int = 0
    unplanned_time: float = 0.0
    spared: int = 0

    @property
    def recomputed(self) -> int:
        """How many runs are recomputations."""
        return len(self.sequence) - len(set(self.sequence))

    @property
    def gap(self) -> float:
        """(time − bound) / bound: the slowdown that a perfect solver could still remove, at most."""
        return max(0.0, (self.time - self.bound) / self.bound) if self.bound > 0 else 0.0

    def to_json(self) -> str:
        return json.dumps({"schema_version": SCHEMA_VERSION, "kind": "plan", **asdict(self), "gap": self.gap}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        data = read_schema(text, "plan")
        data.pop("gap", None)
        with reading("plan"):
            data["sequence"] = tuple(data["sequence"])
            data["status"] = Status(data["status"])
            data["offloads"] = tuple(Offload(**o) for o in data["offloads"])
            return cls(**data)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        return cls.from_json(Path(path).read_text())

"""The planning problem: ops, the storages they read and write, and what moving bytes costs. Pure data, no torch.

The rules that every solver, the simulator and the validator share:

* A *sequence* is a list of op indices in execution order; an op that stands there twice is recomputed.
* An op's operands must be held when it runs. A run of an op makes a new *copy* of every buffer it writes; a reader
  reads the newest copy made before it. A copy is live from the run that makes it to the last run that reads it (itself
  included). Outputs stay live to the end: of a forward output the copy in force when backward begins (the caller holds
  it from then on), of any other output the newest copy.
* *Resident* buffers, written by no op (parameters, inputs), are live throughout; one with a ``home`` is not.
* Load at a position = resident bytes + live copies + the running op's workspace; peak = the largest load, that after
  the last run included.
* Every forward output exists before the first run of a backward or optimizer op.
* An op marked ``once`` runs exactly once; one of the forward phase runs before the first backward op.
* ``after``: the first run of an op comes after the first run of every op named there (order of mutations and of draws).
* ``after_all``: an op's first run comes after every run of every op named there (an update of what they read).
* An *offload* (memplan/plans.py) sends a copy to a *tier* and brings it back. Its copy-out starts before position
  ``out_from`` runs; the step waits for its end before position ``out_until``, from which on the copy takes no device
  bytes. Its copy-in takes them again from position ``in_from`` on, starts before that position runs, and the step waits
  for its end before position ``in_until``. No position in ``[out_until, in_until)`` reads the copy, none in
  ``[out_from, in_until)`` changes it, and of it something is read at ``in_until`` or later, or it is held to the end.
* Before a position runs, in this order: its copies out start, its waits for copies out end, its copies in start (into
  bytes that those waits freed), its waits for copies in end.
* A tier's two engines each serve one transfer at a time, in order of the positions they start before; of one position
  first what is waited for first, then in the plan's order. A transfer takes ``latency + bytes / rate``; a copy-in
  starts once its copy-out has ended. A tier that already has the contents (an earlier offload of the copy, or its home;
  unchanged since) takes no second copy-out: ``out_from == out_until``. To one that has not, such an offload copies at
  once, the step waiting: so goes home what the last run changed. A plan's time is the end of its last run and of
  the waits after it.
* A forward output is on the device from the begin of backward on, a *given* one (an output whose op is ``once`` and reads
  nothing, as the gradients that a backward starts from) from where it is made, other outputs are at the end, and a
  resident buffer without a home always is: the caller holds them.
* A resident buffer with a ``home`` lies on that tier before the step and after it, and takes device bytes only between
  its copy-in and the next release. Its offloads have ``made_at`` -1; the first is ``out_from = out_until = 0``, and in
  the last, ``in_from = in_until = len(sequence)``: it stays away. Once an op mutated it, its release is a copy-out.
* What lies on a tier fits its capacity: homes throughout, a copy from the start of its copy-out to the last
  ``in_until`` that reads it there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from memplan.errors import InputError

SCHEMA_VERSION = 1


class Category(StrEnum):
    """What a buffer is to the user."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    GRADIENT = "gradient"
    ACTIVATION = "activation"
    TEMPORARY = "temporary"
    OUTPUT = "output"
    OPTIMIZER = "optimizer"


class Phase(StrEnum):
    """The part of the step an op belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class Tier:
    """A slower memory beside the device, with one engine for copies out and one for copies in."""

    name: str  # "host" or "disk"
    capacity: int  # bytes
    write: float  # bytes a time unit, from the device
    read: float  # bytes a time unit, to the device
    latency: float  # time units


@dataclass(frozen=True)
class Buffer:
    """One storage; views share it."""

    name: str
    size: int  # bytes, rounded up to what the device's allocator hands out
    category: Category = Category.ACTIVATION
    module: str = ""  # path of the nn.Module whose op made it
    source: str = ""  # file:line
    home: str = ""  # the tier where a resident buffer lies between steps; empty: the device


@dataclass(frozen=True)
class Op:
    """One kernel that makes or changes storages. View-only ops are not ops: their readers read the storage."""

    name: str
    target: str = ""  # e.g. aten.mm.default
    reads: tuple[int, ...] = ()  # buffers, mutated ones included
    writes: tuple[int, ...] = ()  # buffers it makes; every buffer has at most one writer
    mutates: tuple[int, ...] = ()  # resident or earlier-made buffers it changes in place; such an op is ``once``
    after: tuple[int, ...] = ()  # ops whose first run comes first, beyond what reads imply
    after_all: tuple[int, ...] = ()  # ops all of whose runs come first; such an op is ``once``
    time: float = 0.0  # microseconds on a device; a file's own unit otherwise
    workspace: int = 0  # bytes held only while it runs, beyond operands and results; negative: results over operands
    phase: Phase = Phase.FORWARD
    once: bool = False  # random, effectful, mutating, or reads what is mutated: never recomputed
    module: str = ""
    source: str = ""


@dataclass(frozen=True)
class Problem:
    """A dataflow graph over storages. ``ops`` stand in a valid order (the stored order)."""

    ops: tuple[Op, ...]
    buffers: tuple[Buffer, ...]
    outputs: tuple[int, ...] = ()  # buffers that exist at the end, forward outputs included
    forward_outputs: tuple[int, ...] = ()  # those that exist before the first backward op
    tiers: tuple[Tier, ...] = ()
    note: str = field(default="", compare=False)

    @cached_property
    def writer(self) -> tuple[int, ...]:
        """For each buffer the op that makes it, -1 for resident ones."""
        made = [-1] * len(self.buffers)
        for i, op in enumerate(self.ops):
            for b in op.writes:
                made[b] = i
        return tuple(made)

    @cached_property
    def resident(self) -> tuple[int, ...]:
        """Buffers that no op makes: live throughout."""
        return tuple(b for b, op in enumerate(self.writer) if op < 0)

    @cached_property
    def homed(self) -> tuple[int, ...]:
        """Resident buffers that lie on a tier between steps."""
        return tuple(b for b in self.resident if self.buffers[b].home)

    @cached_property
    def given(self) -> frozenset[int]:
        """Outputs that the caller holds from where they are made."""
        kept = set(self.outputs) - set(self.forward_outputs)
        return frozenset(b for op in self.ops if op.once and not op.reads for b in op.writes if b in kept)

    @cached_property
    def resident_bytes(self) -> int:
        """Bytes that no plan can take off the device: those of resident buffers without a home."""
        return sum(self.buffers[b].size for b in self.resident if not self.buffers[b].home)

    @cached_property
    def operands(self) -> tuple[tuple[int, ...], ...]:
        """For each op the distinct buffers it reads that some op makes (resident ones cost nothing to hold)."""
        return tuple(tuple(b for b in dict.fromkeys(op.reads) if self.writer[b] >= 0) for op in self.ops)

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """For each buffer the ops that read it, in stored order."""
        found: list[list[int]] = [[] for _ in self.buffers]
        for i, op in enumerate(self.ops):
            for b in dict.fromkeys(op.reads):
                found[b].append(i)
        return tuple(tuple(r) for r in found)

    @cached_property
    def total_time(self) -> float:
        """Time of the stored order: every op once."""
        return sum(op.time for op in self.ops)

    def check(self) -> None:
        """Raise InputError unless the stored order is a valid sequence of well-formed ops."""
        made = set(self.resident)
        seen: set[int] = set()
        for i, op in enumerate(self.ops):
            for b in (*op.reads, *op.writes, *op.mutates):
                if not 0 <= b < len(self.buffers):
                    raise InputError(f"op {i} ({op.name}) names buffer {b}, which does not exist")
            for b in op.reads:
                if b not in made:
                    raise InputError(f"op {i} ({op.name}) reads buffer {b} before it is made")
            for b in op.writes:
                if b in made:
                    raise InputError(f"op {i} ({op.name}) makes buffer {b}, which exists already")
                made.add(b)
            for j in (*op.after, *op.after_all):
                if j not in seen:
                    raise InputError(f"op {i} ({op.name}) must come after op {j}, which does not come before it")
            if op.time < 0 or op.workspace < -sum(self.buffers[b].size for b in op.writes):
                raise InputError(f"op {i} ({op.name}) has a negative time, or a workspace below that of its results")
            seen.add(i)
        if not set(self.forward_outputs) <= set(self.outputs):
            raise InputError("a forward output is not among the outputs")
        for b in self.outputs:
            if b not in made:
                raise InputError(f"output buffer {b} is never made")
        for buffer in self.buffers:
            if buffer.size < 0:
                raise InputError(f"buffer {buffer.name} has a negative size")
        self._check_tiers()

    def _check_tiers(self) -> None:
        names = [tier.name for tier in self.tiers]
        if len(set(names)) != len(names):
            raise InputError("two tiers have one name")
        for tier in self.tiers:
            if tier.write <= 0 or tier.read <= 0 or tier.latency < 0 or tier.capacity < 0:
                raise InputError(f"tier {tier.name} has a rate that is not positive, or a negative latency or capacity")
            held = sum(buffer.size for buffer in self.buffers if buffer.home == tier.name)
            if held > tier.capacity:
                raise InputError(f"tier {tier.name} holds {tier.capacity} bytes; those at home there take {held}")
        for b, buffer in enumerate(self.buffers):
            if buffer.home and buffer.home not in names:
                raise InputError(f"buffer {buffer.name} has its home on {buffer.home!r}, which is no tier")
            if buffer.home and self.writer[b] >= 0:
                raise InputError(f"buffer {buffer.name} has a home, and an op that makes it")
            if buffer.home and b in self.outputs:
                raise InputError(f"buffer {buffer.name} has a home, and is an output")

    def to_json(self) -> str:
        return json.dumps({"schema_version": SCHEMA_VERSION, "kind": "problem", **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Problem:
        data = read_schema(text, "problem")
        with reading("problem"):
            return cls(
                ops=tuple(Op(**_tuples(op) | {"phase": Phase(op["phase"])}) for op in data["ops"]),
                buffers=tuple(Buffer(**b | {"category": Category(b["category"])}) for b in data["buffers"]),
                outputs=tuple(data["outputs"]),
                forward_outputs=tuple(data["forward_outputs"]),
                tiers=tuple(Tier(**tier) for tier in data.get("tiers", ())),
                note=data.get("note", ""),
            )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Problem:
        return cls.from_json(Path(path).read_text())

    def __str__(self) -> str:
        lines = [f"problem: {len(self.ops)} ops, {len(self.buffers)} buffers, resident {self.resident_bytes} B"]
        for i, op in enumerate(self.ops):
            made = ", ".join(f"%{b}:{self.buffers[b].size}" for b in op.writes)
            read = ", ".join(f"%{b}" for b in op.reads)
            flags = " once" if op.once else ""
            lines.append(f"  {i:>4} {op.phase[:1]} {made or '-'} = {op.name}({read}) {op.time:g}us{flags}")
        return "\n".join(lines)


def read_schema(text: str, kind: str) -> dict[str, Any]:
    """Parse a memplan JSON document of the given kind; raise InputError when it is another or from another version."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"line {error.lineno}: not JSON: {error.msg}") from error
    found = data.pop("kind", None) if isinstance(data, dict) else None
    if found != kind:
        raise InputError(f"this is not a memplan {kind} file" + (f", but a file of kind {found!r}" if found else ""))
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise InputError(f"this {kind} file has schema_version {version}; this memplan reads {SCHEMA_VERSION}")
    return data


@contextmanager
def reading(kind: str) -> Iterator[None]:
    """Raise InputError for what a document of that kind lacks or has of another type."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"this {kind} file lacks or misspells a part: {error}") from error


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for k, v in data.items()}

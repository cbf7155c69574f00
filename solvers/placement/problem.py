"""The placement problem, its answer, their CSV form, and an independent check."""

from __future__ import annotations

import csv
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

from memplan.errors import InputError, PlanError
from memplan.outcome import Status, relative_gap

COLUMNS = ("id", "lower", "upper", "size")


@dataclass(frozen=True)
class PlacementProblem:
    """Buffers of fixed size and lifetime that share one arena (device memory, a pinned host pool, a file).

    Two buffers whose half-open lifetimes ``[lower, upper)`` meet must not share a byte. Raises InputError where a
    lifetime ends before it starts, a size is negative, or the columns differ in length.
    """

    lower: tuple[int, ...]
    upper: tuple[int, ...]
    size: tuple[int, ...]  # bytes
    alignment: int = 1  # bytes; every offset is a multiple of it
    ids: tuple[str, ...] | None = None  # names for files and messages; 0, 1, 2, … when absent

    def __post_init__(self) -> None:
        n = len(self.size)
        if len(self.lower) != n or len(self.upper) != n or (self.ids is not None and len(self.ids) != n):
            raise InputError("lower, upper, size and ids must have the same length")
        if self.alignment < 1:
            raise InputError(f"the alignment must be at least 1 byte, not {self.alignment}")
        for i in range(n):
            if self.upper[i] < self.lower[i]:
                raise InputError(f"buffer {self.name(i)} ends at {self.upper[i]}, before it starts at {self.lower[i]}")
            if self.size[i] < 0:
                raise InputError(f"buffer {self.name(i)} has the negative size {self.size[i]}")

    def __len__(self) -> int:
        return len(self.size)

    def name(self, i: int) -> str:
        return str(i) if self.ids is None else self.ids[i]


@dataclass(frozen=True)
class Placement:
    """Offsets in bytes, one a buffer; empty when no placement is known.

    ``height``: the arena's bytes, max of offset + size (0 without offsets). ``bound``: no placement is lower; when the
    status is INFEASIBLE it is above the capacity.
    """

    offsets: tuple[int, ...]
    height: int
    bound: int
    status: Status
    solver: str = ""

    @property
    def gap(self) -> float:
        """(height − bound) / height: how far from optimal the height can be at most."""
        return relative_gap(self.height, self.bound)


def check_placement(problem: PlacementProblem, placement: Placement) -> None:
    """Raise PlanError when the placement breaks a rule or states a wrong height. Shares no code with the solvers.

    Walks through time with the live buffers in a list sorted by offset: a newcomer may touch neither neighbour.
    """
    at = placement.offsets
    if len(at) != len(problem):
        raise PlanError(f"the placement has {len(at)} offsets for {len(problem)} buffers")
    for i, offset in enumerate(at):
        if offset < 0 or offset % problem.alignment:
            raise PlanError(f"buffer {problem.name(i)} stands at {offset}, not a multiple of {problem.alignment}")
    height = max((o + s for o, s in zip(at, problem.size, strict=True)), default=0)
    if height != placement.height:
        raise PlanError(f"the placement states a height of {placement.height} bytes; it is {height}")
    if height < placement.bound:
        raise PlanError(f"the height of {height} bytes is below the stated bound of {placement.bound}")
    taking = [i for i in range(len(at)) if problem.size[i] > 0 and problem.upper[i] > problem.lower[i]]
    events = sorted([(problem.lower[i], 1, i) for i in taking] + [(problem.upper[i], 0, i) for i in taking])
    live: list[tuple[int, int, int]] = []  # (offset, end, buffer), by offset
    for _, starts, i in events:
        span = (at[i], at[i] + problem.size[i], i)
        k = bisect_left(live, span)
        if not starts:
            del live[k]
            continue
        for other in live[max(0, k - 1) : k + 1]:
            if other[0] < span[1] and span[0] < other[1]:
                raise PlanError(f"buffers {problem.name(other[2])} and {problem.name(i)} live at once and overlap")
        live.insert(k, span)


def read_csv(path: str | Path, alignment: int = 1) -> PlacementProblem:
    """Read ``id,lower,upper,size`` (MiniMalloc's form; further columns are ignored). InputError names the line."""
    ids: dict[str, int] = {}
    rows: list[tuple[int, int, int]] = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path}: line 1: no column {missing[0]!r}; wanted: {','.join(COLUMNS)}")
            for row in reader:
                line = reader.line_num
                name = row["id"]
                if name in ids:
                    raise InputError(f"{path}: line {line}: id {name!r} stands already on line {ids[name]}")
                ids[name] = line
                rows.append(_row(path, line, row))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    lower, upper, size = zip(*rows, strict=True) if rows else ((), (), ())
    return PlacementProblem(lower, upper, size, alignment, tuple(ids))


def _row(path: str | Path, line: int, row: dict[str, str | None]) -> tuple[int, int, int]:
    values = []
    for column in COLUMNS[1:]:
        text = row[column]
        try:
            values.append(int(text or ""))
        except ValueError:
            raise InputError(f"{path}: line {line}: {column} is {text!r}, not an integer") from None
    lower, upper, size = values
    if upper < lower:
        raise InputError(f"{path}: line {line}: upper {upper} is before lower {lower}")
    if size < 0:
        raise InputError(f"{path}: line {line}: negative size {size}")
    return lower, upper, size


def write_csv(path: str | Path, problem: PlacementProblem, placement: Placement) -> None:
    """Write ``id,lower,upper,size,offset``, one line a buffer."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, "offset"])
        for i, offset in enumerate(placement.offsets):
            writer.writerow([problem.name(i), problem.lower[i], problem.upper[i], problem.size[i], offset])

"""Files for other tools: torch's memory viewer, Chrome and Perfetto traces, CSV, dot.

The memory-viz snapshot lays the storages out in one segment, first fit, and replays their
allocation and release as the allocator's own trace would. Its format: torch.cuda.memory._snapshot(), read by
pytorch.org/memory_viz and torch.cuda._memory_viz.
"""

from __future__ import annotations

import csv
import json
import pickle
from bisect import insort
from collections.abc import Sequence
from io import StringIO
from itertools import count

from memplan.analysis import CATEGORIES, Analysis, Lifetime, lifetimes, timeline
from memplan.program import Program, Step, StepKind, Storage

_BASE = 1 << 40  # a segment's address: any that no reader takes for null
_SPAN = 1.0  # microseconds drawn for a step that the cost model gives no time, so that it can be seen


def memory_viz(analysis: Analysis) -> bytes:
    """The pickle (protocol 4, plain types) that pytorch.org/memory_viz opens."""
    program = analysis.program
    offsets, total = first_fit(program)
    lives = lifetimes(program)
    device_trace = _trace(program, lives, offsets)
    segment = {
        "device": 0,
        "address": _BASE,
        "total_size": total,
        "allocated_size": 0,
        "active_size": 0,
        "requested_size": 0,
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": _blocks(program, lives, offsets, total),
    }
    held = sum(b["size"] for b in segment["blocks"] if b["state"] == "active_allocated")  # type: ignore[attr-defined]
    segment |= {"allocated_size": held, "active_size": held, "requested_size": held}
    snapshot = {"segments": [segment] if total else [], "device_traces": [device_trace], "allocator_settings": {}}
    return pickle.dumps(snapshot, protocol=4)


def first_fit(program: Program) -> tuple[dict[Lifetime, int], int]:
    """An offset for every stay of a storage, and the height: residents at the bottom, then in order of time each at the
    lowest address that is free. For viewing; plans for running come from ``memplan.solvers.placement``."""
    offsets: dict[Lifetime, int] = {}
    held: list[tuple[int, int, int]] = []  # (offset, end offset, last step), sorted
    floor = 0
    lives = lifetimes(program)
    residents = [life for life in lives if _is_resident(program, life)]
    for life in residents:
        offsets[life] = floor
        floor += program.storages[life.storage].size
    height = floor
    for life in lives:
        if life in offsets:
            continue
        size = program.storages[life.storage].size
        held = [h for h in held if h[2] > life.start]
        at = floor
        for low, high, _ in held:
            if low >= at + size:
                break
            at = max(at, high)
        offsets[life] = at
        height = max(height, at + size)
        if size:
            insort(held, (at, at + size, life.end))
    return offsets, height


def _is_resident(program: Program, life: Lifetime) -> bool:
    return life.start == 0 and life.storage in program.resident


def _trace(program: Program, lives: Sequence[Lifetime], offsets: dict[Lifetime, int]) -> list[dict[str, object]]:
    """Allocations and releases in order. Residents come first; time is the step's start in microseconds."""
    starts = _starts(program.steps)
    events: list[tuple[tuple[int, int], int, dict[str, object]]] = []  # (step and rank in it, tie, event)
    for life in lives:
        storage = program.storages[life.storage]
        if not storage.size:
            continue
        address = _BASE + offsets[life]
        resident = _is_resident(program, life)
        step = None if resident else program.steps[life.start]
        entry = {"addr": address, "size": storage.size, "stream": 0, "frames": frames(storage, step)}
        began = (-1 if resident else life.start, 1)
        events.append((began, len(events), {"action": "alloc", **entry, "time_us": starts[life.start]}))
        if life.end < len(program.steps) or not _held_to_the_end(program, life):
            ended = (life.end - 1, 2)
            for action in ("free_requested", "free_completed"):
                events.append((ended, len(events), {"action": action, **entry, "time_us": starts[life.end]}))
    return [event for _, _, event in sorted(events, key=lambda e: e[:2])]


def _held_to_the_end(program: Program, life: Lifetime) -> bool:
    return life.end == len(program.steps) and life.storage not in (program.steps[-1].frees if program.steps else ())


def _blocks(
    program: Program, lives: Sequence[Lifetime], offsets: dict[Lifetime, int], total: int
) -> list[dict[str, object]]:
    """What is held after the last step, as blocks that tile the segment: [allocated | free] without gap or overlap."""
    kept = sorted(
        (offsets[life], program.storages[life.storage])
        for life in lives
        if _held_to_the_end(program, life) and program.storages[life.storage].size
    )
    blocks: list[dict[str, object]] = []
    at = 0
    for offset, storage in [*kept, (total, Storage("", 0))]:
        if offset > at:
            blocks.append(_block(at, offset - at, "inactive", []))
        if storage.size:
            blocks.append(_block(offset, storage.size, "active_allocated", frames(storage, None)))
        at = offset + storage.size
    return blocks


def _block(offset: int, size: int, state: str, stack: list[dict[str, object]]) -> dict[str, object]:
    return {"address": _BASE + offset, "size": size, "requested_size": size, "state": state, "frames": stack}


def frames(storage: Storage, step: Step | None) -> list[dict[str, object]]:
    """The storage's origin as a stack, innermost first: source line, then module, category and op as named frames."""
    file, _, line = storage.source.rpartition(":")
    where = {"name": storage.name, "filename": file or "<unknown>", "line": int(line) if line.isdigit() else 0}
    made = f"{storage.category}" + (f" made by {step.name} in the {step.phase}" if step else "")
    return [where, {"name": storage.module or "<step>", "filename": made, "line": 0}]


def chrome_trace(analysis: Analysis) -> str:
    """Trace events: counter tracks of bytes by category, planned and unplanned, and a slice for every kernel; of a step
    that ran, a counter track of what the allocator held."""
    events: list[dict[str, object]] = [_named(1, "memplan: planned" if analysis.unplanned else "memplan")]
    events += _track(analysis.program, 1)
    if analysis.unplanned:
        events += [_named(2, "memplan: without a plan"), *_track(analysis.unplanned, 2)]
    if analysis.measured:
        events.append(_named(3, "memplan: measured"))
        at = {"ph": "C", "name": "bytes held", "cat": "memory", "pid": 3, "tid": 1}
        events += [at | {"ts": start, "args": {"measured": held}} for start, held in analysis.measured]
    other: dict[str, object] = {"peak_bytes": analysis.peak_bytes, "name": analysis.name, "target": analysis.target}
    if analysis.measured:
        other["measured_peak_bytes"] = analysis.measured_peak_bytes
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}) + "\n"


def _named(process: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "ts": 0, "args": {"name": name}}


def _track(program: Program, process: int) -> list[dict[str, object]]:
    starts = _starts(program.steps)
    events: list[dict[str, object]] = []
    for now in timeline(program):
        step = program.steps[now.step]
        at = {"pid": process, "tid": 1, "ts": starts[now.step]}
        held = {c: now.by_category.get(c, 0) for c in CATEGORIES}
        args = {
            "phase": step.phase,
            "bytes held": now.total,
            "makes": [program.storages[s].name for s in step.makes],
            "source": next((program.storages[s].source for s in step.makes), ""),
            "recompute": step.recompute,
        }
        events.append({"ph": "C", "name": "bytes by category", "cat": "memory", **at, "args": held})
        length = starts[now.step + 1] - starts[now.step]
        events.append({"ph": "X", "name": step.name, "cat": str(step.phase), **at, "dur": length, "args": args})
    return events


def _starts(steps: Sequence[Step]) -> list[float]:
    """Microseconds at which each step begins, and the end; a kernel without a time is drawn _SPAN long."""
    clock, starts = 0.0, [0.0]
    for step in steps:
        clock += step.time or (_SPAN if step.kind == StepKind.RUN else 0.0)
        starts.append(clock)
    return starts


def buffers_csv(analysis: Analysis) -> str:
    """One row a stay of a storage: id,lower,upper,size (as the placement instances have them) and where it comes from."""
    text = StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["id", "lower", "upper", "size", "name", "category", "module", "source"])
    for index, life in zip(count(), lifetimes(analysis.program)):
        s = analysis.program.storages[life.storage]
        rows.writerow([index, life.start, life.end, s.size, s.name, s.category, s.module, s.source])
    return text.getvalue()


def graph_dot(analysis: Analysis) -> str:
    """The Program's dataflow: kernels in execution order, an edge a storage that one makes and another reads."""
    program = analysis.program
    lines = ["digraph step {", "  node [shape=box, fontname=Helvetica, fontsize=10];", "  rankdir=TB;"]
    maker: dict[int, int] = {}
    for at, step in enumerate(program.steps):
        if step.kind == StepKind.FREE:
            continue
        made = sum(program.storages[s].size for s in step.makes)
        style = ', style=filled, fillcolor="#fde9c9"' if step.recompute else ""
        lines.append(f"  s{at} [label={json.dumps(f'{step.name}{chr(10)}{step.phase}, {made} B')}{style}];")
        for s in step.reads:
            if s in maker:
                lines.append(f"  s{maker[s]} -> s{at} [label={json.dumps(program.storages[s].name)}];")
        maker.update(dict.fromkeys(step.makes, at))
    return "\n".join([*lines, "}"]) + "\n"

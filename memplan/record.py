"""What a step that ran has held, beside what its plan said: ``memplan.record(step).export("step.trace.json")``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch

from memplan.analysis import Analysis
from memplan.backend import recent_plans
from memplan.decisions import decisions_of
from memplan.errors import InputError
from memplan.options import Options
from memplan.realise import Planned, unplanned


def record(step: Callable[[], object], planned: Planned | None = None) -> Analysis:
    """Run ``step`` under torch's profiler; the analysis of its plan, with what torch's allocator held in ``measured``.

    ``step`` does what one step does, forward and backward, and ran once before: a first step compiles. ``planned``: the
    plan it follows, by default the one this process made last. Raises InputError where there is none.
    """
    plans = recent_plans()
    if planned is None and not plans:
        raise InputError("nothing was planned in this process; run the compiled step once before it is recorded")
    planned = planned or plans[-1]
    program = planned.lowered.program
    resident = sum(program.storages[s].size for s in program.resident)
    before = None if planned.problem.homed else unplanned(planned.built, Options()).program
    return Analysis.of(
        program,
        planned.plan,
        before,
        name="recorded step",
        decisions=decisions_of(planned.problem, planned.plan),
        measured=_held(step, resident, planned.built.capture.device_type),
    )


def _held(step: Callable[[], object], resident: int, device_type: str) -> tuple[tuple[float, int], ...]:
    """(microseconds since the first event, bytes held) after every event of the device's allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    kind = torch.device(device_type).type.upper()
    found = profile.profiler.kineto_results.events()
    events = [e for e in found if e.name() == "[memory]" and e.device_type().name == kind]
    events.sort(key=lambda e: e.start_ns())
    held = accumulate((e.nbytes() for e in events), initial=resident)
    next(held)
    return tuple(((e.start_ns() - events[0].start_ns()) / 1e3, now) for e, now in zip(events, held, strict=True))

"""Replay a Program and account for every byte."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from memplan.errors import PlanError
from memplan.program import Program, StepKind


@dataclass(frozen=True)
class Timeline:
    """What a Program holds at each of its steps.

    ``loads``: bytes held while step i runs, its results and workspace included. ``alive(i)``: the storages held then.
    """

    program: Program
    loads: tuple[int, ...]
    time: float  # microseconds, all steps

    @cached_property
    def peak(self) -> int:
        return max(self.loads, default=sum(self.program.storages[s].size for s in self.program.resident))

    @cached_property
    def peak_step(self) -> int:
        """Index of the first step at which the load is the peak."""
        return self.loads.index(self.peak) if self.loads else -1

    def alive(self, at: int) -> tuple[int, ...]:
        """Storages held while step ``at`` runs, resident ones included, largest first."""
        held = dict.fromkeys(self.program.resident)
        for step in self.program.steps[:at]:
            held.update(dict.fromkeys(step.makes))
            for s in step.frees:
                del held[s]
        held.update(dict.fromkeys(self.program.steps[at].makes) if self.program.steps else {})
        return tuple(sorted(held, key=lambda s: (-self.program.storages[s].size, s)))


def simulate(program: Program) -> Timeline:
    """Raises PlanError where a step reads or frees what is not held, or makes what is."""
    size = [s.size for s in program.storages]
    held = set(program.resident)
    live = sum(size[s] for s in held)
    loads = []
    for at, step in enumerate(program.steps):
        for s in step.reads:
            if s not in held:
                raise PlanError(f"step {at} ({step.name}) reads {program.storages[s].name}, which is not held")
        for s in step.makes:
            if s in held:
                raise PlanError(f"step {at} ({step.name}) makes {program.storages[s].name}, which is held already")
            held.add(s)
            live += size[s]
        loads.append(live + (step.workspace if step.kind == StepKind.RUN else 0))
        for s in step.frees:
            if s not in held:
                raise PlanError(f"step {at} ({step.name}) frees {program.storages[s].name}, which is not held")
            held.remove(s)
            live -= size[s]
    return Timeline(program, tuple(loads), sum(step.time for step in program.steps))

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
    time: float  # microseconds, all steps and what they wait for transfers
    waited: float = 0.0  # microseconds of it in which nothing ran

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
    return Timeline(program, tuple(loads), *_clock(program))


def _clock(program: Program) -> tuple[float, float]:
    """(microseconds to the end, what of it was spent waiting): a tier's two engines serve one transfer at a time each."""
    tiers = {tier.name: tier for tier in program.tiers}
    idle_from: dict[tuple[str, StepKind], float] = {}
    arrived: dict[int, float] = {}  # ticket -> end of its last transfer
    now = waited = 0.0
    for step in program.steps:
        if step.kind == StepKind.RUN:
            now += step.time
        elif step.kind == StepKind.WAIT:
            late = max(0.0, arrived.get(step.reads[0], 0.0) - now)
            now, waited = now + late, waited + late
        elif step.kind in (StepKind.OFFLOAD, StepKind.PREFETCH):
            tier, engine = tiers[step.tier], (step.tier, step.kind)
            out = step.kind == StepKind.OFFLOAD
            ticket, moved = (step.makes[0], step.reads[0]) if out else (step.reads[0], step.makes[0])
            start = max(now, idle_from.get(engine, 0.0), arrived.get(ticket, 0.0))
            rate = tier.write if out else tier.read
            arrived[ticket] = idle_from[engine] = start + tier.latency + program.storages[moved].size / rate
    return now, waited

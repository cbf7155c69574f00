"""How a solve ended, and the limits it was given. One closed enum for every solver and engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum


class Status(StrEnum):
    """A heuristic's answer is FEASIBLE; OPTIMAL needs a bound that meets it."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"  # proven: no answer exists
    TIMED_OUT = "timed_out"  # stopped without any answer
    FAILED = "failed"  # an engine broke


@dataclass(frozen=True)
class Limits:
    """What a solve may spend. ``work`` counts the solver's own unit, so equal limits give equal plans."""

    work: float = 1.0  # multiple of the solver's default effort; the deterministic limit
    seconds: float | None = None  # wall clock, a safety stop; results may differ from run to run when it strikes
    seed: int = 0
    progress: Callable[[str], None] | None = field(default=None, compare=False)

    def deadline(self) -> float:
        """time.monotonic() value at which to stop; infinity without a wall-clock limit."""
        return float("inf") if self.seconds is None else time.monotonic() + self.seconds


def relative_gap(value: float, bound: float) -> float:
    """(value − bound) / value, 0 when both are 0: how far from optimal the value can be at most."""
    return 0.0 if value <= bound else (value - bound) / value

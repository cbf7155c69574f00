"""When nothing of a tier is taken any more."""

from __future__ import annotations

import time

from memplan.runtime.space import Space


def becomes_idle(space: Space, seconds: float = 60.0) -> bool:
    """Whether all bytes come back: those of transfers that were under way when a step failed come with their end."""
    deadline = time.monotonic() + seconds
    while not space.idle and time.monotonic() < deadline:
        time.sleep(0.01)
    return space.idle

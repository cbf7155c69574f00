"""Measured peak memory of a call in this process, by the allocator events that torch's profiler records."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile

from memplan.runtime.arena import release_idle


def peak_above(call: Callable[[], object], warm_ups: int = 1) -> int:
    """Most bytes that ``call`` takes from torch's CPU allocator at any instant, above what is held when it starts.

    It runs ``warm_ups`` times before, so that compiling is not measured, and what it returns is dropped. For a training
    step, ``call`` ends by setting the gradients to None: they count, and the next step starts without them.
    """
    for _ in range(warm_ups):
        call()
    gc.collect()
    release_idle()  # the arena then counts as taken by the call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))

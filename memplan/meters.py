"""What torch's allocators give while something runs: on the CPU to this thread, on CUDA on the current device."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from memplan.torch_compat import record_allocations, recorded_allocations


class HostMeter:
    """Begins at once; RuntimeError while another profiler is at work. What autograd calls has a profiler state of its own:
    a recording ends where it began, in the same hook or outside of all."""

    def __init__(self) -> None:
        record_allocations()

    def stop(self) -> tuple[int, int]:
        """Ends the recording: most bytes taken at any instant, and bytes still held, both beyond what stood before."""
        held = list(accumulate(recorded_allocations(), initial=0))
        return max(held), held[-1]


class DeviceMeter:
    """The same by the allocator's own peak, which it resets."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def stop(self) -> tuple[int, int]:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._before, torch.cuda.memory_allocated() - self._before


Meter = HostMeter | DeviceMeter


def start_meter(device_type: str) -> Meter | None:
    """Begin to count; None where a profiler of the user's is already at work."""
    try:
        return DeviceMeter() if device_type == "cuda" else HostMeter()
    except RuntimeError:
        return None


def allocation_events(function: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What ``function`` returns, and every event of torch's allocators while it ran in this thread, in order.

    An event is signed bytes, positive where memory is taken.
    """
    record_allocations()
    try:
        result = function()
    finally:
        events = recorded_allocations()
    return result, events

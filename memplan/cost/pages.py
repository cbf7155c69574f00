"""Fresh pages: what the first touch of memory costs, which says more about an allocator's state than about an op.

A loop that runs an op again and again may be given fresh pages for its results every time, where a training step finds the
memory that an earlier op freed, or the other way around. Reading and zeroing pages can take longer than the op.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterable
from functools import cache

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

# glibc maps what is larger on its own, fresh each time, in any state (DEFAULT_MMAP_THRESHOLD_MAX).
_ALWAYS_FRESH = 32 << 20
_SAMPLE = 8 << 20


def faults() -> int:
    """Pages that this thread has touched for the first time; 0 throughout where the system does not tell by thread."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt if hasattr(resource, "RUSAGE_THREAD") else 0


def unavoidable(sizes: Iterable[int]) -> int:
    """Pages that allocations of these bytes touch for the first time wherever they are made."""
    return sum(size // mmap.PAGESIZE for size in sizes if size > _ALWAYS_FRESH)


@cache
def seconds_per_fault() -> float:
    """Seconds that a first touch takes here: the least of three mappings' means."""
    means = []
    for _ in range(3):
        with mmap.mmap(-1, _SAMPLE) as fresh:
            before, start = faults(), time.perf_counter()
            fresh[:: mmap.PAGESIZE] = bytes(_SAMPLE // mmap.PAGESIZE)
            means.append((time.perf_counter() - start) / max(1, faults() - before))
    return min(means)

"""Which bytes of a tier are taken: planned offsets, in as many copies of the plan as there are steps under way."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

ALIGNMENT = 4096  # bytes; what direct access asks of offsets, lengths and memory


def aligned(size: int) -> int:
    """``size`` rounded up to ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Span:
    """Bytes taken of a Space, given back when the last reference to the span dies."""

    def __init__(self, space: Space, start: int, size: int) -> None:
        self.start, self.size, self._space = start, size, space

    def __del__(self) -> None:
        self._space.give(self.start)


class Space:
    """``sites``: planned (offset, size) of everything that goes there in one step; ``height``: of the plan, in bytes.

    A step that starts while another one still has its bytes there takes the same offsets one height further on.
    """

    def __init__(self, sites: Sequence[tuple[int, int]], height: int) -> None:
        self.sites, self.height = tuple(sites), height
        self._taken: list[tuple[int, int]] = []  # (start, end), sorted
        self._given: deque[int] = (
            deque()
        )  # a span may die at any instant, in any thread: no lock may be asked for there
        self._lock = threading.Lock()

    @property
    def idle(self) -> bool:
        with self._lock:
            self._drain()
            return not self._taken

    def take(self, site: int, size: int) -> Span:
        """The planned place of ``site`` for ``size`` bytes, or past all others where more is asked than planned."""
        size = aligned(size)
        offset, planned = self.sites[site]
        with self._lock:
            self._drain()
            if size > planned:
                start = aligned(max((end for _, end in self._taken), default=self.height))
            else:
                start = offset
                while not self._free(start, start + size):
                    start += max(self.height, ALIGNMENT)
            span = Span(self, start, size)  # first: an interrupt from the keyboard then loses no bytes
            insort(self._taken, (start, start + size))
        return span

    def give(self, start: int) -> None:
        self._given.append(start)

    def renew_lock(self) -> None:
        """In a forked child: another thread may have held the lock when the process was copied."""
        self._lock = threading.Lock()

    def _free(self, start: int, end: int) -> bool:
        at = bisect_left(self._taken, (start, 0))
        before = self._taken[at - 1] if at else (0, 0)
        return before[1] <= start and (at == len(self._taken) or self._taken[at][0] >= end)

    def _drain(self) -> None:
        while self._given:
            start = self._given.popleft()
            at = bisect_left(self._taken, (start, 0))
            if at < len(self._taken) and self._taken[at][0] == start:
                del self._taken[at]

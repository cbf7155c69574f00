"""The host tier of a GPU: pinned memory at planned offsets, one stream a direction, and events between them.

The compute stream waits for a transfer's event where the plan says so, and is never synchronised with the CPU.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from memplan.errors import TierError
from memplan.runtime.space import Space, Span
from memplan.units import format_bytes

_streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}  # (out, back)


class PinnedPool:
    """Pinned host memory behind a Space: one block for each step under way at once, as high as the plan."""

    def __init__(self, space: Space, limit: int | None) -> None:
        self._space, self._limit = space, limit
        self._blocks: dict[int, torch.Tensor] = {}  # by height, from 0
        self._read_until: dict[int, tuple[int, torch.cuda.Event]] = {}  # start -> (end, the last read's event)
        self._lock = threading.Lock()

    def memory(self, span: Span, size: int) -> torch.Tensor:
        """The span's first ``size`` bytes. Raises TierError where the host has no room for another block."""
        height = max(self._space.height, 1)
        block, offset = divmod(span.start, height)
        with self._lock:
            if offset + size > height:  # larger than planned: a block of its own, which dies with its ticket
                return _pinned(size)
            if block not in self._blocks:
                if self._limit is not None and (len(self._blocks) + 1) * height > self._limit:
                    raise TierError(
                        f"the host tier needs another {format_bytes(height)}, more than swap.host_limit allows; "
                        "raise it, or keep fewer steps under way at once"
                    )
                self._blocks[block] = _pinned(height)
            return self._blocks[block][offset : offset + size]

    def reading(self, span: Span, event: torch.cuda.Event) -> None:
        """Remember the last read of a span: what is next written there comes after it."""
        with self._lock:
            self._read_until[span.start] = (span.start + span.size, event)

    def reads_of(self, span: Span) -> list[torch.cuda.Event]:
        with self._lock:
            end = span.start + span.size
            over = [s for s, (until, _) in self._read_until.items() if s < end and span.start < until]
            return [self._read_until.pop(s)[1] for s in over]


class Copy:
    """A copy between a GPU and the host, under way on its stream; holds what it reads and writes until waited for."""

    seconds = 0.0  # nobody stands still to measure it

    def __init__(self, target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream, after: list[Any]) -> None:
        """``after``: events that come first, beside all that the current stream was given."""
        self._compute = torch.cuda.current_stream(stream.device)  # what the GPU's tensor was allocated on
        ready = torch.cuda.Event()
        ready.record(self._compute)
        with torch.cuda.stream(stream):
            for event in (ready, *after):
                stream.wait_event(event)
            target.copy_(source, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(stream)
        self._held: tuple[torch.Tensor, torch.Tensor] | None = (target, source)

    def wait(self) -> float:
        """Let the compute stream wait; the CPU goes on."""
        torch.cuda.current_stream(self._compute.device).wait_event(self.event)
        self._held = None
        return 0.0

    def __del__(self) -> None:
        # Nobody waited: what is reused later comes after the copy, whichever thread drops the last reference.
        if getattr(self, "_held", None) is not None:
            self._compute.wait_event(self.event)


def copy_out(pool: PinnedPool, memory: torch.Tensor, tensor: torch.Tensor, span: Span) -> Copy:
    """Start to copy a GPU tensor's storage to ``memory``, the span's."""
    out, _ = _streams_of(tensor.device)
    return Copy(memory, _bytes_of(tensor), out, pool.reads_of(span))


def copy_back(pool: PinnedPool, memory: torch.Tensor, tensor: torch.Tensor, span: Span) -> Copy:
    """Start to fill a GPU tensor's storage from ``memory``."""
    _, back = _streams_of(tensor.device)
    started = Copy(_bytes_of(tensor), memory, back, [])
    pool.reading(span, started.event)
    return started


def _pinned(size: int) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise TierError(f"the host has no {format_bytes(size)} to pin: {error}; lower swap.host_limit") from error


def _streams_of(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    if device not in _streams:
        _streams[device] = (torch.cuda.Stream(device), torch.cuda.Stream(device))
    return _streams[device]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage behind a tensor, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())

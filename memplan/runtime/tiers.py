"""What a Program calls to send a tensor to a slower tier and bring it back.

A copy that is away is stood for by its *ticket*, a tensor of one number: it is saved from forward to backward like any
other value, and when its last reference dies (a forward whose backward never runs, an exception) the bytes on the tier
are free again. Many steps may be under way at once; each has its own tickets.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memplan.errors import TierError
from memplan.runtime import disk, homes, host
from memplan.runtime.space import Space, Span

_numbers = itertools.count(1)
_stays: weakref.WeakValueDictionary[int, Stay] = weakref.WeakValueDictionary()
_stores: weakref.WeakValueDictionary[int, Store] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Traffic:
    """What a compiled function moved. ``moving``: seconds its transfers took; ``waited``: seconds it stood still. Of
    copies between GPU and host only the bytes are known: their times pass on the GPU."""

    bytes_out: int = 0
    bytes_in: int = 0
    moving: float = 0.0
    waited: float = 0.0

    @property
    def hidden(self) -> float | None:
        """The share of the transfers' time behind which the step computed; None where no time is known."""
        return max(0.0, 1 - self.waited / self.moving) if self.moving > 0 else None


class Store:
    """One compiled function's place on one tier; ``number`` names it in graphs.

    ``sites``: planned (offset, size) of every stay, in bytes; ``height``: of the plan. ``directory``: of a disk's file;
    ``limit``: most bytes.
    """

    def __init__(
        self,
        sites: Sequence[tuple[int, int]],
        height: int,
        directory: str | None = None,
        limit: int | None = None,
        pinned: bool = False,
    ) -> None:
        self.number = next(_numbers)
        self.space = Space(sites, height)
        self.pool = host.PinnedPool(self.space, limit) if pinned else None
        self._directory, self._limit = directory, limit
        self._file: disk.SpillFile | None = None
        self._lock = threading.Lock()
        self._traffic = Traffic()
        _stores[self.number] = self

    @property
    def traffic(self) -> Traffic:
        return self._traffic

    def file(self, end: int) -> disk.SpillFile:
        """The file, with bytes allocated up to ``end``; a new one after a fault and in a forked child."""
        with self._lock:
            if self._file is None or self._file.owner != os.getpid():
                self._file = disk.SpillFile(self._directory, self._limit)
            try:
                self._file.reserve(end)
            except TierError:
                self._file = None
                raise
            return self._file

    def failed(self, file: disk.File | None) -> None:
        """Leave a file that lost bytes to the tickets that still name it."""
        with self._lock:
            if self._file is file:
                self._file = None

    def count(self, out: int = 0, back: int = 0, moving: float = 0.0, waited: float = 0.0) -> None:
        with self._lock:
            t = self._traffic
            self._traffic = Traffic(t.bytes_out + out, t.bytes_in + back, t.moving + moving, t.waited + waited)

    def renew_locks(self) -> None:
        self._lock = threading.Lock()
        self.space.renew_lock()


class Stay(bytearray):
    """The memory of a ticket, which therefore lives exactly as long as the last tensor on it."""

    store: Store
    file: disk.File | None  # None: the contents are in ``source``
    start: int  # bytes into the file
    lead: int  # bytes that are not in their order there, as ``disk.lead_of`` says
    span: Span | None  # None: a home, whose bytes are not the store's
    source: torch.Tensor | None  # pinned memory of the host tier, or a tensor that should have its home on a disk
    size: int  # bytes
    shape: tuple[torch.dtype, torch.device, int, tuple[int, ...], tuple[int, ...]]
    transfer: disk.Transfer | host.Copy | None

    def ticket(self) -> torch.Tensor:
        return torch.frombuffer(self, dtype=torch.int64)

    def settle(self) -> None:
        """Wait for the last transfer. Raises TierError when it failed."""
        if self.transfer is None:
            return
        transfer, self.transfer = self.transfer, None
        try:
            waited = transfer.wait()
        except TierError:
            if self.span is not None:
                self.store.failed(self.file)
            raise
        self.store.count(moving=transfer.seconds, waited=waited)


def offload(tensor: torch.Tensor, store: int, site: int) -> torch.Tensor:
    """Start to copy a tensor's whole storage out; returns the ticket. The storage stays until ``written``."""
    stay = _new_stay(tensor, _stores[store])
    stay.span = stay.store.space.take(site, stay.size)
    stay.start = stay.span.start
    stay.store.count(out=stay.size)
    if stay.store.pool is not None:
        stay.source = stay.store.pool.memory(stay.span, stay.size)
        stay.transfer = host.copy_out(stay.store.pool, stay.source, tensor, stay.span)
        return stay.ticket()
    stay.file = stay.store.file(stay.start + stay.span.size)
    stay.lead = disk.lead_of(stay.file, tensor)
    stay.transfer = disk.write(stay.file, stay.start, tensor, stay.span, weakref.ref(stay), stay.lead)
    return stay.ticket()


def home(tensor: torch.Tensor, store: int) -> torch.Tensor:
    """The ticket of a tensor that lies on the disk already; of one that does not, its memory stands in for the disk."""
    stay = _new_stay(tensor, _stores[store])
    at = homes.home_of(tensor)
    if at is None:
        stay.source = tensor
    else:
        stay.file, stay.start = at
    return stay.ticket()


def restore(tensor: torch.Tensor, ticket: torch.Tensor) -> torch.Tensor:
    """Start to copy a changed tensor back to the home that ``ticket`` stands for; returns the ticket of what is there
    from then on. The storage stays until ``written``."""
    there = _stay(ticket)
    there.settle()
    stay = _new_stay(tensor, there.store)
    stay.file, stay.start, stay.source = there.file, there.start, there.source
    if stay.file is None:
        assert stay.source is not None
        stay.source.untyped_storage().copy_(tensor.untyped_storage())
    else:
        stay.transfer = disk.write(stay.file, stay.start, tensor, None, weakref.ref(stay))
        stay.store.count(out=stay.size)
    return stay.ticket()


def written(ticket: torch.Tensor, tensor: torch.Tensor) -> None:
    """Wait for the copy-out of ``tensor``, which may then be freed."""
    _stay(ticket).settle()


def prefetch(ticket: torch.Tensor) -> torch.Tensor:
    """Take memory for the copy and start to bring it back; it may be read after ``wait``."""
    stay = _stay(ticket)
    stay.settle()
    dtype, device, offset, shape, stride = stay.shape
    memory = torch.empty(stay.size, dtype=torch.uint8, device=device).untyped_storage()
    tensor = torch.empty(0, dtype=dtype, device=device).set_(memory, offset, shape, stride)
    if stay.store.pool is not None and stay.span is not None:
        assert stay.source is not None
        stay.transfer = host.copy_back(stay.store.pool, stay.source, tensor, stay.span)
        stay.store.count(back=stay.size)
    elif stay.file is None:
        assert stay.source is not None
        memory.copy_(stay.source.untyped_storage())
    else:
        stay.transfer = disk.read(stay.file, stay.start, tensor, stay.span, weakref.ref(stay), stay.lead)
        stay.store.count(back=stay.size)
    return tensor


def wait(ticket: torch.Tensor, tensor: torch.Tensor) -> None:
    """Wait until ``tensor`` holds what was sent away."""
    _stay(ticket).settle()


def _new_stay(tensor: torch.Tensor, store: Store) -> Stay:
    number = next(_numbers)
    stay = Stay(number.to_bytes(8, "little"))
    stay.store, stay.size = store, tensor.untyped_storage().nbytes()
    stay.shape = (tensor.dtype, tensor.device, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())
    stay.file = stay.span = stay.source = stay.transfer = None
    stay.start = stay.lead = 0
    _stays[number] = stay
    return stay


def _stay(ticket: torch.Tensor) -> Stay:
    stay = _stays.get(int(ticket.item()))
    if stay is None:
        raise TierError(
            "a value saved for the backward is no longer on its tier: saved tensors may not be copied "
            "(torch.autograd.graph hooks such as save_on_cpu); drop the hooks or set swap.enabled=False"
        )
    if stay.span is not None and isinstance(stay.file, disk.SpillFile):
        stay.file.check_owner()
    return stay


def _renew_locks() -> None:
    for store in list(_stores.values()):
        store.renew_locks()


os.register_at_fork(after_in_child=_renew_locks)

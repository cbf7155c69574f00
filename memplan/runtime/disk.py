"""The disk tier: an unnamed file per compiled function, and one thread a direction that moves bytes to it and back.

Transfers pass the page cache by where the file system allows; elsewhere what was moved is dropped from it, so that the
bytes a plan sends away do leave the memory. Used on every device (SSDTrain does the same for GPUs, through GPUDirect).

Direct access asks for page-aligned memory, which torch's is not: a storage's whole pages go to the disk from where they
are, its ``lead`` bytes before the first and those behind the last follow them in one block. Where the memory that they
return to lies as it did, they arrive without a copy, too.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import queue
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memplan.errors import TierError
from memplan.runtime.space import ALIGNMENT, aligned
from memplan.units import format_bytes

log = logging.getLogger("memplan")

# Bytes of a direct transfer's staging buffer, one a direction and process. On an ext4 disk at 3 GB/s, pieces of 1 MiB
# reached 2.9 GB/s out and 1.5 GB/s in, 4 MiB 3.4 and 1.7, 16 MiB no more.
_STAGING = 4 << 20
# Bytes from which a storage's pages move without that copy, which takes 0.14 s of a core a GB, the access itself 0.04 s.
_UNCOPIED = 256 << 10
# Bytes that the disk fills between two instants at which the process may fork; at 2.2 GB/s they take 7 ms.
_UNFORKED = 16 << 20


class File:
    """An open file, closed with the last reference to it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.direct = _set_direct(descriptor)
        weakref.finalize(self, os.close, descriptor)


class SpillFile(File):
    """A file without a name, mode 0600: it is gone with the last reference to it, or with the process."""

    def __init__(self, directory: str | Path | None, limit: int | None = None) -> None:
        """Raises TierError where no file can be made."""
        self.directory = Path(directory or tempfile.gettempdir())
        self.limit, self.owner, self.size = limit, os.getpid(), 0
        try:
            descriptor = _unnamed(self.directory)
        except OSError as error:
            raise TierError(f"no file can be made in {self.directory}: {error.strerror}; set swap.directory") from error
        super().__init__(descriptor)

    def reserve(self, end: int) -> None:
        """Allocate the file's bytes up to ``end``, so that a full disk is noticed here. Raises TierError."""
        if end <= self.size:
            return
        if self.limit is not None and end > self.limit:
            raise TierError(
                f"the disk tier needs {format_bytes(end)}, more than swap.disk_limit allows "
                f"({format_bytes(self.limit)}); raise it, or keep fewer steps under way at once"
            )
        try:
            os.posix_fallocate(self.descriptor, self.size, end - self.size)
        except OSError as error:
            raise TierError(
                f"no room for {format_bytes(end)} in {self.directory}: {error.strerror}; "
                "free some, set swap.directory or lower swap.disk_limit"
            ) from error
        self.size = end

    def check_owner(self) -> None:
        """Raise TierError in a forked child: its parent goes on to use the same file."""
        if self.owner != os.getpid():
            raise TierError("the forward ran before this process was forked; run forward and backward in one process")


def _unnamed(directory: Path) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except (AttributeError, IsADirectoryError):
        pass
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    descriptor, name = tempfile.mkstemp(prefix="memplan-", dir=directory)  # a file system without unnamed files
    os.unlink(name)
    return descriptor


def _set_direct(descriptor: int) -> bool:
    """Ask for transfers that pass the page cache by; False where the file system has none."""
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False
    return True


class Transfer:
    """Bytes on their way. What they come from or go to is held until they have arrived, or until nobody waits any
    more."""

    def __init__(self, move: Callable[[mmap.mmap], None], wanted: weakref.ref[Any]) -> None:
        """``move``: called with a staging buffer; holds all that the transfer needs."""
        self._move: Callable[[mmap.mmap], None] | None = move
        self._wanted = wanted
        self._done = threading.Event()
        self.error: str | None = None
        self.seconds = 0.0

    def perform(self, staging: mmap.mmap) -> None:
        """In the engine's thread."""
        try:
            if self._wanted() is not None:
                assert self._move is not None
                start = time.perf_counter()
                self._move(staging)
                self.seconds = time.perf_counter() - start
        except (OSError, RuntimeError) as error:  # the latter from a GPU
            self.error = getattr(error, "strerror", None) or str(error)
        finally:
            self._move = None  # before anyone learns that what it held is free
            self._done.set()

    def wait(self) -> float:
        """Seconds waited until the bytes arrived. Raises TierError when they did not."""
        start = time.perf_counter()
        self._done.wait()
        if self.error is not None:
            raise TierError(f"a transfer with the disk tier failed: {self.error}; the next step starts with a new file")
        return time.perf_counter() - start


class Engine:
    """One thread that serves one transfer at a time, in order of start."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def start(self, transfer: Transfer) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=_serve, args=(self._queue,), name=self._name, daemon=True)
                self._thread.start()
        self._queue.put(transfer)


def _serve(transfers: queue.SimpleQueue[Transfer]) -> None:
    staging = mmap.mmap(-1, _STAGING)  # page-aligned
    while True:
        transfers.get().perform(staging)


_engines: dict[str, Engine] = {}
# Held while a disk writes to private memory: of a page that a fork then shares, the parent may lose the bytes (open(2)).
_filling = threading.Lock()


def _renew() -> None:
    """At first, and in a forked child: threads stay in the parent."""
    global _filling
    _filling = threading.Lock()
    _engines.update(out=Engine("memplan-disk-out"), back=Engine("memplan-disk-in"))


_renew()
os.register_at_fork(
    before=lambda: _filling.acquire(), after_in_parent=lambda: _filling.release(), after_in_child=_renew
)


def lead_of(file: File, tensor: torch.Tensor) -> int:
    """Bytes of a tensor's storage before its first whole page, to be written with this ``lead``; 0 where a copy serves."""
    memory = tensor.untyped_storage()
    if not file.direct or tensor.device.type != "cpu" or memory.nbytes() < _UNCOPIED + 2 * ALIGNMENT:
        return 0
    return -memory.data_ptr() % ALIGNMENT


def write(file: File, start: int, tensor: torch.Tensor, keep: Any, wanted: weakref.ref[Any], lead: int = 0) -> Transfer:
    """Start to copy a tensor's storage to the file's bytes from ``start`` on. ``keep``: held until it has ended.

    ``lead``: as ``lead_of`` says; with 0 the file has the storage's bytes in their order.
    """
    memory, size = _memory(tensor), tensor.untyped_storage().nbytes()

    def move(staging: mmap.mmap, _: Any = keep) -> None:
        _write(file, start, memory, size, lead, staging)

    transfer = Transfer(move, wanted)
    _engines["out"].start(transfer)
    return transfer


def read(file: File, start: int, tensor: torch.Tensor, keep: Any, wanted: weakref.ref[Any], lead: int = 0) -> Transfer:
    """Start to fill a tensor's storage from the file's bytes from ``start`` on, written with ``lead``. ``keep``: held
    until it has ended."""
    memory, size = _memory(tensor), tensor.untyped_storage().nbytes()

    def move(staging: mmap.mmap, _: Any = keep) -> None:
        _read(file, start, memory, size, lead, staging)

    transfer = Transfer(move, wanted)
    _engines["back"].start(transfer)
    return transfer


class _HostMemory:
    """A CPU tensor's storage, for copies by an engine."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._address = tensor, tensor.untyped_storage().data_ptr()

    def pages(self, at: int, size: int) -> memoryview | None:
        """``size`` bytes from place ``at`` of the storage, for direct access; None where they begin within a page."""
        if (self._address + at) % ALIGNMENT or size < _UNCOPIED:
            return None
        return memoryview((ctypes.c_ubyte * size).from_address(self._address + at)).cast("B")

    def fetch(self, here: int, at: int, size: int) -> None:
        """Copy ``size`` bytes from place ``at`` of the storage to the address ``here``."""
        ctypes.memmove(here, self._address + at, size)  # gives up the interpreter's lock

    def fill(self, here: int, at: int, size: int) -> None:
        """The way back."""
        ctypes.memmove(self._address + at, here, size)


class _DeviceMemory:
    """A GPU tensor's storage: copied on a stream of its own, after what the compute stream was given before."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self._stream = torch.cuda.Stream(tensor.device)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))

    def fetch(self, here: int, at: int, size: int) -> None:
        with torch.cuda.stream(self._stream):
            self._at(here, size).copy_(self._bytes[at : at + size])
        self._stream.synchronize()

    def fill(self, here: int, at: int, size: int) -> None:
        with torch.cuda.stream(self._stream):
            self._bytes[at : at + size].copy_(self._at(here, size))
        self._stream.synchronize()

    def pages(self, at: int, size: int) -> None:
        """There are none that a disk could reach."""

    @staticmethod
    def _at(address: int, size: int) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=torch.uint8)


_Memory = _HostMemory | _DeviceMemory


def _memory(tensor: torch.Tensor) -> _Memory:
    return _HostMemory(tensor) if tensor.device.type == "cpu" else _DeviceMemory(tensor)


def _write(file: File, start: int, memory: _Memory, size: int, lead: int, staging: mmap.mmap) -> None:
    body = (size - lead) // ALIGNMENT * ALIGNMENT
    pages = memory.pages(lead, body) if file.direct else None
    with memoryview(staging) as view:
        here = _address(view)
        if pages is None:
            assert lead == 0
            body = 0
        else:
            _all(os.pwrite, file.descriptor, pages, start)
        for done in range(body, size, len(view)):  # with a lead one round, for the bytes before and behind the pages
            part = min(len(view), size - done)
            first = min(lead, part)
            memory.fetch(here, 0, first)
            memory.fetch(here + first, done + first, part - first)
            _all(os.pwrite, file.descriptor, view[: aligned(part) if file.direct else part], start + done)
    if not file.direct:
        os.fdatasync(file.descriptor)  # only what is on the disk can leave the page cache
        os.posix_fadvise(file.descriptor, start, size, os.POSIX_FADV_DONTNEED)


def _read(file: File, start: int, memory: _Memory, size: int, lead: int, staging: mmap.mmap) -> None:
    body = (size - lead) // ALIGNMENT * ALIGNMENT
    pages = memory.pages(lead, body) if file.direct and start % ALIGNMENT == 0 else None
    if pages is None and lead == 0:
        body = size
    if pages is None:
        _read_copied(file, start, memory, lead, body, staging)
    else:
        for done in range(0, body, _UNFORKED):
            with _filling:
                _all(_read_into, file.descriptor, pages[done : done + _UNFORKED], start + done)
    if body < size:
        with memoryview(staging) as view:
            here, part = _address(view), size - body
            _all(_read_into, file.descriptor, view[: aligned(part)], start + body, needed=part)
            memory.fill(here, 0, lead)
            memory.fill(here + lead, body + lead, part - lead)
    if not file.direct:
        os.posix_fadvise(file.descriptor, start, size, os.POSIX_FADV_DONTNEED)


def _read_copied(file: File, start: int, memory: _Memory, to: int, size: int, staging: mmap.mmap) -> None:
    """Fill ``size`` bytes of the storage from place ``to`` on."""
    with memoryview(staging) as view:
        here, before, end = _address(view), start % ALIGNMENT, start + size  # a user's file aligns nothing
        for at in range(start - before, end, len(view)):
            part = min(len(view), end - at)
            _all(_read_into, file.descriptor, view[: aligned(part)], at, needed=part)
            skip = max(0, start - at)
            memory.fill(here + skip, to + at + skip - start, part - skip)


def _all(
    call: Callable[[int, memoryview, int], int],
    descriptor: int,
    view: memoryview,
    start: int,
    needed: int | None = None,
) -> None:
    """Repeat a call that may move fewer bytes than asked, until those ``needed`` have moved (None: all). Raises OSError
    where the file ends before."""
    done = 0
    while done < (len(view) if needed is None else needed):
        moved = call(descriptor, view[done:], start + done)
        if moved == 0:
            raise OSError(errno.EIO, "the file ended early: it was truncated")
        done += moved


def _read_into(descriptor: int, view: memoryview, start: int) -> int:
    return os.preadv(descriptor, [view], start)


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view))

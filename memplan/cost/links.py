"""What moving bytes to a slower tier costs here: rate and latency of a disk, and of copies between GPU and host.

A transfer takes ``latency + bytes / rate`` (Hockney's model); both come from a least-squares line through the median
times of three sizes.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from functools import cache as once
from pathlib import Path

from memplan.cost.cache import Cache
from memplan.devices import Link
from memplan.errors import OptionError
from memplan.options import Options
from memplan.problem import Tier

log = logging.getLogger("memplan")

# From where latency rules to where the rate does; small enough to leave a slow disk after a few seconds.
_SIZES = (256 * 1024, 4 * 1024**2, 32 * 1024**2)
# The shortest of so many: the first transfers of a new file took up to ten times the later ones', and other work on the
# machine only ever adds.
_REPETITIONS = 5


def slower_tiers(options: Options, device_type: str, homes: Collection[str] = ()) -> tuple[Tier, ...]:
    """The tiers that ``swap.tiers`` asks for and those where weights lie, as they are here: rates a microsecond, room at
    this instant.

    The host is a tier only of a device that is not the host. Raises OptionError for an unknown tier and for a directory
    in which no file can be made.
    """
    if not options.swap_enabled:
        return ()
    found = []
    for name in dict.fromkeys([*(part.strip() for part in options.swap_tiers.split(",")), *sorted(homes)]):
        if name == "disk":
            found.append(_disk_tier(options))
        elif name == "host" and device_type != "cpu":
            found.append(_tier("host", host_link(), _free_memory(), options))
        elif name == "host" and options.swap_tiers != Options.swap_tiers:
            _say_no_host()
        elif name not in ("", "host"):
            raise OptionError(f"unknown tier {name!r} in swap.tiers; there are 'host' and 'disk'")
    return tuple(found)


def _disk_tier(options: Options) -> Tier:
    directory = options.swap_directory or tempfile.gettempdir()
    try:
        link, free = disk_link(directory, direct=True), shutil.disk_usage(directory).free
    except OSError as error:
        raise OptionError(f"swap.directory {directory}: {error.strerror}") from error
    return _tier("disk", link, free, options)


def _tier(name: str, link: Link, free: int, options: Options) -> Tier:
    capacity = min(free, options.tier_limits.get(name, free))
    return Tier(name, capacity, link.write / 1e6, link.read / 1e6, link.latency)


def _free_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


@once
def _say_no_host() -> None:
    log.warning("swap.tiers names the host, which is no tier of a CPU device: its memory is what the budget bounds")


def disk_link(directory: str | Path, *, direct: bool = False, cache: Cache | None = None) -> Link:
    """The link from memory to the disk under ``directory``, measured once and cached.

    A buffered write counts until the data is on the disk, and a buffered read comes from it, not from the page cache.
    ``direct`` passes the page cache by, into a file that is allocated beforehand, where the file system allows it
    (measured buffered elsewhere).
    Raises OSError when the directory cannot be written or is full.
    """
    place = Path(directory).resolve()
    cache = cache or Cache(f"links of {platform.node()}")
    key = f"disk {os.stat(place).st_dev} {'direct, into new pages' if direct else 'buffered'}"
    return _cached(cache, key, lambda: _measure_disk(place, direct))


def host_link(cache: Cache | None = None) -> Link:
    """The link between the current GPU and pinned host memory, measured once and cached. Needs a GPU."""
    import torch

    name = torch.cuda.get_device_name()
    return _cached(cache or Cache(f"links of {platform.node()}"), f"host {name}", _measure_host)


def _cached(cache: Cache, key: str, measure: Callable[[], Link]) -> Link:
    known = cache.get(key)
    if known is not None and len(known) == 3:
        return Link(*known)
    link = measure()
    cache.put(key, (link.write, link.read, link.latency))
    return link


def _measure_disk(directory: Path, direct: bool) -> Link:
    handle, name = tempfile.mkstemp(prefix="memplan-link-", dir=directory)
    os.close(handle)
    try:
        direct = direct and hasattr(os, "O_DIRECT")
        try:
            file = os.open(name, os.O_RDWR | (os.O_DIRECT if direct else 0))
        except OSError as error:
            if error.errno != errno.EINVAL:  # the answer of a file system without direct access
                raise
            file, direct = os.open(name, os.O_RDWR), False
        try:
            if direct:
                os.posix_fallocate(file, 0, max(_SIZES))
            return _disk_lines(file, direct)
        finally:
            os.close(file)
    finally:
        os.unlink(name)


def _disk_lines(file: int, direct: bool) -> Link:
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, max(_SIZES), flags=private) as memory:  # page-aligned, as direct access asks
        memory.write(os.urandom(1 << 16) * (max(_SIZES) >> 16))  # a compressing disk gains nothing
        with memoryview(memory) as view:

            def write(size: int) -> None:
                done = 0
                while done < size:
                    done += os.pwrite(file, view[done:size], done)
                if not direct:
                    os.fdatasync(file)

            def read(size: int) -> None:
                done = 0
                while done < size:
                    got = os.preadv(file, [view[done:size]], done)
                    if got == 0:
                        raise OSError(errno.EIO, "the file ended early")
                    done += got

            def forget() -> None:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                # A step reads into memory it has just taken, whose pages the system must first provide: 0.4 s a GB here.
                memory.madvise(mmap.MADV_DONTNEED)

            return _link(_line(write), _line(read, before=forget))


def _measure_host() -> Link:
    import torch

    host = torch.empty(max(_SIZES), dtype=torch.uint8, pin_memory=True)
    device = torch.empty(max(_SIZES), dtype=torch.uint8, device="cuda")

    def copy(target: torch.Tensor, source: torch.Tensor) -> Callable[[int], None]:
        def run(size: int) -> None:
            target[:size].copy_(source[:size], non_blocking=True)
            torch.cuda.synchronize()

        return run

    torch.cuda.synchronize()
    return _link(_line(copy(host, device)), _line(copy(device, host)))


def _line(transfer: Callable[[int], None], before: Callable[[], None] = lambda: None) -> tuple[float, float]:
    """(latency in seconds, seconds a byte) of a transfer."""
    least = []
    for size in _SIZES:
        times = []
        for _ in range(_REPETITIONS):
            before()
            start = time.perf_counter()
            transfer(size)
            times.append(time.perf_counter() - start)
        least.append(min(times))
    return fit_line(_SIZES, least)


def fit_line(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of ``times`` over ``sizes``; an intercept below zero is noise and becomes zero.

    Errors count in proportion to the size: the noise of a long transfer would drown the latency of a short one.
    """
    weights = [1 / size**2 for size in sizes]
    total = sum(weights)
    x = sum(w * size for w, size in zip(weights, sizes, strict=True)) / total
    y = sum(w * seconds for w, seconds in zip(weights, times, strict=True)) / total
    spread = sum(w * (size - x) ** 2 for w, size in zip(weights, sizes, strict=True))
    slope = sum(w * (a - x) * (b - y) for w, a, b in zip(weights, sizes, times, strict=True)) / spread
    intercept = y - slope * x
    if intercept < 0 or slope <= 0:
        return 0.0, sum(times) / sum(sizes)
    return intercept, slope


def _link(write: tuple[float, float], read: tuple[float, float]) -> Link:
    return Link(write=1 / write[1], read=1 / read[1], latency=max(write[0], read[0]) * 1e6)

"""The disk tier by itself: bytes come back, faults are errors that leave nothing behind, and the next transfer works."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memplan.errors import TierError
from memplan.runtime import disk, tiers
from memplan.runtime.space import ALIGNMENT, Space, aligned
from memplan.runtime.tiers import Store, offload, prefetch, wait, written
from tests.idle import becomes_idle


def store(directory: Path, count: int = 4, size: int = 1 << 20, limit: int | None = None) -> Store:
    return Store([(k * size, size) for k in range(count)], count * size, str(directory), limit)


def values(seed: int = 0, count: int = 200_001) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def there_and_back(place: Store, site: int = 0, seed: int = 0) -> None:
    source = values(seed)
    ticket = offload(source, place.number, site)
    written(ticket, source)
    back = prefetch(ticket)
    wait(ticket, back)
    assert torch.equal(back, values(seed))


def open_files(directory: Path) -> list[str]:
    """Files under ``directory`` that this process has open, deleted ones included."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError as error:
            assert error.errno == errno.ENOENT  # the listing's own
    return [link for link in links if link.startswith(str(directory))]


@pytest.mark.parametrize("make", [
    lambda: values(),
    lambda: values(count=24).view(2, 3, 4).transpose(0, 2),
    lambda: values()[5:77],
    lambda: torch.tensor(3),
    lambda: torch.zeros(0),
    lambda: torch.arange(70_000) % 3 == 0,
    lambda: torch.randn(40, 50, dtype=torch.complex64),
    lambda: torch.randn(33, 7).bfloat16(),
])  # fmt: skip
def test_every_layout_comes_back(make: Callable[[], torch.Tensor], tmp_path: Path) -> None:
    place = store(tmp_path)
    source = make()
    ticket = offload(source, place.number, 0)
    written(ticket, source)
    back = prefetch(ticket)
    wait(ticket, back)
    assert torch.equal(back, source) and back.stride() == source.stride() and back.dtype == source.dtype
    assert back.untyped_storage().nbytes() == source.untyped_storage().nbytes()
    assert back.data_ptr() != source.data_ptr() or source.numel() == 0


def bytes_at(offset: int, size: int) -> torch.Tensor:
    """Zeros that begin ``offset`` bytes into a page of memory that a fork would copy."""
    memory = mmap.mmap(-1, offset + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8, offset=offset)


@pytest.mark.parametrize("size", [4097, (256 << 10) + 8191, (256 << 10) + 8192, (20 << 20) + 8195])
@pytest.mark.parametrize("source, target", [(0, 0), (64, 64), (64, 0), (0, 64), (4032, 4032), (4095, 1)])
def test_whatever_the_memorys_alignment(source: int, target: int, size: int, tmp_path: Path) -> None:
    file = disk.SpillFile(tmp_path)
    file.reserve(ALIGNMENT + aligned(size))
    given, back = bytes_at(source, size), bytes_at(target, size)
    given.copy_(torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(size)))
    lead = disk.lead_of(file, given)
    assert not file.direct or lead == (-source % ALIGNMENT if size >= (256 << 10) + 8192 else 0)
    disk.write(file, ALIGNMENT, given, None, weakref.ref(given), lead).wait()
    disk.read(file, ALIGNMENT, back, None, weakref.ref(back), lead).wait()
    assert torch.equal(given, back)
    assert os.fstat(file.descriptor).st_size == ALIGNMENT + aligned(size)


def test_a_fork_while_the_disk_fills_memory(tmp_path: Path) -> None:
    file, size = disk.SpillFile(tmp_path), 8 << 20
    file.reserve(size)
    given = torch.arange(size // 8).view(torch.uint8)
    disk.write(file, 0, given, None, weakref.ref(given)).wait()
    for _ in range(4):
        backs = [bytes_at(0, size) for _ in range(3)]
        reads = [disk.read(file, 0, back, None, weakref.ref(back)) for back in backs]
        child = os.fork()
        if child == 0:
            os._exit(0)
        for read in reads:
            read.wait()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert all(torch.equal(back, given) for back in backs)


def test_buffered_where_direct_is_not_allowed(tmp_path: Path) -> None:
    place = store(tmp_path)
    file = place.file(0)
    file.direct = False
    fcntl.fcntl(file.descriptor, fcntl.F_SETFL, fcntl.fcntl(file.descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
    there_and_back(place)


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs a tmpfs")
def test_in_a_tmpfs() -> None:
    there_and_back(store(Path("/dev/shm")))


def test_a_ticket_holds_its_bytes_until_its_last_copy_dies(tmp_path: Path) -> None:
    place = store(tmp_path)
    source = values()
    ticket = offload(source, place.number, 0)
    saved = ticket.detach()
    written(ticket, source)
    del ticket
    assert not place.space.idle
    back = prefetch(saved)
    wait(saved, back)
    assert torch.equal(back, source)
    del saved
    assert becomes_idle(place.space)


def test_steps_under_way_at_once_have_their_own_bytes(tmp_path: Path) -> None:
    place = store(tmp_path)
    sources = [values(seed) for seed in range(6)]
    tickets = [offload(source, place.number, seed % 2) for seed, source in enumerate(sources)]
    for ticket, source in zip(reversed(tickets), reversed(sources), strict=True):
        back = prefetch(ticket)
        wait(ticket, back)
        assert torch.equal(back, source)
    assert place.file(0).size <= 3 * place.space.height
    tickets.clear()
    del ticket
    assert becomes_idle(place.space)


def test_larger_than_planned_goes_past_the_plan(tmp_path: Path) -> None:
    place = store(tmp_path, count=2, size=ALIGNMENT)
    there_and_back(place)
    assert becomes_idle(place.space)


def test_threads(tmp_path: Path) -> None:
    place = store(tmp_path)
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for k in range(20):
                there_and_back(place, site=k % 4, seed=first + k)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test fails with it
            failures.append(error)

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert becomes_idle(place.space)


def test_the_file_has_no_name_and_only_the_owner_reads_it(tmp_path: Path) -> None:
    place = store(tmp_path)
    there_and_back(place)
    assert os.listdir(tmp_path) == []
    assert os.fstat(place.file(0).descriptor).st_mode & 0o777 == 0o600
    assert len(open_files(tmp_path)) == 1
    del place
    gc.collect()
    assert open_files(tmp_path) == []


def test_limit(tmp_path: Path) -> None:
    place = store(tmp_path, limit=2 << 20)
    there_and_back(place, site=1)
    with pytest.raises(TierError, match="swap.disk_limit"):
        there_and_back(place, site=2)
    there_and_back(place, site=0)


def test_disk_full_by_the_kernels_limit(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    place = store(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, hard))
    try:
        with pytest.raises(TierError, match="no room"):
            there_and_back(place, site=3)
        assert becomes_idle(place.space) and open_files(tmp_path) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    there_and_back(place, site=3)
    assert os.listdir(tmp_path) == []


def test_truncated_under_us(tmp_path: Path) -> None:
    place = store(tmp_path)
    source = values()
    ticket = offload(source, place.number, 3)
    written(ticket, source)
    os.ftruncate(place.file(0).descriptor, 4096)
    back = prefetch(ticket)
    with pytest.raises(TierError, match="truncated"):
        wait(ticket, back)
    del ticket, back
    there_and_back(place, site=3)


def test_descriptor_lost(tmp_path: Path) -> None:
    """The file is closed under us: the kernel answers EBADF."""
    place = store(tmp_path)
    source = values()
    file = place.file(1 << 22)
    spare = os.open(os.devnull, os.O_RDONLY)
    os.dup2(spare, file.descriptor)  # reading and writing now fail; closing is still ours
    ticket = offload(source, place.number, 0)
    with pytest.raises(TierError, match="Bad file descriptor"):
        written(ticket, source)
    os.close(spare)
    del ticket
    there_and_back(place)


def test_directory_deleted_or_closed(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    place = store(gone)
    there_and_back(place)
    gone.rmdir()  # the file lives on without it
    there_and_back(place)
    with pytest.raises(TierError, match="swap.directory"):
        there_and_back(store(gone))


def test_memory_is_free_once_written(tmp_path: Path) -> None:
    place = store(tmp_path)
    source = values()
    gone = threading.Event()

    class Watched(torch.Tensor):
        def __del__(self) -> None:
            gone.set()

    watched = source.as_subclass(Watched)
    ticket = offload(watched, place.number, 0)
    written(ticket, watched)
    del watched
    assert gone.is_set()  # the engine's thread holds it no longer


def test_nobody_waits(tmp_path: Path) -> None:
    """A step that dies with transfers under way: none of its bytes are reused before they have ended."""
    place = store(tmp_path)
    for seed in range(5):
        tickets = [offload(values(seed + k), place.number, k) for k in range(4)]
        backs = [prefetch(t) for t in tickets[:2]]
        del tickets, backs
        there_and_back(place, site=seed % 4, seed=50 + seed)
    assert becomes_idle(place.space)


def test_copied_ticket_is_refused(tmp_path: Path) -> None:
    place = store(tmp_path)
    source = values()
    copied = offload(source, place.number, 0).clone()
    with pytest.raises(TierError, match="hooks"):
        prefetch(copied)


def test_fork(tmp_path: Path) -> None:
    place = store(tmp_path)
    source = values()
    ticket = offload(source, place.number, 0)
    written(ticket, source)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            try:
                prefetch(ticket)
            except TierError as error:
                code = 0 if "fork" in str(error) else 2
            there_and_back(place, site=0, seed=9)  # in a file of its own
        except BaseException:  # noqa: BLE001 - a child of a test must not run the rest of the tests
            code = 3
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    back = prefetch(ticket)
    wait(ticket, back)
    assert torch.equal(back, source)


_INTERRUPTED = """
import os, signal, sys, threading, torch
sys.path.insert(0, {root!r})
from memplan.runtime.tiers import Store, offload, written
place = Store([(0, 1 << 28)], 1 << 28, {directory!r})
source = torch.ones(1 << 26)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process begins without it
threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    for _ in range(100):  # not for ever: Python swallows an interrupt that lands in a finaliser
        ticket = offload(source, place.number, 0)
        written(ticket, source)
        del ticket
except KeyboardInterrupt:
    pass
try:
    del ticket
except NameError:
    pass
small = torch.arange(1000.0)
ticket = offload(small, place.number, 0)
written(ticket, small)
print("alive", os.listdir({directory!r}))
"""


def test_keyboard_interrupt_and_exit(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    code = _INTERRUPTED.format(root=root, directory=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "alive []\n", done.stderr
    assert done.returncode == 0
    assert os.listdir(tmp_path) == []


def test_killed_process_leaves_no_file(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        place = store(tmp_path)
        source = values()
        ticket = offload(source, place.number, 0)
        written(ticket, source)
        os.write(writer, b"x")
        signal.pause()
        os._exit(0)
    os.read(reader, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.listdir(tmp_path) == []


def test_two_processes_in_one_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_many, args=(tmp_path, seed)) for seed in (0, 1000)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0]
    assert os.listdir(tmp_path) == []


def _many(directory: Path, seed: int) -> None:
    place = store(directory)
    for k in range(30):
        there_and_back(place, site=k % 4, seed=seed + k)


def test_space_takes_planned_places_first() -> None:
    space = Space([(0, ALIGNMENT), (ALIGNMENT, ALIGNMENT)], 2 * ALIGNMENT)
    first = space.take(0, 10)
    second = space.take(1, 10)
    again = space.take(0, 10)
    assert (first.start, second.start, again.start) == (0, ALIGNMENT, 2 * ALIGNMENT)
    del first
    assert space.take(0, ALIGNMENT).start == 0
    large = space.take(1, 9 * ALIGNMENT)
    assert large.start >= 3 * ALIGNMENT
    del second, again, large
    assert space.idle


def test_engines_are_two_threads(tmp_path: Path) -> None:
    there_and_back(store(tmp_path))
    names = [t.name for t in threading.enumerate() if t.name.startswith("memplan-disk")]
    assert sorted(names) == ["memplan-disk-in", "memplan-disk-out"]
    assert disk._STAGING % ALIGNMENT == 0
    assert tiers.Traffic(moving=2.0, waited=0.5).hidden == 0.75


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pinned", [True, False])
def test_a_gpus_tensors_come_back(pinned: bool, tmp_path: Path) -> None:
    place = Store([(k << 20, 1 << 20) for k in range(4)], 4 << 20, str(tmp_path), pinned=pinned)
    for round_ in range(3):
        sources = [values(10 * round_ + k).cuda() for k in range(4)]
        tickets = [offload(source, place.number, k) for k, source in enumerate(sources)]
        for ticket, source in zip(tickets, sources, strict=True):
            written(ticket, source)
        del source, sources
        backs = [prefetch(ticket) for ticket in tickets]
        for k, (ticket, back) in enumerate(zip(tickets, backs, strict=True)):
            wait(ticket, back)
            assert torch.equal(back.cpu(), values(10 * round_ + k))
        del ticket, tickets
        assert becomes_idle(place.space)

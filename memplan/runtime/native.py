"""Builds and loads the allocator in ``arena.cpp``: once a machine, torch version and source, in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from memplan.directories import cache_directory

log = logging.getLogger("memplan")

T = TypeVar("T")

_SOURCE = Path(__file__).with_name("arena.cpp")
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "install": (None, ()),
    "arena_new": (_POINTER, (_SIZE,)),
    "arena_close": (None, (_POINTER,)),
    "arena_trim": (None, (_POINTER,)),
    "arena_state": (ctypes.c_int, (_POINTER,)),
    "arena_placed": (_SIZE, (_POINTER,)),
    "arena_refused": (_SIZE, (_POINTER,)),
    "arena_of": (_POINTER, (_POINTER,)),
    "script_new": (_POINTER, (_SIZE,)),
    "script_free": (None, (_POINTER,)),
    "script_request": (None, (_POINTER, _SIZE, _SIZE, _SIZE, _SIZE)),
    "begin": (None, (_POINTER, _POINTER)),
    "step": (None, (_SIZE,)),
    "running": (_POINTER, ()),
    "unwind": (None, (_POINTER,)),
    "recorded": (_SIZE, (ctypes.POINTER(_SIZE), _SIZE)),
}


@dataclass(frozen=True)
class Allocation:
    """One allocation of a recorded kernel; ``born`` and ``died`` on the thread's clock of births and deaths."""

    address: int
    size: int  # bytes
    born: int
    died: int


@cache
def library() -> ctypes.PyDLL | None:
    """The loaded allocator, installed as torch's; None, with a line in the log, where it cannot be built."""
    try:
        loaded = ctypes.PyDLL(str(_built()))  # its calls are shorter than giving up the interpreter's lock
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("no arena: torch's allocator stays as it is, because arena.cpp cannot be built (%s)", reason)
        return None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, f"memplan_{name}")
        function.restype, function.argtypes = result, arguments
        setattr(loaded, name, function)
    loaded.install()
    return loaded


def recorded(loaded: ctypes.PyDLL) -> list[Allocation]:
    """The allocations of the kernel that this thread is recording, in order."""
    count = loaded.recorded(None, 0)
    numbers = (_SIZE * (4 * count))()
    loaded.recorded(numbers, count)
    return [Allocation(*numbers[4 * k : 4 * k + 4]) for k in range(count)]


def observed(loaded: ctypes.PyDLL, call: Callable[[], T]) -> tuple[T, list[Allocation]]:
    """What a kernel's call returns, and its allocations."""
    before = loaded.running()
    loaded.begin(None, None)
    try:
        loaded.step(0)
        made = call()
        return made, recorded(loaded)
    finally:
        loaded.unwind(before)


def _built() -> Path:
    torch_root = Path(torch.__file__).parent
    source = _SOURCE.read_bytes()
    digest = hashlib.sha256(source + torch.__version__.encode()).hexdigest()[:16]
    target = cache_directory() / f"arena-{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, "-O2", "-std=c++20", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(_new_abi())}"]
        command += [f"-I{torch_root / 'include'}", f"-L{torch_root / 'lib'}", "-o", str(partial), str(_SOURCE), "-lc10"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        partial.replace(target)  # atomic: two processes may build at once
    return target


def _new_abi() -> bool:
    return torch.compiled_with_cxx11_abi()

"""Peak memory on the CPU by the allocator's own count: a malloc interposer loaded before everything else.

The library is built with the C compiler on first use. A process sees it only when started with
``interposed_environment()``; inside that process ``Meter`` reads and resets the count.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

_SOURCE = Path(__file__).with_name("peak_interposer.c")
KEPT_FROM = 1 << 20  # bytes; smaller blocks are no part of what Meter.tensors counts, as the source has it


def interposer() -> Path:
    """Path of the built library; its name carries the hash of its source, so an edit builds anew."""
    name = f"peak_interposer-{hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]}.so"
    library = user_cache_path("memplan") / name
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(partial), str(_SOURCE), "-ldl"], check=True)
        partial.replace(library)  # atomic: two processes may build at once
    return library


def interposed_environment() -> dict[str, str]:
    """The environment in which a fresh process counts its own allocations."""
    return os.environ | {"LD_PRELOAD": str(interposer())}


@dataclass(frozen=True)
class Peak:
    """Bytes held from malloc: at the start of a measured call, and at most during it."""

    start: int
    peak: int

    @property
    def above(self) -> int:
        return self.peak - self.start


class Meter:
    """Reads the interposer of this process. Raises RuntimeError in a process started without it."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        if not hasattr(library, "peak_interposer_live"):
            raise RuntimeError("this process does not count allocations; start it with meter.interposed_environment()")
        self._live, self._peak = library.peak_interposer_live, library.peak_interposer_peak
        self._tensors = library.peak_interposer_tensors
        self._live.restype = self._peak.restype = self._tensors.restype = ctypes.c_longlong
        self._reset = library.peak_interposer_reset
        self._reset.restype = None

    def live(self) -> int:
        """Bytes held now, garbage collected first."""
        gc.collect()
        return self._live()

    def tensors(self) -> int:
        """Bytes held now in blocks of at least KEPT_FROM from PyTorch's allocator, garbage collected first."""
        gc.collect()
        return self._tensors()

    def measure(self, call: Callable[[], object]) -> Peak:
        """Run ``call`` and drop its result; garbage is collected before, not during."""
        start = self.live()
        self._reset()
        call()
        return Peak(start, self._peak())

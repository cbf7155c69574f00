"""numba's ``njit`` for the hot loops of every solver, compiled once a version of the solvers' source.

numba keeps compiled code beside the source and looks only at the function's own file when it decides whether that is
stale. A constant or a function of another file that has changed since then is missed, and wrong indices into an array
crash the process. So the code lies in a directory named by a hash of all solvers' files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from numba import njit
from numba.core import config

from memplan.directories import cache_directory


def _version() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


F = TypeVar("F", bound=Callable[..., object])
_PLACE = str(cache_directory() / f"solvers-{_version()}")


def compiled(function: F) -> F:
    """``function`` compiled without Python objects and without the interpreter's lock; with ``NUMBA_DISABLE_JIT=1`` the
    function itself. Where a user has set ``NUMBA_CACHE_DIR``, that stands."""
    before = config.CACHE_DIR  # type: ignore[attr-defined]  # read while the decorator runs
    config.CACHE_DIR = before or _PLACE  # type: ignore[attr-defined]
    try:
        return cast(F, njit(cache=True, nogil=True)(function))
    finally:
        config.CACHE_DIR = before  # type: ignore[attr-defined]

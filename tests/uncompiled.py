"""What a piece of code prints with the solvers' kernels compiled, and with the same kernels as plain Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def compiled_and_plain(code: str, folder: Path) -> tuple[str, str]:
    """Standard output of both, each in a process of its own that can import the modules of ``folder``, and ``tests``."""
    paths = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])

    def printed(flag: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"NUMBA_DISABLE_JIT": flag, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    return printed("0"), printed("1")

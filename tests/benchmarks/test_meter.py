import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from meter import Meter, interposed_environment

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = """
import ctypes, sys
sys.path.insert(0, {folder!r})
from meter import Meter
meter = Meter()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.realloc.restype = libc.calloc.restype = libc.aligned_alloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

def step():
    a = libc.malloc(3_000_000)
    b = libc.calloc(1000, 2000)
    libc.free(a)
    b = libc.realloc(b, 4_000_000)
    c = libc.aligned_alloc(64, 640)
    libc.free(c)
    libc.free(b)

before = meter.tensors()
kept = ctypes.c_void_p()
libc.posix_memalign(ctypes.byref(kept), 64, 6_400_000)
print(meter.measure(step).above, meter.tensors() - before)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_counts_every_way_to_allocate():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(folder=str(BENCHMARKS))],
        env=interposed_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    above, kept = map(int, done.stdout.split())
    assert 5_000_000 <= above < 5_050_000  # malloc and calloc together; the rest is smaller
    assert 6_400_000 <= kept < 6_410_000


def test_refuses_to_count_without_the_interposer():
    with pytest.raises(RuntimeError, match="interposed_environment"):
        Meter()

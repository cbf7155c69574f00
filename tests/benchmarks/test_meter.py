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
SMALL_TENSORS = """
import sys
sys.path.insert(0, {folder!r})
import torch
from meter import Meter
from memplan.backend import recent_plans

class Deep(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x).square().mean()

layers = [layer for _ in range(24) for layer in (torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.ReLU())]
model, x = Deep(*layers), torch.randn(64, 64)
compiled = torch.compile(model, backend="memplan", options={{"memory_budget": "70%"}})

def step():
    compiled(x).backward()

for _ in range(3):
    step()
    model.zero_grad()
given = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), x))
print(given + Meter().measure(step).above, recent_plans()[-1].plan.budget)
"""


def counted(program: str) -> list[int]:
    """The numbers that a program prints in a process whose allocations are counted."""
    command = [sys.executable, "-c", program.format(folder=str(BENCHMARKS))]
    done = subprocess.run(command, env=interposed_environment(), capture_output=True, text=True, check=True)
    return list(map(int, done.stdout.split()))


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_budget_of_many_small_tensors_is_kept_by_mallocs_own_count():
    """What stands for a tensor beside its numbers took 1.6 % of such a budget."""
    peak, budget = counted(SMALL_TENSORS)
    assert 0.9 * budget < peak <= budget


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_counts_every_way_to_allocate():
    above, kept = counted(PROGRAM)
    assert 5_000_000 <= above < 5_050_000  # malloc and calloc together; the rest is smaller
    assert 6_400_000 <= kept < 6_410_000


def test_refuses_to_count_without_the_interposer():
    with pytest.raises(RuntimeError, match="interposed_environment"):
        Meter()

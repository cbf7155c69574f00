"""Fresh pages are counted, priced, and left out of what an op is said to cost."""

from __future__ import annotations

import mmap

import pytest
import torch

from memplan.cost import measured, pages
from memplan.cost.pages import faults, seconds_per_fault, unavoidable

MANY = 2048
counted = pytest.mark.skipif(
    not hasattr(pages.resource, "RUSAGE_THREAD"), reason="no count of page faults by thread here"
)


@counted
def test_first_touches_are_counted_once() -> None:
    with mmap.mmap(-1, MANY * mmap.PAGESIZE) as fresh:
        begin = faults()
        fresh[:: mmap.PAGESIZE] = bytes(MANY)
        first = faults() - begin
        fresh[:: mmap.PAGESIZE] = bytes(MANY)
        second = faults() - begin - first
    assert 0 < first <= MANY + 64 and second <= 64  # large pages take fewer; the interpreter may take a few itself


def test_a_fault_takes_between_nanoseconds_and_a_millisecond() -> None:
    assert 1e-9 < seconds_per_fault() < 1e-3
    assert seconds_per_fault() == seconds_per_fault()


def test_only_large_allocations_are_fresh_in_any_state() -> None:
    large = 64 << 20
    assert unavoidable([1 << 20, 32 << 20]) == 0
    assert unavoidable([large, 1 << 20, large]) == 2 * large // mmap.PAGESIZE


@counted
def test_faults_by_chance_are_left_out_of_an_ops_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a fault a second, all the time of an op on fresh memory would be theirs; a tenth is left to the op."""
    monkeypatch.setattr(measured, "seconds_per_fault", lambda: 1.0)

    def run() -> None:
        with mmap.mmap(-1, MANY * mmap.PAGESIZE) as memory:
            tensor = torch.frombuffer(memory, dtype=torch.float32)
            tensor.fill_(1.0)
            del tensor

    by_chance = measured._median_time(run, on_gpu=False, fresh=0)
    in_any_state = measured._median_time(run, on_gpu=False, fresh=2 * MANY)
    assert 0 < by_chance < in_any_state / 3

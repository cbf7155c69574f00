"""Bytes as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("size", "nearest", "up"),
    [
        (0, "0 B", "0 B"),
        (1023, "1023 B", "1023 B"),
        (1536, "1.5 KiB", "1.5 KiB"),
        (72068864, "68.7 MiB", "68.8 MiB"),
        (3 * 2**30 + 1, "3.0 GiB", "3.1 GiB"),
        (5 * 2**40 + 1, "5.00 TiB", "5.01 TiB"),
    ],
)
def test_sizes_are_told_to_the_nearest_or_so_that_they_will_do(size, nearest, up):
    assert (format_bytes(size), format_bytes(size, up=True)) == (nearest, up)


@given(st.integers(0, 2**48))
def test_a_size_told_upwards_is_enough_as_a_budget(size):
    enough = parse_bytes(format_bytes(size, up=True))
    assert size <= enough <= size + max(1, size // 10)

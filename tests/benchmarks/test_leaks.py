"""Nothing grows from step to step; ``benchmarks/leaks.py`` watches ten thousand of them."""

from __future__ import annotations

from leaks import REBUILD, SETTLED, watch


def test_nothing_grows() -> None:
    rounds = watch((SETTLED + 6) * REBUILD)
    for key in ("live_bytes", "file_descriptors", "threads"):
        assert rounds[-1][key] <= rounds[SETTLED][key], (key, rounds)
    assert rounds[-1]["plans"] <= 16

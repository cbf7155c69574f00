"""Links to slower tiers: the line through the timings, and a disk that is really there."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memplan.cost import links
from memplan.cost.cache import Cache


@given(st.floats(0, 1e-1), st.floats(1e-12, 1e-6))
def test_a_line_is_found_again(intercept: float, slope: float) -> None:
    sizes = [1 << 18, 1 << 22, 1 << 25]
    latency, rate = links.fit_line(sizes, [intercept + slope * size for size in sizes])
    assert latency == pytest.approx(intercept, rel=1e-3, abs=slope * 1e3)
    assert rate == pytest.approx(slope, rel=1e-3)


def test_noise_gives_no_negative_latency() -> None:
    latency, rate = links.fit_line([1.0, 2.0], [1.0, 3.0])
    assert latency == 0 and rate == pytest.approx(4 / 3)


@pytest.mark.parametrize("direct", [False, True])
def test_a_disk_is_measured_once_and_left_clean(tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_SIZES", (1 << 16, 1 << 18, 1 << 20))
    cache = Cache("links", tmp_path / "cache")
    disk = tmp_path / "disk"
    disk.mkdir()
    link = links.disk_link(disk, direct=direct, cache=cache)
    assert link.write > 1e5 and link.read > 1e5 and link.latency >= 0
    assert not list(disk.iterdir())
    monkeypatch.setattr(links, "_measure_disk", None)
    assert links.disk_link(disk, direct=direct, cache=Cache("links", tmp_path / "cache")) == link


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        links.disk_link(tmp_path / "nowhere", cache=Cache("links", tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpus_link(tmp_path: Path) -> None:
    link = links.host_link(Cache("links", tmp_path))
    assert 1e9 < link.write < 1e12 and 1e9 < link.read < 1e12

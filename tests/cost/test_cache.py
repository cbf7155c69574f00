"""The measurement cache: kept, shared, and never in the way."""

import sqlite3
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from memplan.cost.cache import Cache
from memplan.directories import cache_directory


def test_what_is_put_is_found_again_in_the_same_environment_only(tmp_path: Path) -> None:
    cache = Cache("here", tmp_path)
    assert cache.get("op") is None
    cache.put("op", (1.5, 64))
    assert cache.get("op") == (1.5, 64)
    assert Cache("here", tmp_path).get("op") == (1.5, 64)
    assert Cache("elsewhere", tmp_path).get("op") is None


def test_the_directory_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    assert cache_directory() == tmp_path / "deep" / "cache"
    Cache("here").put("op", (1,))
    assert Cache("here").get("op") == (1.0,)


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from memplan.cost.cache import Cache\n"
        "cache = Cache('here', Path(sys.argv[1]))\n"
        "for k in range(100): cache.put(f'{sys.argv[2]} {k}', (k, 0))\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    running = [subprocess.Popen([*command, name]) for name in "abcd"]
    assert [process.wait() for process in running] == [0] * 4
    cache = Cache("here", tmp_path)
    assert all(cache.get(f"{name} {k}") == (k, 0) for name in "abcd" for k in range(100))


@pytest.mark.parametrize("spoil", [b"this is no database, and long enough to be read as one " * 40, b"\x00" * 5000])
def test_a_damaged_file_is_begun_anew_with_one_warning(tmp_path: Path, spoil: bytes) -> None:
    path = Cache("here", tmp_path).path
    path.write_bytes(spoil)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = Cache("here", tmp_path)
        cache.put("op", (1, 2))
        cache.put("other", (3, 4))
    assert len(caught) == 1 and "damaged" in str(caught[0].message)
    assert cache.get("op") == (1, 2)
    assert Cache("here", tmp_path).get("other") == (3, 4)


def test_a_row_without_sense_is_damage(tmp_path: Path) -> None:
    first = Cache("here", tmp_path)
    first.put("op", (1, 2))
    first.close()
    with sqlite3.connect(first.path) as connection:
        connection.execute("UPDATE measured SET numbers = 'nonsense'")
    connection.close()
    with pytest.warns(UserWarning, match="damaged"):
        assert Cache("here", tmp_path).get("op") is None


def test_a_place_that_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = Cache("here", tmp_path / "file")
        cache.put("op", (1, 2))
    assert len(caught) == 1 and "cannot be used" in str(caught[0].message)
    assert cache.get("op") == (1, 2)


def test_a_full_disk_costs_one_warning(tmp_path: Path) -> None:
    cache = Cache("here", tmp_path)
    assert cache._connection is not None
    cache._connection.execute("PRAGMA max_page_count = 2")  # SQLite then says what it says of a full disk
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(200):
            cache.put(f"{k} " * 50, (k, 0))
    assert len(caught) == 1 and "full" in str(caught[0].message)
    assert all(cache.get(f"{k} " * 50) == (k, 0) for k in range(200))

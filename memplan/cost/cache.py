"""Measurements kept between runs: one SQLite file in the user's cache directory, or ``MEMPLAN_CACHE_DIR``."""

from __future__ import annotations

import json
import sqlite3
import threading
import warnings
from pathlib import Path

from memplan.directories import cache_directory

# The file's name carries the schema, so that an old memplan and a new one leave each other's file alone.
_FILE = "measurements-2.sqlite3"
_TABLE = """CREATE TABLE IF NOT EXISTS measured (
    environment TEXT, key TEXT, numbers TEXT NOT NULL, PRIMARY KEY (environment, key)) WITHOUT ROWID"""
_BUSY_S = 5.0


class Cache:
    """Tuples of numbers by key, valid in one environment (versions, device, threads).

    Several processes may share the file. One that cannot be read or written, for want of a right, of space or of sense,
    costs one warning; a damaged one is begun anew, and without any this cache lives in memory.
    """

    def __init__(self, environment: str, directory: Path | None = None) -> None:
        self.environment = environment
        self.path = (directory or cache_directory()) / _FILE
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._known = self._open()

    def get(self, key: str) -> tuple[float, ...] | None:
        return self._known.get(key)

    def put(self, key: str, numbers: tuple[float, ...]) -> None:
        """Remember a measurement, now and for later runs."""
        with self._lock:
            self._known[key] = numbers
            if self._connection is None:
                return
            try:
                with self._connection:
                    self._connection.execute(
                        "INSERT OR REPLACE INTO measured VALUES (?, ?, ?)", (self.environment, key, json.dumps(numbers))
                    )
            except sqlite3.Error as error:
                self._give_up(error)

    def close(self) -> None:
        """Let go of the file; what is known stays in memory."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> dict[str, tuple[float, ...]]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self._read()
        except sqlite3.OperationalError as error:  # no right, no space, locked: the file itself may be sound
            return self._give_up(error)
        except (sqlite3.DatabaseError, ValueError) as error:
            return self._start_over(error)
        except OSError as error:
            return self._give_up(error)

    def _read(self) -> dict[str, tuple[float, ...]]:
        self._connection = sqlite3.connect(self.path, timeout=_BUSY_S, check_same_thread=False)
        self._connection.execute("PRAGMA synchronous = OFF")  # a lost measurement is measured again
        self._connection.execute(_TABLE)
        rows = self._connection.execute("SELECT key, numbers FROM measured WHERE environment = ?", (self.environment,))
        return {key: tuple(map(float, json.loads(numbers))) for key, numbers in rows}

    def _start_over(self, error: Exception) -> dict[str, tuple[float, ...]]:
        """Replace a file that is not a database, or no longer one."""
        warnings.warn(f"memplan: the cache {self.path} is damaged ({error}); starting a new one", stacklevel=2)
        self.close()
        try:
            self.path.unlink(missing_ok=True)
            return self._read()
        except (sqlite3.Error, OSError):
            self.close()
            return {}

    def _give_up(self, error: Exception) -> dict[str, tuple[float, ...]]:
        warnings.warn(
            f"memplan: the cache {self.path} cannot be used ({error}); what this process measures is lost at its end",
            stacklevel=2,
        )
        self.close()
        return {}

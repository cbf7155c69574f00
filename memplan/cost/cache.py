"""Measured costs kept between runs: one SQLite file in the user's cache directory, or ``MEMPLAN_CACHE_DIR``."""

from __future__ import annotations

import os
import sqlite3
import threading
import warnings
from pathlib import Path

import platformdirs

from memplan.cost import Cost

# The file's name carries the schema, so that an old memplan and a new one leave each other's file alone.
_FILE = "costs-1.sqlite3"
_TABLE = """CREATE TABLE IF NOT EXISTS costs (
    environment TEXT, signature TEXT, time REAL NOT NULL, workspace INTEGER NOT NULL,
    PRIMARY KEY (environment, signature)) WITHOUT ROWID"""
_BUSY_S = 5.0


def cache_directory() -> Path:
    """Where memplan keeps what it measured."""
    return Path(os.environ.get("MEMPLAN_CACHE_DIR") or platformdirs.user_cache_dir("memplan", appauthor=False))


class CostCache:
    """Costs by signature text, valid in one environment (versions, device, threads).

    Several processes may share the file. One that cannot be read or written, for want of a right, of space or of sense,
    costs one warning; from then on this cache lives in memory.
    """

    def __init__(self, environment: str, directory: Path | None = None) -> None:
        self.environment = environment
        self.path = (directory or cache_directory()) / _FILE
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._known = self._open()

    def get(self, signature: str) -> Cost | None:
        return self._known.get(signature)

    def put(self, signature: str, cost: Cost) -> None:
        """Remember a cost, now and for later runs."""
        with self._lock:
            self._known[signature] = cost
            if self._connection is None:
                return
            try:
                with self._connection:
                    self._connection.execute(
                        "INSERT OR REPLACE INTO costs VALUES (?, ?, ?, ?)",
                        (self.environment, signature, cost.time, cost.workspace),
                    )
            except sqlite3.Error as error:
                self._give_up(error)

    def _open(self) -> dict[str, Cost]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self._read()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # no right, no space, locked: the file itself may be fine
                return self._give_up(error)
            return self._start_over(error)
        except OSError as error:
            return self._give_up(error)

    def _read(self) -> dict[str, Cost]:
        self._connection = sqlite3.connect(self.path, timeout=_BUSY_S, check_same_thread=False)
        self._connection.execute("PRAGMA synchronous = OFF")  # a lost measurement is measured again
        self._connection.execute(_TABLE)
        rows = self._connection.execute(
            "SELECT signature, time, workspace FROM costs WHERE environment = ?", (self.environment,)
        )
        return {signature: Cost(float(time), int(held)) for signature, time, held in rows}

    def _start_over(self, error: sqlite3.DatabaseError) -> dict[str, Cost]:
        """Replace a file that is not a database, or no longer one."""
        warnings.warn(f"memplan: the cost cache {self.path} is damaged ({error}); starting a new one", stacklevel=2)
        self._close()
        try:
            self.path.unlink(missing_ok=True)
            return self._read()
        except (sqlite3.Error, OSError):
            self._close()
            return {}

    def _give_up(self, error: Exception) -> dict[str, Cost]:
        message = f"memplan: the cost cache {self.path} cannot be used ({error}); measuring without it"
        warnings.warn(message, stacklevel=2)
        self._close()
        return {}

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

"""Where memplan keeps files between runs."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_directory() -> Path:
    """``MEMPLAN_CACHE_DIR``, or memplan's place in the user's cache directory; what lies there can be made again."""
    return Path(os.environ.get("MEMPLAN_CACHE_DIR") or platformdirs.user_cache_dir("memplan", appauthor=False))

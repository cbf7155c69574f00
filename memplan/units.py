"""Bytes as people write and read them. Everywhere else bytes are integers."""

from __future__ import annotations

import math
import re

from memplan.errors import OptionError

_FACTOR = {"": 1, "b": 1} | {
    unit: base**power
    for power, letter in enumerate("kmgt", start=1)
    for unit, base in ((f"{letter}b", 1000), (f"{letter}ib", 1024), (letter, 1024))
}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """``6_000_000_000``, ``"6GiB"``, ``"512 MB"`` → bytes. Raises OptionError for anything else."""
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise OptionError(f"a number of bytes cannot be negative: {text}")
        return text
    match = _NUMBER.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2].lower() not in _FACTOR:
        raise OptionError(f"cannot read {text!r} as bytes; write an integer, '24GiB' or '512MB'")
    return int(float(match[1]) * _FACTOR[match[2].lower()])


def parse_budget(budget: str | int, whole: int) -> int:
    """A budget in bytes: an int, ``"24GiB"``, or ``"60%"`` of ``whole`` bytes (the unplanned peak)."""
    if isinstance(budget, str) and budget.strip().endswith("%"):
        number = budget.strip()[:-1].strip()
        if not re.fullmatch(r"\d+(?:\.\d+)?", number) or float(number) <= 0:
            raise OptionError(f"cannot read {budget!r} as a share of the unplanned peak; write for example '60%'")
        return int(whole * float(number) / 100)
    return parse_bytes(budget)


def parse_rate(text: str) -> float:
    """``"2GB/s"``, ``"500 MiB/s"`` → bytes a second. Raises OptionError for anything else, a rate of nothing included."""
    if not text.strip().endswith("/s"):
        raise OptionError(f"cannot read {text!r} as a rate; write for example '2GB/s'")
    rate = parse_bytes(text.strip().removesuffix("/s"))
    if rate == 0:
        raise OptionError(f"a rate must be positive, not {text!r}")
    return float(rate)


def format_bytes(size: int, up: bool = False) -> str:
    """1536 → '1.5 KiB'; for people only. ``up``: never less than ``size``, so that it will do as a budget."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{size} B" if unit == "B" else f"{math.ceil(10 * value) / 10 if up else value:.1f} {unit}"
        value /= 1024
    return f"{math.ceil(100 * value) / 100 if up else value:.2f} TiB"

"""Figures as a person reads them in a Markdown table; an absent figure is an empty cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the columns after the second are right-aligned figures."""
    rule = ["---", "---", *["---:"] * (len(header) - 2)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def percent(share: float | None) -> str:
    """A signed difference: 0.0123 → '+1.2 %'."""
    return "" if share is None else f"{share:+.1%}".replace("%", " %")


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

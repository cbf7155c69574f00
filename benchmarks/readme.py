"""Put the committed tables into the README and the docs, between their markers: ``python benchmarks/readme.py``.

Every figure there comes from ``benchmarks/results``; a table that was never measured leaves its place as it is.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGES = tuple(HERE.parent / page for page in ("README.md", "docs/limits.md", "docs/inductor.md"))


def filled(text: str, results: Path) -> str:
    """``text`` with the part between ``<!-- NAME -->`` and ``<!-- /NAME -->`` replaced by ``results/NAME.md``."""

    def table(match: re.Match[str]) -> str:
        file = results / f"{match[1]}.md"
        return f"<!-- {match[1]} -->\n{file.read_text().strip()}\n<!-- /{match[1]} -->" if file.exists() else match[0]

    return re.sub(r"<!-- (\w+) -->\n.*?\n<!-- /\1 -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(), HERE / "results"))

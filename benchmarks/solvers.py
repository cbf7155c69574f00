"""Every solver on public instances, with the published figures beside ours.

``python benchmarks/solvers.py --data DIR [--only placement,zoo,recompute,offload,order,cold] [--scorers DIR] [--json OUT]
[--figure OUT]`` writes the JSON, its tables as Markdown beside it, and the picture. Solvers that are not run keep the
rows that the JSON holds.

DIR holds ``placement/*.csv``, ``recompute/*.json`` and ``joint/*.json``. The public files come from
  placement/  A … K: https://github.com/google/minimalloc, benchmarks/challenging (Apache-2.0);
              resnet50, pangu_2.6B: https://github.com/cappadokes/idealloc, benchmarks/somas_tensors (MIT)
  recompute/  https://github.com/haoming-codes/moccasin, data (GPL-3.0, data only)
  joint/      forward+backward graphs of storages; ``memplan.graph_files`` states the form
With ``--scorers`` every plan is also scored by that folder's programs, which share no code with memplan, and a plan
that they refuse or that they find to be other than stated ends the run with exit status 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from environment import environment
from tables import markdown

Row = dict[str, Any]
SOLVERS = ("placement", "zoo", "recompute", "offload", "order", "cold")
RESULTS = Path(__file__).parent / "results"
# Of a row, for the machine only: ``trace`` [[seconds, value], …] and ``curve`` {label: [[budget %, cost %], …]} for the
# picture; ``score`` {tool, instance, plan}: the plan as a file's text; ``expect``: what the scorer must find.
HIDDEN = frozenset({"trace", "curve", "score", "expect"})


def run(solver: str, data: Path, scorers: Path | None) -> Iterator[Row]:
    """The rows of benchmarks/solvers_<solver>.py, scored."""
    rows: Callable[[Path], Iterable[Row]] = import_module(f"solvers_{solver}").rows
    for row in rows(data):
        score, expect = row.pop("score", None), row.pop("expect", None)
        if scorers is not None and score is not None:
            row["scored"] = verdict(independent_score(scorers, **score), expect)
        print(f"{solver}: {row['instance']} done", file=sys.stderr)
        yield row


def independent_score(scorers: Path, tool: str, instance: str, plan: str) -> Row:
    """What the scorer prints about a plan; {"valid": False, …} where it refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ("plan.csv" if tool == "score_placement.py" else "plan.json")
        file.write_text(plan)
        command = [sys.executable, str(scorers / tool), instance, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.stdout else {"valid": False, "why": done.stderr.strip()}


def verdict(found: Row, expect: Row | None) -> str:
    """'agrees', or what is wrong."""
    if not found.get("valid", False):
        return f"refused: {found.get('why', '')}"
    wrong = [f"{key} {found.get(key)}, not {value}" for key, value in (expect or {}).items() if found.get(key) != value]
    return "; ".join(wrong) or "agrees"


def section(solver: str, found: Row) -> str:
    """A solver's table with where and when it was measured."""
    where = found["environment"]
    return (
        f"\n## {solver}\n\n{where['date']}, revision {where['revision']}, {where['processor']}, "
        f"{where['cores']} cores\n\n{table(found['rows'])}\n"
    )


def table(rows: list[Row]) -> str:
    """All columns that any row has, in the order of their first appearance, the scorer's verdict last."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in HIDDEN))
    columns.sort(key="scored".__eq__)
    return markdown(columns, ([_cell(row.get(key)) for key in columns] for row in rows))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with placement/, recompute/ and joint/")
    parser.add_argument("--only", default=",".join(SOLVERS), help="comma-separated, of " + ", ".join(SOLVERS))
    parser.add_argument(
        "--scorers", type=Path, help="folder with score_placement.py, score_recompute.py, score_joint.py"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "solvers.json")
    parser.add_argument("--figure", type=Path, default=RESULTS / "solvers.svg")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := [name for name in chosen if name not in SOLVERS]:
        parser.error(f"--only knows {', '.join(SOLVERS)}, not {', '.join(unknown)}")
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    for solver in chosen:
        rows = list(run(solver, options.data, options.scorers))
        results[solver] = {"environment": environment(), "rows": rows}
        print(section(solver, results[solver]))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    options.json.with_suffix(".md").write_text("\n".join(section(solver, found) for solver, found in results.items()))
    from solvers_figure import draw  # needs matplotlib, which the tables do without

    draw(results, options.figure)
    refused = [row for solver in chosen for row in results[solver]["rows"] if row.get("scored", "agrees") != "agrees"]
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())

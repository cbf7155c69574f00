"""PyTorch's own operator database through memplan: each op as a one-op model, forward and backward.

``python benchmarks/op_db.py [--json OUT] [--ops NAME …]`` runs every op of
``torch.testing._internal.common_methods_invocations.op_db`` that ``aot_eager`` gets right (outputs and gradients as in
eager), on up to SAMPLES of its sample inputs, through ``backend="memplan"``:

- ``planned``, on the first sample: under 90 % of the unplanned peak, or the smallest feasible budget where that is refused;
- ``again``, on every sample: by an arbitrary valid plan that runs the op again before its backward.

The file tells the pass rate and the reason of everything else. A run resumes where the last one stopped; each chunk of
ops is a process of its own, so that an op that crashes costs one row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHUNK = 40  # ops a process: a crash repeats at most so many
SECONDS = 600  # for a chunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "op_db.json")
    parser.add_argument("--ops", nargs="*", help="only these; measured again")
    parser.add_argument("--force", action="store_true", help="measure every op again")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.ops)
    else:
        drive(arguments.json, arguments.ops, arguments.force)


def work(names: list[str]) -> None:
    """One JSON line an op on standard output, before it (so that a crash has a name) and after it."""
    from op_models import operators, outcome

    for name, operator in operators().items():
        if name in names:
            print(json.dumps({"op": name, "verdict": "crash", "reason": "the process died"}), flush=True)
            print(json.dumps({"op": name, **outcome(operator)}), flush=True)


def drive(file: Path, wanted: list[str] | None, force: bool) -> None:
    from environment import environment
    from op_models import operators
    from rich.progress import track

    rows: dict[str, dict[str, Any]] = {}
    if file.exists() and not force:
        rows = {row["op"]: row for row in json.loads(file.read_text())["rows"]}
    left = [name for name in operators() if name in wanted] if wanted else [n for n in operators() if n not in rows]
    chunks = [left[k : k + CHUNK] for k in range(0, len(left), CHUNK)]
    for chunk in track(chunks, "ops", disable=not sys.stderr.isatty()):
        while chunk:
            for row in _chunk(chunk):
                rows[row["op"]] = row
            done = {name for name in chunk if name in rows and rows[name].pop("fresh", False)}
            chunk = [name for name in chunk if name not in done]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(
                json.dumps(report(environment(), len(operators()), [rows[n] for n in sorted(rows)]), indent=1) + "\n"
            )
    print(json.dumps(report(environment(), len(operators()), list(rows.values()))["summary"], indent=1))


def _chunk(names: list[str]) -> list[dict[str, Any]]:
    """Rows of the ops that a process got through, in order; the last one is a crash where it did not end well."""
    command = [sys.executable, "-W", "ignore", str(HERE / "op_db.py"), "--worker", "--ops", *names]
    quiet = os.environ | {"TORCH_LOGS": "-all"}  # graph breaks of data-dependent ops, each a page of text
    try:
        text = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=quiet, timeout=SECONDS, check=False
        ).stdout
    except subprocess.TimeoutExpired as late:
        text = (late.stdout or b"").decode()
    rows = {row["op"]: row | {"fresh": True} for row in map(json.loads, text.splitlines())}
    if not rows:
        raise SystemExit(f"the process for {names[0]} and following printed nothing")
    return list(rows.values())


def report(where: dict[str, Any], database: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The file's content: a summary, the ops that do not pass with their reasons, then every row."""
    verdicts = Counter(row["verdict"] for row in rows)
    right = verdicts["pass"] + verdicts["unplanned"]
    compared = right + verdicts["wrong"] + verdicts["error"] + verdicts["crash"]
    summary = {
        "ops_in_the_database": database,
        "ops_run": len(rows),
        "pass_under_aot_eager": compared,
        "pass_under_memplan": right,
        "of_them_unplanned": verdicts["unplanned"],
        "pass_rate": round(right / compared, 4) if compared else None,
        "verdicts": dict(verdicts),
        "reasons": {
            f"{row['op']}": f"{row['verdict']}: {row['reason']}"
            for row in rows
            if row["verdict"] in ("wrong", "error", "crash", "unplanned")
        },
    }
    return {"environment": where, "summary": summary, "rows": rows}


if __name__ == "__main__":
    main()

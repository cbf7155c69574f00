"""Does a smaller budget ever cost more memory, or less time? Twenty budgets from the unplanned peak to the least feasible.

``python benchmarks/sweep.py`` plans each budget anew in a process of its own, measures its peak under the malloc
interposer, and counts where measured peak or predicted time go the wrong way. Results: ``results/sweep.json`` and .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import zoo
from environment import environment
from measure import HERE, Bench, Model, Record, Results
from rich.console import Console
from tables import markdown, megabytes

BUDGETS = 20
SAME_TIME = 1e-9  # relative; sums of the same times in another order differ by that


def run(bench: Bench, models: Sequence[Model]) -> None:
    """Measure every model at every budget."""
    for model in models:
        unplanned = bench.record(model, "memplan")
        refused = bench.record(model, "memplan@1", "memplan@1", 1)
        most, least = unplanned["plan"]["peak"], refused["infeasible"]["smallest"]
        for k in range(BUDGETS):
            budget = most - (most - least) * k // (BUDGETS - 1)
            bench.record(model, f"memplan#{k}", f"memplan@{budget}", budget)


def table(data: Record) -> str:
    """One line a model: how far the sweep went, promises broken, and steps that went the wrong way."""
    header = ("model", "budgets", "from MB", "to MB", "time at the end", "over budget", "peak rose", "time fell")
    return markdown(header, [_line(model, rows) for model, rows in data["rows"].items()]) + "\n"


def _line(model: str, rows: dict[str, Record]) -> tuple[str, ...]:
    swept = [rows[f"memplan#{k}"] for k in range(BUDGETS) if "peak" in rows.get(f"memplan#{k}", {})]
    over = sum(row["peak"] > row["budget"] for row in swept)
    rose = sum(below["peak"] > above["peak"] for above, below in pairwise(swept))
    fell = sum(b["plan"]["time"] < a["plan"]["time"] * (1 - SAME_TIME) for a, b in pairwise(swept))
    last = swept[-1]["plan"]
    return (
        model,
        str(len(swept)),
        megabytes(swept[0]["peak"]),
        megabytes(swept[-1]["peak"]),
        f"{last['time'] / last['unplanned_time']:.3f}",
        str(over),
        str(rose),
        str(fell),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(zoo.FIRST), choices=list(zoo.MODELS), metavar="MODEL")
    parser.add_argument("--size", default="small", choices=["small", "bench"])
    parser.add_argument("--force", action="store_true", help="measure rows again that the results hold already")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "sweep.json")
    given = parser.parse_args()
    results = Results(given.out, environment())
    models = [Model(name, given.size, zoo.MODELS[name].has_dropout) for name in given.models]
    with Bench(results, pairs=0, threads=1, force=given.force) as bench:
        run(bench, models)
    written = table(results.data)
    given.out.with_suffix(".md").write_text(written)
    Console(width=200).print(written, markup=False)


if __name__ == "__main__":
    main()

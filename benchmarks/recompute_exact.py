"""The recomputation search and its bounds against the exact reference on random graphs of 8 to 30 ops.

``python benchmarks/recompute_exact.py [--graphs 200] [--json OUT]``. HiGHS is asked for any plan of Checkmate's program
that is faster than the search's by a millionth; where it proves that there is none, the search's plan is at least as
good as the program's optimum. The search may also change the order of first runs, which the program may not. Graphs
that the file holds already are not solved again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from environment import environment
from graph_families import random_layered

from memplan.outcome import Limits, Status
from memplan.problem import Problem
from memplan.solvers.recompute import minimise_peak, solve_recompute
from memplan.solvers.recompute.exact import solve_exact
from memplan.solvers.recompute.orderless import any_order_bound
from memplan.validate import check_sequence, validate

SECONDS = 60.0  # for HiGHS a graph
FOUND = (Status.OPTIMAL, Status.FEASIBLE)


def compare(problem: Problem, share: float) -> tuple[str, float, bool]:
    """("proven optimal" | "reference has none faster" | "reference faster" | "reference gave up" | "no plan", ratio to
    the best time known, whether the bound for any order is at most that)."""
    peak, _ = check_sequence(problem, tuple(range(len(problem.ops))))
    low = minimise_peak(problem, limits=Limits(work=0.02)).peak
    budget = int(low + share * (peak - low))
    plan = solve_recompute(problem, budget, limits=Limits(work=0.2))
    validate(problem, plan)
    if plan.status not in FOUND:
        return "no plan", 1.0, True
    exact = solve_exact(problem, budget, limits=Limits(seconds=SECONDS), below=plan.time)
    # HiGHS keeps the row on time to a millionth, so a plan it gives may be just as fast.
    faster = exact.status in FOUND and exact.time < plan.time * (1 - 1e-9)
    best = exact.time if faster else plan.time
    valid = any_order_bound(problem, budget, float("inf")) <= best * (1 + 1e-9)
    if faster:
        return "reference faster", plan.time / best, valid
    if exact.status not in (Status.INFEASIBLE, Status.OPTIMAL):
        return "reference gave up", 1.0, valid
    return ("proven optimal" if plan.status == Status.OPTIMAL else "reference has none faster"), 1.0, valid


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many graphs ended how, the worst plan, and how many bounds held."""
    counts = Counter(row["outcome"] for row in rows)
    return {
        "graphs": len(rows),
        **{outcome.replace(" ", "_"): count for outcome, count in sorted(counts.items())},
        "largest_ratio_to_the_reference": max(row["ratio"] for row in rows),
        "bounds_at_most_the_optimum": sum(row["bound_holds"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=200)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "recompute_exact.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if arguments.json.exists():
        rows = json.loads(arguments.json.read_text())["rows"]
    for seed in range(len(rows), arguments.graphs):
        ops, share = 8 + seed % 23, random.Random(seed).choice((0.2, 0.5, 0.8))
        outcome, ratio, holds = compare(random_layered(ops, seed), share)
        row = {"ops": ops, "seed": seed, "share": share, "outcome": outcome, "ratio": ratio, "bound_holds": holds}
        rows.append(row)
        result = {"environment": environment(), **summary(rows), "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        print(
            f"{seed + 1} of {arguments.graphs}: {outcome}, worst so far {result['largest_ratio_to_the_reference']:.4f}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()

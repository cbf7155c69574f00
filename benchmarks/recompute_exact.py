"""The recomputation search and its bounds against the exact reference on random graphs of 8 to 30 ops.

``python benchmarks/recompute_exact.py [--graphs 200] [--json OUT]`` compares where HiGHS proves Checkmate's program
optimal in time. The search may also change the order of first runs, which the reference may not, so it may be faster.
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
from memplan.solvers.recompute import minimise_peak, recompute_bound, solve_recompute
from memplan.solvers.recompute.exact import solve_exact
from memplan.solvers.recompute.presence import presence, tightest
from memplan.validate import check_sequence, validate

SECONDS = 10.0  # for HiGHS a graph
FOUND = (Status.OPTIMAL, Status.FEASIBLE)


def compare(problem: Problem, share: float) -> tuple[str, float, bool]:
    """("faster" | "equal" | "slower" | "no plan" | "reference gave up" | "reference has none", ratio, bound valid)."""
    peak, _ = check_sequence(problem, tuple(range(len(problem.ops))))
    low = minimise_peak(problem, limits=Limits(work=0.02)).peak
    budget = int(low + share * (peak - low))
    exact = solve_exact(problem, budget, limits=Limits(seconds=SECONDS))
    plan = solve_recompute(problem, budget, limits=Limits(work=0.2))
    validate(problem, plan)
    if plan.status not in FOUND:
        return "no plan", 1.0, True
    if exact.status != Status.OPTIMAL:
        return ("reference has none" if exact.status == Status.INFEASIBLE else "reference gave up"), 1.0, True
    bound = max(recompute_bound(problem, budget), presence(problem, budget, tightest(problem, budget, 3)).bound)
    ratio = plan.time / exact.time if exact.time else 1.0
    word = "faster" if ratio < 1 - 1e-9 else "equal" if ratio <= 1 + 1e-9 else "slower"
    return word, ratio, bound <= exact.time * (1 + 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=200)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "recompute_exact.json")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    worst, valid = 1.0, 0
    for seed in range(arguments.graphs):
        word, ratio, bound_valid = compare(
            random_layered(8 + seed % 23, seed), random.Random(seed).choice((0.2, 0.5, 0.8))
        )
        counts[word] += 1
        worst = max(worst, ratio)
        valid += bound_valid
        result: dict[str, Any] = {
            "environment": environment(),
            "graphs": seed + 1,
            **{key.replace(" ", "_"): count for key, count in sorted(counts.items())},
            "largest_ratio_to_the_reference": worst,
            "bounds_at_most_the_optimum": valid,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{seed + 1} of {arguments.graphs}: {dict(counts)}, worst {worst:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()

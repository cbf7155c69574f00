"""What compilation costs and brings: each solver in a fresh process without compiled code, with it, and in plain Python."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The same short solve by each solver, one that enters all of its compiled loops; ``data`` is the folder of instances.
SOLVES = {
    "placement": """
from memplan.solvers.placement import read_csv, solve_placement
problem = read_csv(data / "placement" / "A.1048576.csv")
solve = lambda: solve_placement(problem, capacity=1048576, limits=Limits(work=0.001, seconds=20))
""",
    "recompute": """
from memplan.graph_files import load_graph
from memplan.solvers.recompute import solve_recompute
problem = load_graph(data / "recompute" / "random_layered_n100.json").problem
solve = lambda: solve_recompute(problem, 37055, limits=Limits(work=0.01))
""",
    "order": """
from memplan.solvers.order import solve_order
from graph_families import random_layered
problem = random_layered(500, seed=500)
solve = lambda: solve_order(problem, limits=Limits(work=0.01))
""",
}
PROGRAM = """
import sys, time
from pathlib import Path
from memplan.outcome import Limits
data = Path(sys.argv[1])
{solve}
for _ in range(2):
    started = time.process_time()
    solve()
    print(time.process_time() - started)
"""


def rows(data: Path) -> Iterator[dict[str, Any]]:
    """One row a solver; processor seconds of the same solve, which other load on the machine does not change."""
    for solver, solve in SOLVES.items():
        with tempfile.TemporaryDirectory() as cache:
            compiled_cache = os.environ | {"NUMBA_CACHE_DIR": cache}
            first, again = _seconds(solve, data, compiled_cache)
            from_cache, _ = _seconds(solve, data, compiled_cache)
        _, plain = _seconds(solve, data, os.environ | {"NUMBA_DISABLE_JIT": "1"})
        yield {
            "instance": f"{solver}, a short solve",
            "first ever, s": round(first, 2),
            "first of a process, s": round(from_cache, 2),
            "later, s": round(again, 3),
            "plain Python, s": round(plain, 2),
            "plain / compiled": round(plain / again, 1),
        }


def _seconds(solve: str, data: Path, environment: dict[str, str]) -> list[float]:
    """Processor seconds of the first and the second solve in a process of its own."""
    command = [sys.executable, "-c", PROGRAM.format(solve=solve), str(data)]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]

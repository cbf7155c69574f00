"""How long planning takes as a model grows: GPTs of 8 to 192 equal layers, captured and planned at half their peak.

``python benchmarks/planning.py [--layers 8 16 …] [--out JSON]`` writes the JSON and a table beside it. A row is written
as soon as it is measured; other layers' rows stay. CPU seconds of all threads: *capture* is dynamo, AOTAutograd and the
execution of one step, *cost* pricing (analytic) and building the problem, *solve* the solvers, *rewrite* the graph as the
plan says, lowered and replayed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from environment import environment
from tables import markdown
from zoo.own import GPT

from memplan.backend import compile_with
from memplan.build_problem import build_problem
from memplan.cost import cost_model
from memplan.devices import profile_for
from memplan.options import Options
from memplan.outcome import Limits
from memplan.realise import Planned, realise
from memplan.solving import solve

LAYERS = (8, 16, 32, 48, 96, 192)
BUDGET = 0.5
OUT = Path(__file__).parent / "results" / "planning.json"
T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What the call returns, and its CPU seconds."""
    began = time.process_time()
    return call(), time.process_time() - began


def measure(layers: int) -> dict[str, Any]:
    """The row of a GPT with so many layers, small so that planning is nearly all there is."""
    torch.manual_seed(0)
    model = GPT(vocabulary=256, length=64, width=64, heads=4, layers=layers, dropout=0.1).train()
    ids = torch.randint(256, (2, 2, 64))
    found: list[Planned] = []

    def backend(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        run, planned = compile_with(graph_module, inputs, Options(runtime_estimator="analytic"))
        found.extend([] if planned is None else [planned])
        return run

    _, first = timed(lambda: torch.compile(model, backend=backend)(ids[0], ids[1]))
    (planned,) = found
    profile = profile_for("cpu")
    cost = cost_model("analytic", profile)
    built, pricing = timed(lambda: build_problem(planned.built.capture, cost, profile.granularity))
    problem, options = built.problem, Options(memory_budget=f"{BUDGET:.0%}")
    unbudgeted, ordering = timed(lambda: solve(problem, None, options, Limits()))
    _, plain = timed(lambda: realise(built, unbudgeted, options))
    budget = int(BUDGET * planned.plan.unplanned_peak)
    plan, solving = timed(lambda: solve(problem, budget, options, Limits()))
    _, rewriting = timed(lambda: realise(built, plan, options))
    return {
        "layers": layers,
        "ops": len(problem.ops),
        "capture_s": round(first - pricing - ordering - plain, 2),
        "cost_s": round(pricing, 2),
        "solve_s": round(solving, 2),
        "rewrite_s": round(rewriting, 2),
        "status": str(plan.status),
        "kept": plan.peak <= budget,
        "slowdown": plan.time / plan.unplanned_time,
        "gap": plan.gap,
        "bound_scope": plan.bound_scope,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    header = (
        "layers",
        "ops",
        "capture s",
        "cost s",
        "solve s",
        "rewrite s",
        "solve µs an op",
        "kept",
        "time",
        "gap %",
    )
    lines = [
        (
            str(row["layers"]),
            str(row["ops"]),
            *(f"{row[part]:.2f}" for part in ("capture_s", "cost_s", "solve_s", "rewrite_s")),
            f"{1e6 * row['solve_s'] / row['ops']:.0f}",
            "yes" if row["kept"] else "no",
            f"{row['slowdown']:.4f}",
            f"{100 * row['gap']:.3f}",
        )
        for row in rows.values()
    ]
    return markdown(header, lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else {}
    measure(1)  # compiles or loads the solvers' loops, which the times leave out
    for layers in given.layers:
        rows[str(layers)] = measure(layers)
        rows = dict(sorted(rows.items(), key=lambda item: int(item[0])))
        given.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()

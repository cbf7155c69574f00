"""The order solver on public graphs and on random ones: peak against the stored order's, with the bound beside it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graph_families import Tape, random_layered, transformer

from memplan.graph_files import GraphFile, load_graph
from memplan.outcome import Limits
from memplan.problem import Problem
from memplan.solvers.order import forced_live_bound, solve_order
from memplan.validate import validate

# Folder, file, and the peak that a plain annealer reaches in 15 s, in per cent of the stored order's.
PUBLIC = (
    ("recompute", "random_layered_n100", 79.4),
    ("recompute", "random_layered_n250", 71.6),
    ("recompute", "fcn8_vgg_train", None),
    ("recompute", "resnet50_train", None),
    ("joint", "gpt", None),
    ("joint", "res", None),
)
EFFORTS = (0.0, 0.03, 0.1, 0.3, 1.0)  # Limits.work at which the random graphs are solved for the picture


def rows(data: Path) -> Iterator[dict[str, Any]]:
    """One row a graph, as it is solved; peaks in per cent of the stored order's."""
    for folder, name, annealer in PUBLIC:
        path = data / folder / f"{name}.json"
        graph = load_graph(path)
        tool = "score_joint.py" if folder == "joint" else "score_recompute.py"
        yield {"instance": name} | _solve(graph, annealer, {"tool": tool, "instance": str(path)})
    for n in (250, 500, 1000):
        yield {"instance": f"random layered {n}"} | _solve(_unnamed(random_layered(n, seed=n)), None, None, EFFORTS)
    for blocks in (20, 100, 600):
        graph = _unnamed(branching_network(blocks, seed=blocks))
        yield {"instance": f"branching network, {blocks} blocks"} | _solve(graph)
    yield {"instance": "transformer, 312 layers"} | _solve(_unnamed(transformer(312)))


def _unnamed(problem: Problem) -> GraphFile:
    return GraphFile(problem, tuple(range(len(problem.ops))))


def _solve(
    graph: GraphFile,
    annealer: float | None = None,
    score: dict[str, str] | None = None,
    efforts: tuple[float, ...] = (1.0,),
) -> dict[str, Any]:
    """The row of one graph; with several efforts the last one counts and all are in its trace."""
    trace = []
    for work in efforts:
        started = time.perf_counter()
        plan = solve_order(graph.problem, limits=Limits(work=work))
        seconds = time.perf_counter() - started
        trace.append([round(seconds, 4), _percent(plan.peak, plan.unplanned_peak)])
    validate(graph.problem, plan)
    if score is not None:
        score["plan"] = json.dumps(graph.sequence_ids(plan.sequence))
    return {
        "ops": len(graph.problem.ops),
        "stored peak": plan.unplanned_peak,
        "annealer %": annealer,
        "ours %": _percent(plan.peak, plan.unplanned_peak),
        "bound %": _percent(plan.peak_bound, plan.unplanned_peak),
        "forced-live %": _percent(forced_live_bound(graph.problem), plan.unplanned_peak),
        "status": str(plan.status),
        "seconds": round(seconds, 3),
        "trace": trace if len(efforts) > 1 else None,
        "expect": {"peak": plan.peak},
        "score": score,
    }


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 3)


def branching_network(blocks: int, seed: int) -> Problem:
    """A training step over residual blocks of one to three branches, whose sizes are drawn at random."""
    rng = random.Random(seed)
    tape = Tape()
    x = tape.run("stem", (), 1000, 1.0, "nothing")
    for k in range(blocks):
        ends = []
        for branch in range(rng.randint(1, 3)):
            at = f"{k}.{branch}"
            inner = tape.run(f"{at}.in", (x,), rng.choice((500, 1000, 2000, 4000)), 1.0, weight=rng.choice((100, 900)))
            ends.append(tape.run(f"{at}.out", (inner,), rng.choice((500, 1000)), 1.0, weight=rng.choice((100, 900))))
        x = tape.run(f"{k}.join", (x, *ends), 1000, 1.0, "nothing")
    return tape.problem(tape.run("loss", (x,), 4, 1.0))

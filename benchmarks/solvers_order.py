"""The order solver on public graphs and on random ones: peak against the stored order's, with the bound beside it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memplan.graph_files import GraphFile, load_graph
from memplan.outcome import Limits
from memplan.problem import Buffer, Op, Phase, Problem
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
        yield {"instance": f"random layered {n}"} | _solve(_unnamed(layered(n, seed=n)), None, None, EFFORTS)
    for blocks in (20, 100, 600):
        yield {"instance": f"training step, {blocks} blocks"} | _solve(_unnamed(training_step(blocks, seed=blocks)))


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


def layered(n: int, seed: int) -> Problem:
    """A random layered graph: each node reads from the layer above, at times from one further up; sizes uniform."""
    rng = random.Random(seed)
    layers, made = [[0]], 1
    while made < n:
        width = min(n - made, rng.randint(1, max(2, round(0.8 * n**0.5))))
        layers.append(list(range(made, made + width)))
        made += width
    reads: list[set[int]] = [set() for _ in range(n)]
    for depth in range(1, len(layers)):
        above = layers[depth - 1]
        for v in layers[depth]:
            reads[v] = {u for u in above if rng.random() < 0.2} | {rng.choice(above)}
            if depth > 1 and rng.random() < 0.14:
                reads[v].add(rng.choice(layers[rng.randrange(max(0, depth - 4), depth - 1)]))
    ops = tuple(Op(f"v{v}", reads=tuple(sorted(reads[v])), writes=(v,), time=1.0) for v in range(n))
    return Problem(ops, tuple(Buffer(f"v{v}", rng.randrange(100, 5000)) for v in range(n)))


def training_step(blocks: int, seed: int) -> Problem:
    """Residual blocks of up to three branches forwards, their gradients backwards; weight gradients are outputs."""
    rng = random.Random(seed)
    ops: list[Op] = []
    buffers: list[Buffer] = []

    def op(reads: list[int], sizes: tuple[int, ...], phase: Phase = Phase.FORWARD) -> int:
        made = len(buffers)
        buffers.append(Buffer(f"b{made}", rng.choice(sizes)))
        ops.append(Op(f"op{made}", reads=tuple(dict.fromkeys(reads)), writes=(made,), time=1.0, phase=phase))
        return made

    small, wide, weight = (500, 1000), (500, 1000, 2000, 4000), (100, 900)
    x = op([], (1000,))
    saved = []
    for _ in range(blocks):
        branches = []
        for _ in range(rng.randint(1, 3)):
            inner = op([x], wide)
            branches.append((inner, op([inner], small)))
        saved.append((x, branches))
        x = op([x, *(end for _, end in branches)], (1000,))
    loss = op([x], (4,))
    gradient = op([loss], (1000,), Phase.BACKWARD)
    outputs = [loss]
    for entry, branches in reversed(saved):
        parts = [gradient]
        for inner, end in rng.sample(branches, len(branches)):
            of_end = op([gradient, end], small, Phase.BACKWARD)
            outputs.append(op([of_end, inner], weight, Phase.BACKWARD))
            of_inner = op([of_end, inner], wide, Phase.BACKWARD)
            outputs.append(op([of_inner, entry], weight, Phase.BACKWARD))
            parts.append(op([of_inner], (1000,), Phase.BACKWARD))
        gradient = op(parts, (1000,), Phase.BACKWARD)
    return Problem(tuple(ops), tuple(buffers), tuple(outputs), (loss,))

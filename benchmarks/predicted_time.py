"""Is a step under a budget as much slower as its plan says? All budgets of a model in one process, their steps in turns.

``python benchmarks/predicted_time.py --models gpt vit`` writes ``results/predicted_time.json`` and the table beside it. The
measured ratio of a round is a step's processor time by that of the unbudgeted step of the same round; a row has their
median. The allocator keeps what it was given (``KEEPING``) but for the blocks that glibc maps anew in any state: the
first touch of a page takes several times the writing of it, and how many fresh pages a step meets under glibc's defaults
is a matter of its history. The times of the frontier, each contender in a process of its own under the defaults, have
that in them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zoo
from environment import environment
from measure import HERE, Record
from tables import markdown
from worker import failure

from memplan.backend import recent_plans

SHARES = (75, 50, 35, 25)  # percent of the unbudgeted step's peak
SMALLEST = "smallest"
CLOSE = 0.05
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
Step = Callable[[], None]


def measure(model: str, size: zoo.Size, rounds: int) -> dict[str, Record]:
    """The rows of a model by budget: the plan's ratio, the measured one and its quartiles."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 32  # every budget is another compilation of the same code
    workload = zoo.build(model, size)
    free, peak, _ = prepared(workload, {})
    least = smallest(workload)
    budgets = {f"{share}%": peak * share // 100 for share in SHARES if peak * share // 100 > least} | {SMALLEST: least}
    steps = {name: prepared(workload, {"memory_budget": budget}) for name, budget in budgets.items()}
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        base = seconds(workload, free)
        for name, (step, _, _) in steps.items():
            ratios[name].append(seconds(workload, step) / base)
    rows: dict[str, Record] = {}
    for name, (_, _, told) in steps.items():
        low, middle, high = statistics.quantiles(ratios[name], n=4)
        rows[name] = {"budget": budgets[name], "told": told, "measured": middle, "quartiles": [low, high]}
    return rows


def prepared(workload: zoo.Workload, options: dict[str, Any]) -> tuple[Step, int, float]:
    """A warm step under the options; the peak of its plans, and their time by the unbudgeted step's."""
    run = torch.compile(workload.model, backend="memplan", options=options or None)

    def step() -> None:
        run(**workload.inputs).backward()

    known = set(map(id, recent_plans()))
    seconds(workload, step)
    plans = [planned.plan for planned in recent_plans() if id(planned) not in known]
    seconds(workload, step)
    return step, max(p.peak for p in plans), sum(p.time for p in plans) / sum(p.unplanned_time for p in plans)


def smallest(workload: zoo.Workload) -> int:
    """The least budget that the refusal of a single byte names."""
    try:
        torch.compile(workload.model, backend="memplan", options={"memory_budget": 1})(**workload.inputs)
    except Exception as error:  # noqa: BLE001 - dynamo wraps the refusal
        return failure(error)["infeasible"]["smallest"]
    raise AssertionError("a step within one byte")


def seconds(workload: zoo.Workload, step: Step) -> float:
    """Processor seconds of one step that begins without gradients."""
    workload.model.zero_grad(set_to_none=True)
    gc.collect()
    began = time.process_time()
    step()
    return time.process_time() - began


def table(rows: dict[str, dict[str, Record]]) -> str:
    """One line a model and budget, and how many came as told."""
    lines, close, count = [], 0, 0
    for model, found in rows.items():
        for name, row in found.items():
            off = row["measured"] - row["told"]
            close, count = close + (abs(off) <= CLOSE), count + 1
            spread = "{:.3f}-{:.3f}".format(*row["quartiles"])
            lines.append((model, name, f"{row['told']:.3f}", f"{row['measured']:.3f}", spread, f"{100 * off:+.1f}"))
    header = ("model", "budget", "predicted time / unbudgeted", "measured", "quartiles", "points apart")
    return f"Within {CLOSE * 100:.0f} points: {close} of {count} rows.\n\n{markdown(header, lines)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(zoo.MODELS), choices=list(zoo.MODELS), metavar="MODEL")
    parser.add_argument("--size", default="bench", choices=["small", "bench"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "predicted_time.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measure(given.models[0], given.size, given.rounds)))
        return
    report = json.loads(given.out.read_text()) if given.out.exists() else {"rows": {}}
    for model in given.models:
        command = [sys.executable, __file__, "--worker", "--models", model, "--size", given.size]
        command += ["--rounds", str(given.rounds)]
        environ = os.environ | KEEPING | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
        report["rows"][model] = json.loads(done.stdout.splitlines()[-1])
        report["environment"] = environment()
        given.out.write_text(json.dumps(report, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(table(report["rows"]))
        print(model, report["rows"][model], flush=True)


if __name__ == "__main__":
    main()

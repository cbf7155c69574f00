"""What a first step costs beyond eager's: AOTAutograd alone, memplan under a budget, Inductor, each as if it had never
met the model: Inductor's cache is empty, memplan's holds its compiled solvers and the op costs of another model.

``python benchmarks/compile_time.py --models gpt2 resnet50 --budget 50%`` runs every contender in a process of its own and
writes ``results/compile_time.json`` and the table beside it. CPU seconds of the process and of the compilers it starts,
so that other work on the machine weighs little. *planning* is what memplan adds to AOTAutograd's tracing: measuring the
ops, solving, rewriting; its share is of what Inductor adds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import zoo
from environment import environment
from graph_families import random_layered
from measure import HERE
from tables import markdown

from memplan.solvers.order import solve_order

CONTENDERS = ("eager", "aot_eager", "memplan", "inductor")
_SOLVERS = "solvers"  # no contender: compiles what easy models do without, once on a machine
_ANOTHER = ("vit", "small")
MODELS = ("gpt", "gpt2", "llama", "vit", "bert", "t5", "resnet50", "efficientnet")


def first_step(model: str, size: zoo.Size, contender: str, budget: str) -> float:
    """CPU seconds of the first step, its compilation included."""
    torch.set_num_threads(1)
    if contender == _SOLVERS:
        solve_order(random_layered(40, seed=0))
        return 0.0
    workload = zoo.build(model, size)
    options: dict[str, Any] = {"options": {"memory_budget": budget}} if contender == "memplan" else {}
    run = workload.model if contender == "eager" else torch.compile(workload.model, backend=contender, **options)
    before = _cpu()
    run(**workload.inputs).backward()
    return _cpu() - before


def _cpu() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measured(model: str, size: str, contender: str, budget: str, cache: Path) -> float:
    """The same in a process of its own, with a copy of memplan's ``cache``."""
    command = [sys.executable, __file__, "--worker", contender, "--models", model, "--size", size, "--budget", budget]
    with tempfile.TemporaryDirectory() as fresh:
        own, inductors = Path(fresh, "memplan"), Path(fresh, "inductor")
        shutil.copytree(cache, own)
        environ = {
            "MEMPLAN_CACHE_DIR": str(own),
            "TORCHINDUCTOR_CACHE_DIR": str(inductors),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # in this process, which counts it
        }
        done = subprocess.run(command, env=os.environ | environ, stdout=subprocess.PIPE, text=True, check=True)
        if (model, size) == _ANOTHER:
            shutil.copytree(own, cache, dirs_exist_ok=True)
    return float(done.stdout.splitlines()[-1])


def row(model: str, size: str, budget: str, cache: Path) -> dict[str, Any]:
    """CPU seconds a contender, and planning's share."""
    found = {contender: round(measured(model, size, contender, budget, cache), 2) for contender in CONTENDERS}
    planning = found["memplan"] - found["aot_eager"]
    return found | {"planning": round(planning, 2), "share": planning / (found["inductor"] - found["eager"])}


def table(rows: dict[str, dict[str, Any]]) -> str:
    header = ["model", "budget", *CONTENDERS, "planning", "of Inductor's"]
    return markdown(
        header,
        (
            [
                name,
                r["budget"],
                *(f"{r[c]:.1f}" for c in (*CONTENDERS, "planning")),
                f"{r['share']:.1%}".replace("%", " %"),
            ]
            for name, r in rows.items()
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=list(zoo.MODELS), metavar="MODEL")
    parser.add_argument("--size", default="bench", choices=["small", "bench"])
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "compile_time.json")
    parser.add_argument("--worker", choices=(*CONTENDERS, _SOLVERS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(first_step(given.models[0], given.size, given.worker, given.budget))
        return
    report = json.loads(given.out.read_text()) if given.out.exists() else {"rows": {}}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        for contender in (_SOLVERS, "memplan", "inductor"):  # the first use on this machine
            measured(*_ANOTHER, contender, given.budget, cache)
        for model in given.models:
            found = row(model, given.size, given.budget, cache)
            report["rows"][model] = found | {"budget": given.budget, "environment": environment()}
            given.out.write_text(json.dumps(report, indent=1) + "\n")
            given.out.with_suffix(".md").write_text(table(report["rows"]) + "\n")
            print(model, found, flush=True)


if __name__ == "__main__":
    main()

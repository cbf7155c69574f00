"""How good is a prediction made without running the model: ``memplan analyze`` against the measured peak.

``python benchmarks/accuracy.py`` analyses models of the zoo from shapes alone, measures their steps under the malloc
interposer, eagerly (which is what an analysis predicts) and compiled by memplan without a budget, and takes the
analysis's own time and memory; ``--optimizers`` does so for whole steps of GPT-2 with each of the optimizers named,
``--configs`` for published configurations, which are measured where the machine has the bytes. Each analysis and each
measured step is a process of its own. Results: ``results/accuracy.json`` and the table beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import zoo
from environment import environment
from measure import HERE, Bench, Model, Record, Results, measured_apart
from meter import KEPT_FROM, Meter
from rich.console import Console
from tables import markdown, megabytes, percent
from zoo.configs import CONFIGS
from zoo.workload import Workload

TRAIN, INFERENCE = "train", "inference"
ROOM = 1.25  # free bytes by those predicted: eager's step may hold a fifth more, and the process its code


def analyse(entry: str, arguments: Sequence[str]) -> Record:
    """Peak that ``memplan analyze ENTRY`` predicts, and the wall seconds, CPU seconds and bytes that it took."""
    with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
        answer = Path(folder) / "analysis.json"
        command = [sys.executable, "-m", "memplan.cli", "analyze", entry, *arguments, "--format", "json", "--no-advice"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *_path()])}
        began = time.perf_counter()
        with subprocess.Popen(
            [*command, "-o", str(answer)], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        ) as process:
            assert process.stderr is not None
            said = process.stderr.read().decode()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if not answer.exists():
            return {"failure": (said.strip().splitlines() or [f"status {process.returncode}"])[-1]}
        found = json.loads(answer.read_text())
        return {
            "peak": found["peak_bytes"],
            "wall_s": time.perf_counter() - began,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "memory": usage.ru_maxrss * 1024,
        }


def _path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def measured(source: str, way: str, kind: str) -> Record:
    """Measured peak of a warm step of a model in this process: forward alone, or with backward, and with an update.

    ``source``: an entry of zoo.entries or zoo.configs; ``way``: "eager" or "memplan" (without a budget); ``kind``:
    "inference", "train" for no update, or what --optimizer takes.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, _, name = source.partition(":")
    workload = Workload(*getattr(import_module(module), name)())
    run = workload.model if way == "eager" else torch.compile(workload.model, backend="memplan")
    update = _optimizer(kind, workload.model) if kind not in (TRAIN, INFERENCE) else None

    def step() -> None:
        if kind == INFERENCE:
            with torch.no_grad():
                run(**workload.inputs)
            return
        loss = run(**workload.inputs)
        loss.backward()
        if update is not None:
            update.step()
        workload.model.zero_grad(set_to_none=True)

    meter = Meter()
    before = meter.tensors()
    for _ in range(2):
        step()
    states = [v for s in update.state.values() for v in s.values()] if update else []
    sizes = [v.untyped_storage().nbytes() for v in states if isinstance(v, torch.Tensor)]
    # What a way keeps between steps (an arena) counts against it; the state is counted whole, small tensors included.
    kept = meter.tensors() - before - sum(size for size in sizes if size >= KEPT_FROM)
    above = meter.measure(step).above
    return {"peak": workload.resident_bytes() + sum(sizes) + kept + above, "state": sum(sizes), "kept": kept}


def _optimizer(text: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """As ``memplan analyze --optimizer`` names it."""
    name, _, form = text.partition(":")
    forms = {"": {}, "for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[form]
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if name in kinds:
        return kinds[name](model.parameters(), lr=1e-4, **forms)
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9 if name == "momentum" else 0.0, **forms)


def run(bench: Bench, names: Sequence[str], size: str, dropout: bool) -> None:
    """Predict and measure models of the zoo: forward and backward, and the forward alone."""
    for name in names:
        model = Model(name, size, dropout and zoo.MODELS[name].has_dropout)
        entry = f"zoo.entries:{name}_{size}"
        _pair(bench, model, entry + "_dropout" * model.dropout, TRAIN)
        _pair(bench, Model(name, size), f"{entry}_inference", INFERENCE)


def run_configs(bench: Bench, names: Sequence[str]) -> None:
    """Predict training with AdamW, and inference, of published configurations; measure those that fit here."""
    for name in names:
        model = Model(name, "published")
        _pair(bench, model, f"zoo.configs:{name}", "adamw")
        _pair(bench, model, f"zoo.configs:{name}_inference", INFERENCE)


def run_optimizers(bench: Bench, optimizers: Sequence[str]) -> None:
    """Predict and measure whole steps of GPT-2, 124 million parameters, with each optimizer."""
    for optimizer in optimizers:
        _pair(bench, Model("gpt2_short", "published"), "zoo.configs:gpt2_short", optimizer)


def _pair(bench: Bench, model: Model, entry: str, kind: str) -> None:
    """A prediction, and the measured peaks of eager and of memplan without a budget where the machine has the bytes."""
    given = {TRAIN: ["--train"], INFERENCE: ["--inference"]}.get(kind, ["--train", "--optimizer", kind])
    predicted = bench.keep(model, kind, lambda: analyse(entry, given))
    if ROOM * predicted.get("peak", 0) > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"):
        return
    for way in ("memplan", "eager"):
        bench.keep(model, f"{kind} {way}", lambda w=way: measured_apart(__file__, [entry, w, kind]))


def table(data: Record) -> str:
    """One line a model and step: predicted, measured, and what the prediction cost."""
    header = (
        "model",
        "step",
        "predicted MB",
        "eager MB",
        "predicted / eager",
        "memplan MB",
        "predicted / memplan",
        "analysis s",
        "CPU s",
        "MB",
    )
    return markdown(header, _lines(data["rows"])) + "\n"


def _lines(rows: dict[str, dict[str, Record]]) -> Iterator[tuple[str, ...]]:
    for model, records in rows.items():
        for step, found in records.items():
            if step.endswith(("memplan", "eager")):
                continue
            eager, memplan = (records.get(f"{step} {way}", {}).get("peak") for way in ("eager", "memplan"))
            yield (
                model,
                step,
                megabytes(found.get("peak")) if "failure" not in found else found["failure"],
                megabytes(eager),
                percent(found["peak"] / eager - 1 if eager and "peak" in found else None),
                megabytes(memplan),
                percent(found["peak"] / memplan - 1 if memplan and "peak" in found else None),
                f"{found['wall_s']:.1f}" if "wall_s" in found else "",
                f"{found['cpu_s']:.1f}" if "cpu_s" in found else "",
                megabytes(found.get("memory")),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(zoo.FIRST), choices=list(zoo.MODELS), metavar="MODEL")
    parser.add_argument("--size", default="bench", choices=["small", "bench"])
    parser.add_argument("--dropout", action="store_true", help="with dropout, where the model has it")
    parser.add_argument("--configs", nargs="*", default=[], choices=list(CONFIGS), metavar="CONFIG")
    parser.add_argument(
        "--optimizers", nargs="*", default=[], metavar="OPTIMIZER", help="whole steps of GPT-2 with these"
    )
    parser.add_argument("--force", action="store_true", help="measure rows again that the results hold already")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "accuracy.json")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measured(*given.worker)))
        return
    results = Results(given.out, environment())
    with Bench(results, pairs=0, threads=1, force=given.force) as bench:
        run(bench, given.models, given.size, given.dropout)
        run_configs(bench, given.configs)
        run_optimizers(bench, given.optimizers)
    written = table(results.data)
    given.out.with_suffix(".md").write_text(written)
    Console(width=200).print(written, markup=False)


if __name__ == "__main__":
    main()

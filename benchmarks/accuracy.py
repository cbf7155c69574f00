"""How good is a prediction made without running the model: ``memplan analyze`` against the measured peak.

``python benchmarks/accuracy.py`` analyses every model of the zoo from shapes alone, measures its step under the malloc
interposer, and takes the analysis's own time and memory; ``--configs`` adds published configurations that no small
machine can run. Each analysis is a process of its own. Results: ``results/accuracy.json`` and the table beside it.
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
from pathlib import Path

import zoo
from environment import environment
from measure import HERE, Bench, Model, Record, Results
from rich.console import Console
from tables import markdown, megabytes, percent
from zoo.configs import CONFIGS

ANALYSIS = "analysis"


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


def run(bench: Bench, names: Sequence[str], size: str, dropout: bool) -> None:
    """Predict and measure models of the zoo."""
    for name in names:
        model = Model(name, size, dropout and zoo.MODELS[name].has_dropout)
        variant = f"{name}_{size}" + "_dropout" * model.dropout
        bench.keep(model, ANALYSIS, lambda entry=f"zoo.entries:{variant}": analyse(entry, ["--train"]))
        bench.record(model, "memplan")
        bench.record(model, "eager")


def run_configs(bench: Bench, names: Sequence[str]) -> None:
    """Predict training with AdamW, and inference, of published configurations."""
    for name in names:
        model = Model(name, "published")
        bench.keep(model, "train", lambda n=name: analyse(f"zoo.configs:{n}", ["--train", "--optimizer", "adamw"]))
        bench.keep(model, "inference", lambda n=name: analyse(f"zoo.configs:{n}_inference", ["--inference"]))


def table(data: Record) -> str:
    """One line a model: predicted, measured, and what the prediction cost."""
    header = ("model", "step", "predicted MB", "measured MB", "difference", "eager MB", "analysis s", "CPU s", "MB")
    return markdown(header, _lines(data["rows"])) + "\n"


def _lines(rows: dict[str, dict[str, Record]]) -> Iterator[tuple[str, ...]]:
    for model, records in rows.items():
        measured = records.get("memplan", {}).get("peak")
        eager = records.get("eager", {}).get("peak")
        for step, found in records.items():
            if step in ("memplan", "eager"):
                continue
            difference = found["peak"] / measured - 1 if measured and "peak" in found else None
            yield (
                model,
                "train" if step == ANALYSIS else step,
                megabytes(found.get("peak")),
                megabytes(measured),
                percent(difference) if "failure" not in found else found["failure"],
                megabytes(eager),
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
    parser.add_argument("--force", action="store_true", help="measure rows again that the results hold already")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "accuracy.json")
    given = parser.parse_args()
    results = Results(given.out, environment())
    with Bench(results, pairs=0, threads=1, force=given.force) as bench:
        run(bench, given.models, given.size, given.dropout)
        run_configs(bench, given.configs)
    written = table(results.data)
    given.out.with_suffix(".md").write_text(written)
    Console(width=200).print(written, markup=False)


if __name__ == "__main__":
    main()

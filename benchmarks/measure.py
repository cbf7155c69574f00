"""Measure one contender on one model in a fresh process: peak, gradients, exactness, step time against eager.

``measure(Job(...))`` starts ``worker.py`` under the malloc interposer and returns its record, a plain dict:

- ``resident``: bytes of parameters, buffers and inputs; ``above``: measured peak above them, gradients included;
  ``peak``: their sum, what a memory budget bounds; ``kept``: the part of it that is held between steps, too (an arena).
- ``loss``, ``gradients``, ``buffers``: fingerprints of the bits after one step from the seeded start;
  ``error``: relative error of the gradients against a float64 step of the eager model.
- ``pairs``: per repetition [eager wall s, contender wall s, eager CPU s, contender CPU s], taken in turns.
- ``plan``: what memplan promised, for its own contenders.
- ``infeasible`` (smallest and bound) or ``failure`` (the message) in place of all that when no step ran.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from meter import interposed_environment
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"  # scratch: references of gradients; never committed
Record = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A row's model: a name of the zoo, the size, and its variants. ``str()`` gives its key in tables and files."""

    name: str
    size: str = "bench"
    dropout: bool = False
    bf16: bool = False

    def __str__(self) -> str:
        return self.name + "+dropout" * self.dropout + "+bf16" * self.bf16 + f"-{self.size}" * (self.size != "bench")

    @property
    def reference(self) -> Path:
        """Where the float64 gradients of this model are kept between processes."""
        return OUT / f"{self}.pt"


@dataclass(frozen=True)
class Job:
    """One contender on one model. ``pairs`` timed repetitions beside eager; 0 measures memory and gradients alone."""

    model: Model
    contender: str
    pairs: int = 0
    threads: int = 1
    timeout_s: int = 900


def measure(job: Job) -> Record:
    """Run the job in a fresh process. A contender that breaks or overruns gives a record with ``failure``."""
    with tempfile.TemporaryDirectory(prefix="measure-") as folder:
        answer = Path(folder) / "record.json"
        environment = interposed_environment() | {
            "OMP_NUM_THREADS": str(job.threads),
            "MKL_NUM_THREADS": str(job.threads),
            # A cache of its own: every compile is cold, and no contender reads what another left behind.
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
        }
        command = [sys.executable, str(HERE / "worker.py"), json.dumps(asdict(job)), str(answer)]
        try:
            done = subprocess.run(
                command, env=environment, check=False, capture_output=True, text=True, timeout=job.timeout_s
            )
        except subprocess.TimeoutExpired:
            return {"failure": f"took longer than {job.timeout_s} s"}
        if answer.exists():
            return json.loads(answer.read_text())
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failure": lines[-1] if lines else f"ended with status {done.returncode}"}


def measured_apart(script: str, arguments: Sequence[str]) -> Record:
    """What ``script --worker ARGUMENTS`` prints as its last line, run in a process of its own that counts its memory."""
    done = subprocess.run(
        [sys.executable, script, "--worker", *arguments],
        env=interposed_environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"failure": done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else "died"}
    return json.loads(done.stdout.splitlines()[-1])


def time_ratio(record: Mapping[str, Any], clock: str = "wall") -> float | None:
    """Median over the pairs of contender's time by eager's, by the ``"wall"`` clock or ``"cpu"`` time."""
    at = 0 if clock == "wall" else 2
    ratios = [pair[at + 1] / pair[at] for pair in record.get("pairs", ())]
    return statistics.median(ratios) if ratios else None


def ratio_spread(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """Lower and upper quartile of the wall ratios."""
    ratios = sorted(pair[1] / pair[0] for pair in record.get("pairs", ()))
    if len(ratios) < 2:
        return None
    quartiles = statistics.quantiles(ratios, n=4)
    return quartiles[0], quartiles[2]


def error_against(record: Mapping[str, Any], eager: Mapping[str, Any] | None) -> float | None:
    """Gradient error of a record by eager's, both against float64: about 1 is as good as eager."""
    if not eager or not eager.get("error") or "error" not in record:
        return None
    return record["error"] / eager["error"]


class Results:
    """Records by model and contender in one JSON file, written after every record so that a run can be resumed."""

    def __init__(self, path: Path, environment: Mapping[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"environment": dict(environment), "rows": {}}
        if path.exists():
            self.data["rows"] = json.loads(path.read_text())["rows"]

    def get(self, model: Model, contender: str) -> Record | None:
        return self.data["rows"].get(str(model), {}).get(contender)

    def put(self, model: Model, contender: str, record: Record) -> None:
        # A file may be filled by several runs: every record says by which revision.
        marked = record | {"revision": self.data["environment"]["revision"]}
        self.data["rows"].setdefault(str(model), {})[contender] = marked
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.path)


class Bench:
    """Recalls or measures records one after the other, with a line of progress. A context manager."""

    def __init__(self, results: Results, pairs: int, threads: int, force: bool = False) -> None:
        self.results, self.pairs, self.threads, self.force = results, pairs, threads, force
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), transient=True
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def record(self, model: Model, key: str, contender: str | None = None, budget: int | None = None) -> Record:
        """The record kept under ``key``; measured when absent, forced, failed, or of another budget in bytes."""
        job = Job(model, contender or key, self.pairs, self.threads)
        return self.keep(model, key, lambda: measure(job), budget)

    def keep(self, model: Model, key: str, make: Callable[[], Record], budget: int | None = None) -> Record:
        """The same for a record that ``make`` measures."""
        known = self.results.get(model, key)
        if known is not None and not self.force and "failure" not in known and known.get("budget") == budget:
            return known
        task = self._progress.add_task(f"{model}  {key}")
        record = make()
        if budget is not None:
            record["budget"] = budget
        self._progress.remove_task(task)
        self._progress.console.print(f"{model}  {key}  {_brief(record)}", highlight=False, soft_wrap=True)
        self.results.put(model, key, record)
        return record


def _brief(record: Record) -> str:
    if "peak" not in record:
        return str(record.get("failure") or record.get("infeasible", record))
    ratio = time_ratio(record)
    return f"{record['peak'] / 1e6:.1f} MB" + (f", {ratio:.3f} of eager's time" if ratio else "")

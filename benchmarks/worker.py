"""The measured process: one contender on one model, started by ``measure.py`` under the malloc interposer.

``python worker.py JOB RECORD``: JOB is a JSON job, RECORD the file to write. Not meant to be called by hand.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import zoo
from measure import Job, Model, Record
from meter import Meter
from rivals import Contender, prepare
from torch import Tensor

from memplan.errors import BudgetInfeasibleError

_WARM_UPS = 2
_PEAKS = 2  # the peak is a property of the step; a repeat shows that it is
_SAMPLE = 1 << 16  # entries of each gradient that are compared with the float64 reference


class Step:
    """Forward and backward of one training step, always from gradients set to None."""

    def __init__(self, run: Callable[..., Tensor], workload: zoo.Workload) -> None:
        self.run, self.workload = run, workload

    def __call__(self) -> Tensor:
        loss = self.run(**self.workload.inputs)
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        self.workload.model.zero_grad(set_to_none=True)

    def seconds(self) -> tuple[float, float]:
        """Wall and CPU seconds of one step, gradients cleared and garbage collected before the clock starts."""
        self.clear()
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        self()
        return time.perf_counter() - wall, time.process_time() - cpu


def run(job: Job) -> Record:
    """Measure everything about ``job.contender``; the eager twin that it is timed against is built last."""
    torch.set_num_threads(job.threads)
    if not job.model.reference.exists():
        save_reference(job.model)
    meter = Meter()
    workload = build(job.model)
    step = Step(prepare(Contender.parse(job.contender), workload, job.model.dropout), workload)
    start = {name: value.clone() for name, value in workload.model.named_buffers()}
    before = meter.tensors()
    began = time.perf_counter()
    try:
        step()
    except Exception as error:  # noqa: BLE001 - reported in the record; a rival may break in any way
        return failure(error)
    record: Record = {"contender": job.contender, "first_step_s": time.perf_counter() - began}
    for _ in range(_WARM_UPS):
        step.clear()
        step()
    step.clear()
    record |= memory(step, meter, before) | exactness(step, start, job.model) | promise()
    record["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if job.pairs:
        twin = build(job.model)
        record["pairs"] = list(time_pairs(Step(twin.model, twin), step, job.pairs))
    return record


def build(model: Model) -> zoo.Workload:
    return zoo.build(model.name, model.size, model.dropout, model.bf16)  # type: ignore[arg-type]


def memory(step: Step, meter: Meter, before: int) -> Record:
    """Peak of a warm step above what was held before the first one: a contender pays for what it keeps between steps."""
    kept = meter.tensors() - before
    above = []
    for _ in range(_PEAKS):
        step.clear()
        above.append(kept + meter.measure(step).above)
    step.clear()
    resident = step.workload.resident_bytes()
    return {"resident": resident, "above": max(above), "above_all": above, "peak": resident + max(above), "kept": kept}


def exactness(step: Step, start: dict[str, Tensor], model: Model) -> Record:
    """Fingerprints of loss, gradients and buffers after one step from the start, and the error against float64."""
    with torch.no_grad():
        for name, value in step.workload.model.named_buffers():
            value.copy_(start[name])
    torch.manual_seed(1)
    loss = step()
    gradients = dict(_gradients(step.workload))
    record = {
        "loss": float(loss).hex(),
        "gradients": _fingerprint(gradients),
        "buffers": _fingerprint(dict(step.workload.model.named_buffers())),
        "error": relative_error(gradients, torch.load(model.reference)),
    }
    step.clear()
    return record


def save_reference(model: Model) -> None:
    """Gradients of the eager model in float64 from the same weights, inputs and seed; a fixed sample of each."""
    workload = build(model)  # autocast leaves float64 as it is
    workload.model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in workload.inputs.items()}
    torch.manual_seed(1)
    workload.model(**inputs).backward()
    model.reference.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: sample(value) for name, value in _gradients(workload)}, model.reference)


def relative_error(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Norm of the difference to the float64 gradients by their norm, over all parameters together."""
    if gradients.keys() != reference.keys():
        return float("inf")  # a gradient is missing
    difference = sum(float((sample(g).double() - reference[n]).square().sum()) for n, g in gradients.items())
    return (difference / sum(float(value.square().sum()) for value in reference.values())) ** 0.5


def sample(value: Tensor) -> Tensor:
    flat = value.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLE)].clone()


def promise() -> Record:
    """What memplan's plans of this process say; empty when the backend was never asked."""
    backend = sys.modules.get("memplan.backend")
    if backend is None or not backend.recent_plans():
        return {}
    planned = backend.recent_plans()
    largest = max(planned, key=lambda p: p.held)
    plan = largest.plan
    fields = ("unplanned_peak", "time", "unplanned_time", "bound", "peak_bound", "gap", "status", "solver")
    return {
        "plan": {name: getattr(plan, name) for name in fields}
        | {"peak": largest.held, "recomputed": plan.recomputed, "ops": len(largest.problem.ops), "graphs": len(planned)}
    }


def time_pairs(eager: Step, contender: Step, pairs: int) -> Iterator[tuple[float, float, float, float]]:
    """Eager and contender in turns; which goes first alternates, so that a drift of the machine favours neither."""
    eager()
    for k in range(pairs):
        first, second = (eager, contender) if k % 2 == 0 else (contender, eager)
        a, b = first.seconds(), second.seconds()
        (eager_wall, eager_cpu), (wall, cpu) = (a, b) if k % 2 == 0 else (b, a)
        yield eager_wall, wall, eager_cpu, cpu
        eager.clear()
        contender.clear()


def failure(error: BaseException) -> Record:
    """The record of a contender whose first step raised; an infeasible budget is an answer, not a failure."""
    cause: BaseException = error
    while not isinstance(cause, BudgetInfeasibleError):
        inner = getattr(cause, "inner_exception", None) or cause.__cause__
        if inner is None:
            return {"failure": " ".join(f"{type(cause).__name__}: {cause}".split())[:400]}
        cause = inner
    return {"infeasible": {"budget": cause.budget, "smallest": cause.smallest, "bound": cause.bound}}


def _gradients(workload: zoo.Workload) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in workload.model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def main(arguments: list[str]) -> None:
    given: dict[str, Any] = json.loads(arguments[0])
    record = run(Job(**given | {"model": Model(**given["model"])}))
    Path(arguments[1]).write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])

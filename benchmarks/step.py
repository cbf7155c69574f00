"""Whole training steps, the optimizer included: 20 steps of AdamW on GPT-2 by eager, by hooks, and by compile_step.

``python benchmarks/step.py`` measures what ``results/step.json`` does not hold yet and writes the table beside it;
``--report`` only writes the table. Each row is a process of its own under the malloc interposer. Peaks count parameters,
optimizer state, inputs and all that a warm step takes; time is the processor's, beside eager in turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from environment import environment
from measure import HERE, OUT, measured_apart
from meter import Meter
from tables import markdown, megabytes, ratio
from zoo.workload import Workload, hugging_face

Record = dict[str, Any]
Step = Callable[[], torch.Tensor]

STEPS = 20
WAYS = {
    "gpt2": (
        "eager",
        "eager+hooks",
        "backend",
        "step",
        "step@75%",
        "step@50%",
        "step@35%",
        "step+disk@50%",
        "step+disk@12%",
    ),
    "gpt2+dropout": ("eager", "step", "step@50%"),
    "gpt2-wide": ("eager", "eager+hooks", "backend", "step", "step+disk@75%", "step+disk@55%"),
}


def build(model: str) -> Workload:
    """A model of the zoo; "gpt2-wide": 84 MB of parameters and a batch so small that gradients and state are the peak."""
    if model != "gpt2-wide":
        return zoo.build(model.removesuffix("+dropout"), "bench", model.endswith("+dropout"))  # type: ignore[arg-type]
    torch.manual_seed(0)
    config: Any = transformers.GPT2Config
    network = transformers.GPT2LMHeadModel(config(vocab_size=4096, n_positions=64, n_embd=512, n_layer=6, n_head=8))
    network.loss_type = "ForCausalLM"
    ids = torch.randint(4096, (2, 1, 64))
    return hugging_face(network, {"input_ids": ids[0].contiguous(), "labels": ids[1].contiguous()})


def optimizer_of(workload: Workload, parameters: Iterable[torch.nn.Parameter] | None = None) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters or workload.model.parameters(), lr=1e-3, foreach=False)


def eager(workload: Workload) -> tuple[Step, list[torch.optim.Optimizer]]:
    optimizer = optimizer_of(workload)

    def step() -> torch.Tensor:
        loss = workload.model(**workload.inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, [optimizer]


def hooks(workload: Workload) -> tuple[Step, list[torch.optim.Optimizer]]:
    """What PyTorch's own tutorial advises: an optimizer a parameter, stepped as its gradient arrives."""
    optimizers = {p: optimizer_of(workload, [p]) for p in workload.model.parameters()}

    def update(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        parameter.grad = None

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(update)

    def step() -> torch.Tensor:
        loss = workload.model(**workload.inputs)
        loss.backward()
        return loss.detach()

    return step, list(optimizers.values())


def backend(workload: Workload) -> tuple[Step, list[torch.optim.Optimizer]]:
    optimizer = optimizer_of(workload)
    run = torch.compile(workload.model, backend="memplan")

    def step() -> torch.Tensor:
        loss = run(**workload.inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, [optimizer]


def whole(workload: Workload, budget: str | None, disk: bool) -> tuple[Step, list[torch.optim.Optimizer], Any]:
    import memplan

    optimizer = optimizer_of(workload)
    states = "disk" if disk else "device"
    compiled = memplan.compile_step(workload.model, None, optimizer, memory_budget=budget, states=states)
    return lambda: compiled(**workload.inputs), [optimizer], compiled


def row(model: str, way: str, pairs: int) -> Record:
    """Measure one way to train one model."""
    torch.set_num_threads(1)
    workload, compiled = build(model), None
    name, _, budget = way.partition("@")
    if name.startswith("step"):
        step, optimizers, compiled = whole(workload, budget or None, disk=name == "step+disk")
    else:
        step, optimizers = {"eager": eager, "eager+hooks": hooks, "backend": backend}[name](workload)
    torch.manual_seed(1)
    began = time.perf_counter()
    losses = [float(step())]
    record: Record = {"first_step_s": time.perf_counter() - began}
    losses += [float(step()) for _ in range(STEPS - 1)]
    record |= {"losses": losses} | against_eager(model, workload, keep=way == "eager")
    states = [v for o in optimizers for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    record["state"] = sum(v.untyped_storage().nbytes() for v in states)
    meter = Meter()
    record["above"] = max(meter.measure(step).above for _ in range(2))
    if compiled is not None:
        record |= predicted(compiled.planned)
    else:
        record["gradients"] = None if name == "eager+hooks" else parameter_bytes(workload)
    on_device = record.get("state_resident", record["state"])
    record["peak"] = workload.resident_bytes() + on_device + record["above"]
    twin, _ = eager(build(model))
    twin()
    record["pairs"] = [[seconds(twin), seconds(step)] for _ in range(pairs)]
    return record


def against_eager(model: str, workload: Workload, keep: bool) -> Record:
    """Largest difference of any parameter to eager's after the same steps; eager itself leaves its own."""
    path = OUT / f"step-{model}.pt"
    mine = {name: p.detach().clone() for name, p in workload.model.named_parameters()}
    if keep:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(mine, path)
    theirs = torch.load(path)
    return {"difference": max(float((p - theirs[name]).abs().max()) for name, p in mine.items())}


def predicted(planned: Any) -> Record:
    """What the Program holds: its peak, the most bytes of gradients and of optimizer state at one instant."""
    program, plan = planned.lowered.program, planned.plan
    found: Record = {"plan_peak": planned.timeline.peak, "ops": len(planned.problem.ops), "budget": plan.budget}
    found |= {"recomputed": plan.recomputed, "offloads": len(plan.offloads), "time_planned": plan.time}
    found |= {"time_unplanned": plan.unplanned_time, "solver": plan.solver, "gap": plan.gap}
    for category, key in (("gradient", "gradients"), ("optimizer", "state_held")):
        size = [s.size if s.category == category else 0 for s in program.storages]
        live = most = sum(size[s] for s in program.resident)
        if category == "optimizer":
            found["state_resident"] = live
        for step in program.steps:
            live += sum(size[s] for s in step.makes)
            most = max(most, live)
            live -= sum(size[s] for s in step.frees)
        found[key] = most
    at_peak = (program.storages[s] for s in planned.timeline.alive(planned.timeline.peak_step))
    found["state_at_peak"] = sum(s.size for s in at_peak if s.category == "optimizer")
    return found


def parameter_bytes(workload: Workload) -> int:
    return sum(p.numel() * p.element_size() for p in workload.model.parameters())


def seconds(step: Step) -> float:
    gc.collect()
    start = time.process_time()
    step()
    return time.process_time() - start


def table(rows: dict[str, dict[str, Record]]) -> str:
    header = (
        "model",
        "way",
        "budget MB",
        "peak MB",
        "predicted / peak",
        "gradients MB",
        "state MB",
        "difference",
        "time / eager",
    )
    return markdown(header, [_line(model, way, r) for model, ways in rows.items() for way, r in ways.items()]) + "\n"


def _line(model: str, way: str, r: Record) -> Sequence[str]:
    if "failure" in r:
        return (model, way, "", r["failure"], "", "", "", "", "")
    return (
        model,
        way,
        megabytes(r.get("budget")),
        megabytes(r["peak"]),
        ratio(r["plan_peak"] / r["peak"] if "plan_peak" in r else None),
        megabytes(r["gradients"]),
        megabytes(r.get("state_held", r["state"])),
        "0" if r["difference"] == 0 else f"{r['difference']:.1e}",
        ratio(statistics.median(b / a for a, b in r["pairs"]) if r["pairs"] else None),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="default: see WAYS; eager comes first, others compare")
    parser.add_argument("--pairs", type=int, default=5, help="timed repetitions beside eager")
    parser.add_argument("--force", action="store_true", help="measure rows again that the results hold already")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the table from the results")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "step.json")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        model, way, pairs = given.worker
        print(json.dumps(row(model, way, int(pairs))))
        return
    data = json.loads(given.out.read_text()) if given.out.exists() else {"environment": environment(), "rows": {}}
    for model in () if given.report else given.models:
        kept = data["rows"].setdefault(model, {})
        for way in given.ways or WAYS[model]:
            if way in kept and "failure" not in kept[way] and not given.force:
                continue
            kept[way] = measured_apart(__file__, [model, way, str(given.pairs)])
            data["environment"] = environment()
            given.out.write_text(json.dumps(data, indent=1) + "\n")
            print(table({model: {way: kept[way]}}).splitlines()[-1], flush=True)
    given.out.with_suffix(".md").write_text(table(data["rows"]))


if __name__ == "__main__":
    main()

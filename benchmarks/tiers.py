"""Slower tiers: training with activations on the disk, and inference with weights streamed from their file.

``python benchmarks/tiers.py`` measures in fresh processes under the malloc interposer and writes ``results/tiers.json``
and a Markdown table beside it. Offload rows: recomputation alone, offload alone and both, at shares of the unplanned
peak, each against the same model without a budget, bit for bit. The variants run in turns, each round from another one
on, and times are compared within a round, so that other work on the machine weighs little. Streaming rows: a Llama-like
model whose weights are a multiple of the budget, its logits against the eager model's.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zoo
from environment import environment
from measure import HERE, measured_apart
from meter import Meter

Record = dict[str, Any]
VARIANTS: dict[str, dict[str, Any]] = {
    "recompute": {"swap.enabled": False},
    "offload": {"recompute.enabled": False, "swap.tiers": "disk"},
    "both": {"swap.tiers": "disk"},
}


def fingerprint(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class Training:
    """One compiled training step of a zoo model; ``seconds`` are wall time, ``bits`` of loss and gradients."""

    def __init__(self, model: str, size: str, options: dict[str, Any]) -> None:
        from memplan.backend import recent_plans

        torch.manual_seed(0)
        self.workload = zoo.build(model, size)  # type: ignore[arg-type]
        self.run = torch.compile(self.workload.model, backend="memplan", options=options)
        before = len(recent_plans())
        self.bits = self._bits()
        self.step()
        self.planned = max(recent_plans()[before:], key=lambda planned: planned.plan.peak)

    def _bits(self) -> str:
        loss = self.run(**self.workload.inputs)
        loss.backward()
        gradients = [p.grad for p in self.workload.model.parameters() if p.grad is not None]
        found = fingerprint([loss.detach(), *gradients])
        self.workload.model.zero_grad(set_to_none=True)
        return found

    def step(self) -> None:
        self.run(**self.workload.inputs).backward()
        self.workload.model.zero_grad(set_to_none=True)


def timed(step: Callable[[], None]) -> tuple[float, float]:
    """(wall, processor) seconds of one step."""
    wall, processor = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - processor


def training_row(model: str, size: str, budget: str, repetitions: int) -> Record:
    """All variants of one model at one budget."""
    from memplan.errors import BudgetInfeasibleError

    torch.set_num_threads(1)
    free = Training(model, size, {})
    record: Record = {
        "unplanned": free.planned.timeline.peak,
        "free_predicted": free.planned.plan.time / 1e6,
        "variants": {},
    }
    runs = {"free": free}
    for name, options in VARIANTS.items():
        try:
            runs[name] = Training(model, size, {"memory_budget": budget} | options)
        except BudgetInfeasibleError as error:
            record["variants"][name] = {"infeasible": error.smallest}
    before = {name: _traffic(run) for name, run in runs.items()}
    rounds = [_round(runs, first) for first in range(repetitions)]
    record["free_seconds"] = statistics.median(times["free"][0] for times in rounds)
    for name, run in runs.items():
        if run is not free:
            record["variants"][name] = _variant(run, free, name, rounds, before[name])
    if {"recompute", "offload", "both"} <= runs.keys():
        alone = [min(times["recompute"][0], times["offload"][0]) for times in rounds]
        record["both_by_better"] = statistics.median(
            times["both"][0] / better for times, better in zip(rounds, alone, strict=True)
        )
    return record | {"rounds": rounds}


def _round(runs: dict[str, Training], first: int) -> dict[str, tuple[float, float]]:
    """(wall, processor) seconds of a step of every run, beginning with the ``first``."""
    names = list(runs)
    first %= len(names)
    return {name: timed(runs[name].step) for name in names[first:] + names[:first]}


def _variant(
    run: Training, free: Training, name: str, rounds: list[dict[str, tuple[float, float]]], before: Record
) -> Record:
    planned, after = run.planned, _traffic(run)
    moved = {key: (after[key] - before[key]) / len(rounds) for key in after}
    peak = run.workload.resident_bytes() + Meter().measure(run.step).above
    found: Record = {
        "budget": planned.plan.budget,
        "predicted_peak": planned.timeline.peak,
        "measured_peak": peak,
        "same_bits": run.bits == free.bits,
        "predicted_seconds": planned.timeline.time / 1e6,
        "seconds": statistics.median(times[name][0] for times in rounds),
        "processor_seconds": statistics.median(times[name][1] for times in rounds),
        "ratio": statistics.median(times[name][0] / times["free"][0] for times in rounds),
        "processor_ratio": statistics.median(times[name][1] / times["free"][1] for times in rounds),
        "recomputations": planned.plan.recomputed,
        "stays": len(planned.plan.offloads),
    } | moved
    link = 0.0
    if moved["bytes_out"]:
        (tier,) = planned.problem.tiers
        link = max(moved["bytes_out"] / tier.write, moved["bytes_in"] / tier.read) / 1e6
        found["tier"] = {"write": tier.write * 1e6, "read": tier.read * 1e6, "latency": tier.latency / 1e6}
    found["link_seconds"] = link
    found["by_compute_or_link"] = statistics.median(times[name][0] / max(times["free"][0], link) for times in rounds)
    return found


def _traffic(run: Training) -> Record:
    stores = run.planned.stores.values()
    totals = {
        key: sum(getattr(s.traffic, key) for s in stores) for key in ("bytes_out", "bytes_in", "moving", "waited")
    }
    return totals


def llama(layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A Llama of 4096 words, 512 wide, with random weights, and two sequences of 256 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=4096,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    return model, {"input_ids": torch.randint(0, config.vocab_size, (2, 256)), "use_cache": False}


def streaming_row(layers: int, multiple: float, repetitions: int) -> Record:
    """Inference with weights ``multiple`` times the budget."""
    from safetensors.torch import save_file

    import memplan
    from memplan.backend import recent_plans

    torch.set_num_threads(1)
    model, inputs = llama(layers)
    total = sum(p.nbytes for p in model.parameters())
    budget = int(total / multiple)
    with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        wanted = model(**inputs).logits
        file = Path(folder) / "model.safetensors"
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
        in_memory = torch.compile(copy.deepcopy(model), backend="memplan")
        in_memory(**inputs)
        memplan.stream_weights(model, file)
        run = torch.compile(model, backend="memplan", options={"memory_budget": budget})
        same = torch.equal(run(**inputs).logits, wanted)
        (planned,) = recent_plans()[-1:]
        before = planned.stores["disk"].traffic
        times = [(timed(lambda: in_memory(**inputs)), timed(lambda: run(**inputs))) for _ in range(repetitions)]
        after = planned.stores["disk"].traffic
        peak = sum(t.nbytes for t in inputs.values() if isinstance(t, torch.Tensor))
        peak += Meter().measure(lambda: run(**inputs)).above
    moving, waited = after.moving - before.moving, after.waited - before.waited
    return {
        "weights": total,
        "budget": budget,
        "predicted_peak": planned.timeline.peak,
        "measured_peak": peak,
        "resident_set": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "same_logits": same,
        "seconds": statistics.median(streamed[0] for _, streamed in times),
        "seconds_in_memory": statistics.median(free[0] for free, _ in times),
        "ratio": statistics.median(streamed[0] / free[0] for free, streamed in times),
        "predicted_seconds": planned.timeline.time / 1e6,
        "predicted_hidden": 1 - planned.timeline.waited / _link_seconds(planned),
        "hidden": 1 - waited / moving,
        "bytes_in": (after.bytes_in - before.bytes_in) / repetitions,
        "read_rate": (after.bytes_in - before.bytes_in) / moving,
    }


def _link_seconds(planned: Any) -> float:
    """Microseconds that the plan's transfers take on their engines."""
    tiers = {tier.name: tier for tier in planned.problem.tiers}
    sizes = [(tiers[stay.tier], planned.problem.buffers[stay.buffer].size) for stay in planned.plan.offloads]
    return sum(tier.latency + size / tier.read for tier, size in sizes) or 1.0


def table(rows: dict[str, Record]) -> str:
    """The rows as Markdown."""
    columns = ("row", "variant", "measured / budget", "bits", "time / unbudgeted", "processor", "predicted")
    lines = ["| " + " | ".join((*columns, "/ max(compute, link)", "/ better alone", "hidden")) + " |"]
    lines.append("|---|---|" + "---:|---|" + "---:|" * 6)
    for name, row in rows.items():
        if "failure" in row:
            lines.append(f"| {name} | {row['failure']} | | | | | | | | |")
        elif "weights" in row:
            share, bits = row["measured_peak"] / row["budget"], "same" if row["same_logits"] else "DIFFER"
            lines.append(
                f"| {name} | stream | {share:.3f} | {bits} | {row['ratio']:.2f} | | | | | {row['hidden']:.0%} |"
            )
        else:
            lines += [_line(name, variant, found, row) for variant, found in row["variants"].items()]
    return "\n".join(lines) + "\n"


def _line(name: str, variant: str, found: Record, row: Record) -> str:
    if "infeasible" in found:
        return f"| {name} | {variant} | infeasible, smallest {found['infeasible']} | | | | | | | |"
    bits, told = "same" if found["same_bits"] else "DIFFER", found["predicted_seconds"] / row["free_predicted"]
    better = f"{row['both_by_better']:.2f}" if variant == "both" and "both_by_better" in row else ""
    hidden = f"{1 - found['waited'] / found['moving']:.0%}" if found["moving"] else ""
    cells = [f"{found['measured_peak'] / found['budget']:.3f}", bits, f"{found['ratio']:.2f}"]
    cells += [f"{found['processor_ratio']:.2f}", f"{told:.2f}", f"{found['by_compute_or_link']:.2f}", better, hidden]
    return f"| {name} | {variant} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="*", default=["gpt2", "gpt", "resnet"], choices=list(zoo.MODELS), metavar="MODEL"
    )
    parser.add_argument("--size", default="bench", choices=["small", "bench"])
    parser.add_argument("--budgets", nargs="+", default=["50%"])
    parser.add_argument("--layers", nargs="*", type=int, default=[8], help="of the streamed models")
    parser.add_argument("--multiple", type=float, default=4.0, help="weights of a streamed model over its budget")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "tiers.json")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        kind, *rest = given.worker
        if kind == "train":
            found = training_row(rest[0], rest[1], rest[2], int(rest[3]))
        else:
            found = streaming_row(int(rest[0]), float(rest[1]), int(rest[2]))
        print(json.dumps(found))
        return
    rows: dict[str, Record] = json.loads(given.out.read_text())["rows"] if given.out.exists() else {}
    small = "-small" if given.size == "small" else ""
    repetitions = str(given.repetitions)
    jobs = {
        f"{model}{small} @ {budget}": ["train", model, given.size, budget, repetitions]
        for model in given.models
        for budget in given.budgets
    }
    jobs |= {
        f"llama of {layers} layers, weights {given.multiple:g}x": [
            "stream",
            str(layers),
            str(given.multiple),
            repetitions,
        ]
        for layers in given.layers
    }
    for name, arguments in jobs.items():
        rows[name] = measured_apart(__file__, arguments)
        given.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(table(rows))
        print("\n".join(table({name: rows[name]}).splitlines()[2:]), flush=True)


if __name__ == "__main__":
    main()

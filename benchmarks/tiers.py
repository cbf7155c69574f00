"""Slower tiers: training with activations on the disk, and inference with weights streamed from their file.

``python benchmarks/tiers.py`` measures in fresh processes under the malloc interposer and writes ``results/tiers.json``
and a Markdown table beside it. Offload rows: recomputation alone, offload alone and both, at shares of the unplanned
peak, each against the same model without a budget, bit for bit; the variants run in turns. Streaming rows: a Llama-like
model whose weights are a multiple of the budget, its logits against the eager model's.
"""

from __future__ import annotations

import argparse
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

        torch._dynamo.reset()
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
    record: Record = {"unplanned": free.planned.timeline.peak, "variants": {}}
    runs: dict[str, Training] = {}
    for name, options in VARIANTS.items():
        try:
            runs[name] = Training(model, size, {"memory_budget": budget} | options)
        except BudgetInfeasibleError as error:
            record["variants"][name] = {"infeasible": error.smallest}
    traffic = {name: _traffic(run) for name, run in runs.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("free", *runs)}
    for _ in range(repetitions):
        for name, run in (("free", free), *runs.items()):
            times[name].append(timed(run.step))
    free_wall = statistics.median(wall for wall, _ in times["free"])
    record |= {"free_seconds": free_wall, "free_predicted": free.planned.plan.time / 1e6}
    for name, run in runs.items():
        record["variants"][name] = _variant(run, free, times[name], traffic[name], repetitions)
    return record


def _variant(
    run: Training, free: Training, times: list[tuple[float, float]], before: Record, repetitions: int
) -> Record:
    planned, wall = run.planned, statistics.median(wall for wall, _ in times)
    after = _traffic(run)
    moved = {key: (after[key] - before[key]) / repetitions for key in after}
    peak = run.workload.resident_bytes() + Meter().measure(run.step).above
    found: Record = {
        "budget": planned.plan.budget,
        "predicted_peak": planned.timeline.peak,
        "measured_peak": peak,
        "same_bits": run.bits == free.bits,
        "predicted_seconds": planned.timeline.time / 1e6,
        "seconds": wall,
        "processor_seconds": statistics.median(processor for _, processor in times),
        "recomputations": planned.plan.recomputed,
        "stays": len(planned.plan.offloads),
    } | moved
    if moved["bytes_out"]:
        (tier,) = planned.problem.tiers
        out, back = moved["bytes_out"] / tier.write / 1e6, moved["bytes_in"] / tier.read / 1e6
        found["link_seconds"] = max(out, back)
        found["tier"] = {"write": tier.write * 1e6, "read": tier.read * 1e6, "latency": tier.latency / 1e6}
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
        in_memory = torch.compile(model, backend="memplan")
        in_memory(**inputs)
        free = statistics.median(timed(lambda: in_memory(**inputs))[0] for _ in range(repetitions))
        memplan.stream_weights(model, file)
        torch._dynamo.reset()
        run = torch.compile(model, backend="memplan", options={"memory_budget": budget})
        same = torch.equal(run(**inputs).logits, wanted)
        (planned,) = recent_plans()[-1:]
        before = planned.stores["disk"].traffic
        times = [timed(lambda: run(**inputs)) for _ in range(repetitions)]
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
        "seconds": statistics.median(wall for wall, _ in times),
        "seconds_in_memory": free,
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
    lines = [
        "| row | variant | measured / budget | bits | time / unbudgeted | predicted | / max(compute, link) | hidden |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        if "failure" in row:
            lines.append(f"| {name} | {row['failure']} | | | | | | |")
        elif "weights" in row:
            share, bits = row["measured_peak"] / row["budget"], "same" if row["same_logits"] else "DIFFER"
            slow = row["seconds"] / row["seconds_in_memory"]
            lines.append(f"| {name} | stream | {share:.3f} | {bits} | {slow:.2f} | | | {row['hidden']:.0%} |")
        else:
            lines += [_line(name, variant, found, row) for variant, found in row["variants"].items()]
    return "\n".join(lines) + "\n"


def _line(name: str, variant: str, found: Record, row: Record) -> str:
    if "infeasible" in found:
        return f"| {name} | {variant} | infeasible, smallest {found['infeasible']} | | | | | |"
    share, bits = found["measured_peak"] / found["budget"], "same" if found["same_bits"] else "DIFFER"
    slow, told = found["seconds"] / row["free_seconds"], found["predicted_seconds"] / row["free_predicted"]
    bar = found["seconds"] / max(row["free_seconds"], found.get("link_seconds", 0.0))
    hidden = f"{1 - found['waited'] / found['moving']:.0%}" if found["moving"] else ""
    return f"| {name} | {variant} | {share:.3f} | {bits} | {slow:.2f} | {told:.2f} | {bar:.2f} | {hidden} |"


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

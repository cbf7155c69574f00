"""A Llama with a vocabulary of 128k, its loss whole and over blocks of tokens: peak, step time, gradients.

``python benchmarks/chunked_loss.py`` writes ``results/chunked_loss.json``. All variants run in one process, in turns;
time is the processor's, so that other work on the machine weighs little. ``whole`` and ``chunked`` differ by the rewrite
alone; ``planned`` is what a user gets with ``fusion.enabled`` under a budget that the whole logits do not fit.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from environment import environment
from measure import HERE
from meter import Meter, interposed_environment
from zoo.workload import Workload, hugging_face

from memplan.backend import compile_with, recent_plans
from memplan.options import Options
from memplan.passes.chunk import ChunkLoss

Record = dict[str, Any]


def llama(vocabulary: int, tokens: int, width: int, layers: int = 2) -> Workload:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, vocabulary, (4, tokens // 4))
    return hugging_face(model, {"input_ids": ids, "labels": ids}, model.model.layers)


def variants(workload: Workload, budget: str) -> dict[str, Callable[..., torch.Tensor]]:
    """The model's forward: eager, through memplan as it is, with the loss in blocks, and as the planner decides."""

    def chunked(graph_module: Any, inputs: Any) -> Callable[..., Any]:
        rewritten = ChunkLoss().apply(graph_module)
        assert rewritten is not None
        return compile_with(rewritten, inputs, Options.resolve({}))[0]

    planned = {"fusion.enabled": True, "memory_budget": budget}
    return {
        "eager": workload.model,
        "whole": torch.compile(workload.model.forward, backend="memplan"),
        "chunked": torch.compile(workload.model.forward, backend=chunked),
        "planned": torch.compile(workload.model.forward, backend="memplan", options=planned),
    }


def measure(vocabulary: int, tokens: int, width: int, budget: str, repetitions: int) -> Record:
    """One row; runs in a process of its own, under the malloc interposer."""
    torch.set_num_threads(1)
    meter = Meter()
    workload = llama(vocabulary, tokens, width)
    rows: dict[str, Record] = {}
    steps: dict[str, Callable[[], None]] = {}
    reference: list[torch.Tensor] = []
    for name, forward in variants(workload, budget).items():

        def step(forward: Callable[..., torch.Tensor] = forward) -> None:
            forward(**workload.inputs).backward()

        before = len(recent_plans())
        step()
        gradients = [p.grad for p in workload.model.parameters()]
        rows[name] = {"error": _error(gradients, reference or gradients)}
        reference = reference or gradients
        del gradients
        _clear(workload)
        step()
        _clear(workload)
        rows[name] |= {"above": meter.measure(step).above, "cpu_s": []}
        _clear(workload)
        if len(recent_plans()) > before:
            planned = recent_plans()[-1]
            blocks = sum("blocked_loss" in op.target for op in planned.problem.ops)
            rows[name] |= {"predicted": planned.held, "budget": planned.plan.budget, "blocked_losses": blocks}
        steps[name] = step
    for _ in range(repetitions):
        for name, step in steps.items():
            rows[name]["cpu_s"].append(_seconds(step))
            _clear(workload)
    for row in rows.values():
        pairs = zip(rows["whole"]["cpu_s"], row["cpu_s"], strict=True)
        row["time_by_whole"] = statistics.median(own / whole for whole, own in pairs)
    return {
        "vocabulary": vocabulary,
        "tokens": tokens,
        "width": width,
        "resident": workload.resident_bytes(),
        "logits": vocabulary * tokens * 4,
        "variants": rows,
    }


def _clear(workload: Workload) -> None:
    workload.model.zero_grad(set_to_none=True)
    gc.collect()


def _seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def _error(gradients: list[Any], reference: list[Any]) -> float:
    """Norm of the difference by the norm, over all parameters."""
    pairs = list(zip(gradients, reference, strict=True))
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return (difference / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128 * 1024)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--budget", default="60%")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "chunked_loss.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measure(given.vocabulary, given.tokens, given.width, given.budget, given.repetitions)))
        return
    process = subprocess.run(
        [sys.executable, __file__, "--worker", *sys.argv[1:]],
        env=interposed_environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    row = json.loads(process.stdout.splitlines()[-1])
    given.out.write_text(json.dumps({"environment": environment(), "row": row}, indent=1) + "\n")
    for name, found in row["variants"].items():
        peak = (row["resident"] + found["above"]) / 1e6
        print(f"{name:8} peak {peak:7.1f} MB, time by whole {found['time_by_whole']:.3f}, error {found['error']:.1e}")


if __name__ == "__main__":
    main()

"""What a CUDA device makes of memplan, in one command and at most 8 minutes:

    python benchmarks/gpu.py [--out benchmarks/results/gpu.json] [--minutes 8]

(1) Every kernel of the tests' zoo against float64. (2) Bandwidth of regions on tensors well beyond the L2, against a
measured copy. (3) Step time and peak of a GPT: eager, torch.compile, its activation_memory_budget, a checkpoint around
every block, memplan without and with a budget. Prints Markdown tables and writes JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from environment import environment
from rivals import Contender, prepare
from tables import markdown, megabytes, ratio
from zoo import build as build_model

from memplan.codegen.eager import compile_eager
from memplan.codegen.triton_check import moved_bytes
from memplan.codegen.triton_launch import compile_triton, tuned

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "codegen"))
from reference import error, in_float64, same_kinds
from regions import LARGE, ZOO, build, region_of

Row = dict[str, Any]
_CONTENDERS = ("eager", "inductor", "inductor@0.5", "eager+blocks", "memplan", "memplan@60%", "memplan@40%")
_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; none was found")
    deadline = time.monotonic() + 60 * options.minutes
    copy = copy_bandwidth()
    report = {
        "environment": environment() | {"device": torch.cuda.get_device_name(), "copy_bytes_per_s": copy},
        "kernels": list(until(deadline - 300, correctness())),
        "bandwidth": list(until(deadline - 200, bandwidth(copy))),
        "steps": list(until(deadline, steps())),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n\n".join(tables(report)))


def until(deadline: float, rows: Iterator[Row]) -> Iterator[Row]:
    """Rows as long as there is time; what is cut off is absent from the report, not guessed."""
    for row in rows:
        yield row
        if time.monotonic() > deadline:
            return


def seconds(run: Callable[[], Any], repeat: int = 20) -> float:
    """Median device time of one run, the L2 flushed before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    run()
    times = []
    for _ in range(repeat):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second of the device's own copy, read and write together."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def correctness() -> Iterator[Row]:
    for name, case in ZOO.items():
        region, inputs = build(case, "cuda")
        compiled = compile_triton(region)
        exact, found, eager = in_float64(region, inputs), compiled(inputs), compile_eager(region)(inputs)
        yield {
            "name": name,
            "lowering": compiled.lowering,
            "error": max(error(f, e) for f, e in zip(found, exact, strict=True)),
            "eager_error": max(error(f, e) for f, e in zip(eager, exact, strict=True)),
            "finite": all(same_kinds(f, e) for f, e in zip(found, eager, strict=True)),
        }


def bandwidth(copy: float) -> Iterator[Row]:
    for name, arguments in LARGE.items():
        region = region_of(ZOO[name][0], arguments, "cuda")
        inputs = [argument.empty("cuda").zero_() for argument in arguments]
        compiled = compile_triton(region)
        taken = seconds(partial(compiled, inputs))
        plan = tuned(region)
        yield {
            "name": name,
            "bytes": region.compulsory_bytes,
            "moved": moved_bytes(region, plan),
            "seconds": taken,
            "tile": repr(plan.tile),
            "of_copy": region.compulsory_bytes / taken / copy,
        }
        del inputs
        torch.cuda.empty_cache()


def steps() -> Iterator[Row]:
    """One model for each contender, in a fresh state; a contender that fails says why."""
    for name in _CONTENDERS:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        workload = build_model("gpt", "bench")
        workload.model.cuda()
        workload.inputs.update({k: v.cuda() for k, v in workload.inputs.items()})
        torch._functorch.config.activation_memory_budget = 1.0
        run = prepare(Contender.parse(name), workload, False)
        try:
            yield {"contender": name} | measure_steps(run, workload)
        except Exception as failure:  # noqa: BLE001 - reported in its row; a rival may break in any way
            yield {"contender": name, "failure": f"{type(failure).__name__}: {failure}"[:300]}


def measure_steps(run: Callable[..., torch.Tensor], workload: Any) -> Row:
    def step() -> float:
        workload.model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        began = time.perf_counter()
        run(**workload.inputs).backward()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    times = [step() for _ in range(_STEPS)]
    return {
        "seconds": statistics.median(times),
        "max_memory_allocated": torch.cuda.max_memory_allocated(),
        "max_memory_reserved": torch.cuda.max_memory_reserved(),
        "alloc_retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }


def tables(report: Row) -> Iterator[str]:
    wrong = [r["name"] for r in report["kernels"] if r["error"] > max(1.5 * r["eager_error"], 2**-6) or not r["finite"]]
    eager = sum(r["lowering"] != "triton" for r in report["kernels"])
    yield f"{len(report['kernels'])} kernels, {eager} of them eager; wrong: {', '.join(wrong) or 'none'}"
    lines = ([r["name"], r["tile"], megabytes(r["bytes"]), ratio(r["of_copy"])] for r in report["bandwidth"])
    yield markdown(["region", "tile", "MB", "of copy"], lines)
    lines = (
        [
            r["contender"],
            r.get("failure", ""),
            f"{1e3 * r['seconds']:.2f}" if "seconds" in r else "",
            megabytes(r.get("max_memory_allocated")),
        ]
        for r in report["steps"]
    )
    yield markdown(["contender", "note", "ms", "peak MB"], lines)


if __name__ == "__main__":
    main()

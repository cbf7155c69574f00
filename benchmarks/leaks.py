"""Thousands of training steps with changing shapes and budgets: does anything grow?

``python benchmarks/leaks.py [--steps 10000] [--json OUT]``. A small model runs under two budgets, each step with one of three
batch sizes, and is compiled anew every REBUILD steps. Counted at the same point of every round: bytes of all live
tensors, file descriptors, threads, remembered plans. Growth is what the last round holds above the one
at which the caches have filled.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

import memplan

REBUILD = 30  # steps between two compilations
SETTLED = 16  # rounds until the backend remembers as many models as it ever does (32, two a round)
BATCHES = (8, 16, 12)
BUDGETS = ("100%", "1MiB")
OPTIONS = {"runtime_estimator": "analytic", "solver_work": 0.01}


def watch(steps: int) -> list[dict[str, int]]:
    """What is held after each round of REBUILD steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16))
    rounds = []
    for _ in range(max(1, steps // REBUILD)):
        torch._dynamo.reset()
        runs = [
            torch.compile(model, backend="memplan", dynamic=False, options=OPTIONS | {"memory_budget": budget})
            for budget in BUDGETS
        ]
        for step in range(REBUILD):
            model.zero_grad(set_to_none=True)
            x = torch.randn(BATCHES[step % len(BATCHES)], 16)
            runs[step % len(runs)](x).square().mean().backward()
        model.zero_grad(set_to_none=True)
        del runs, x
        rounds.append(held())
    return rounds


def held() -> dict[str, int]:
    torch._dynamo.reset()
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if type(t) in PLAIN}
    return {
        "live_bytes": sum(storages.values()),
        "file_descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "plans": len(memplan.recent_plans()),
    }


PLAIN = (torch.Tensor, nn.Parameter)


def main() -> None:
    from environment import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "leaks.json")
    arguments = parser.parse_args()
    rounds = watch(arguments.steps)
    growth = {key: rounds[-1][key] - rounds[min(SETTLED, len(rounds) - 1)][key] for key in rounds[0]}
    result: dict[str, Any] = {
        "environment": environment(),
        "steps": arguments.steps,
        "growth": growth,
        "rounds": rounds,
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(growth))


if __name__ == "__main__":
    main()

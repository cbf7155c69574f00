"""Share of the bytes between matrix products that fused regions take over, model by model.

``python benchmarks/coverage.py`` plans each model without a budget, over fake tensors, asks the fusion solver for
regions and writes ``results/coverage.json``: regions, bytes moved by ops other than products, the bytes of those inside
regions, of single ops that have nothing to fuse with, of ops that stay apart though they have, and of what no region
may hold, by op. No kernel is compiled; the figures do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import zoo
from environment import environment
from measure import HERE

from memplan.backend import compile_with
from memplan.options import Options
from memplan.passes.coverage import Coverage, coverage

MODELS = ("gpt", "gpt2", "bert", "llama", "t5", "vit")


def measured(model: str, size: str, dropout: bool) -> Coverage:
    """The coverage of the model's training step."""
    found: list[Coverage] = []

    def backend(graph_module: Any, inputs: Any) -> Any:
        run, planned = compile_with(graph_module, inputs, Options.resolve({"runtime_estimator": "analytic"}))
        if planned is not None:
            found.append(coverage(planned.scheduled, planned.problem))
        return run

    torch._dynamo.reset()
    workload = zoo.build(model, size, dropout)  # type: ignore[arg-type]
    torch.compile(workload.model, backend=backend)(**workload.inputs)
    return max(found, key=lambda c: c.total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(zoo.MODELS), metavar="MODEL")
    parser.add_argument("--size", default="bench", choices=["small", "bench"])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "coverage.json")
    given = parser.parse_args()
    rows: dict[str, Any] = {}
    for model in given.models:
        for dropout in (False, True) if zoo.MODELS[model].has_dropout else (False,):
            found = measured(model, given.size, dropout)
            name = model + "+dropout" * dropout
            rows[name] = asdict(found) | {"fused_share": found.fused_share, "share": found.share}
            print(f"{name:14} {found.regions:4} regions, {found.fused_share:6.1%}, with single ops {found.share:.1%}")
            for title, ops in (("single", found.single), ("apart", found.apart), ("left out", found.left_out)):
                shares = ", ".join(f"{op} {size / found.total:.1%}" for op, size in list(ops.items())[:4])
                print(f"{'':14} {title}: {shares}")
    given.out.write_text(json.dumps({"environment": environment(), "size": given.size, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Placement of real models: the storages of one training step of the zoo, as recorded and planned at half the memory.

``python benchmarks/solvers.py --only zoo --data DIR`` prints the table. The planning itself is not timed here; what a
placement may take is WORK. The bound is the largest sum of living bytes, which no placement can go below.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zoo

import memplan
from memplan.errors import MemplanError
from memplan.outcome import Limits
from memplan.place import place
from memplan.program import Program

WORK = 0.2  # at most about two seconds
EFFORT = 0.1  # of the planner; how good its plan is does not matter to the placement
BUDGETS = (None, "50%")


def rows(_: Path) -> Iterator[dict[str, Any]]:
    """One row a model and budget."""
    for name in zoo.FIRST:
        workload = zoo.build(name, "small")
        for budget in BUDGETS:
            row = {"instance": f"{name}, {'unplanned' if budget is None else f'planned at {budget}'}"}
            try:
                found = memplan.analyze(workload.model, (), workload.inputs, memory_budget=budget, effort=EFFORT)
            except MemplanError as error:
                yield row | {"status": f"{type(error).__name__}: no plan to place"}
                continue
            yield row | _place(found.program)


def _place(program: Program) -> dict[str, Any]:
    started = time.process_time()
    layout = place(program, {}, 0, Limits(work=WORK))
    return {
        "storages": len(layout.offsets),
        "load": layout.load,
        "height": layout.height,
        "over load %": round(100 * layout.fragmentation, 4),
        "status": "optimal" if layout.height == layout.load else "feasible",
        "CPU seconds": round(time.process_time() - started, 3),
    }

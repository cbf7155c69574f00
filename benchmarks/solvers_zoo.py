"""Placement of real models: the storages of one training step of the zoo, as recorded and as planned at half its peak,
or at the smallest budget found where the parameters alone take more than that.

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
from memplan.analysis import Analysis
from memplan.errors import BudgetInfeasibleError
from memplan.outcome import Limits
from memplan.place import place
from memplan.program import Program

WORK = 0.2  # at most about two seconds
EFFORT = 0.1  # of the planner; how good its plan is does not matter to the placement


def rows(_: Path) -> Iterator[dict[str, Any]]:
    """Two rows a model: unplanned and planned."""
    for name in zoo.FIRST:
        workload = zoo.build(name, "small")
        try:
            found, label = _analyze(workload, "50%"), "planned at 50 %"
        except BudgetInfeasibleError as error:
            if error.smallest is None:
                yield {"instance": name, "status": "no plan to place"}
                continue
            found, label = _analyze(workload, error.smallest), "planned at its smallest"
        if found.unplanned is not None:
            yield {"instance": f"{name}, unplanned"} | _place(found.unplanned)
        yield {"instance": f"{name}, {label}"} | _place(found.program)


def _analyze(workload: zoo.Workload, budget: int | str) -> Analysis:
    return memplan.analyze(workload.model, (), workload.inputs, memory_budget=budget, effort=EFFORT)


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

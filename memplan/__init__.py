"""memplan: keep a PyTorch step inside a number of bytes, at the least slowdown a solver can find.

Names load on first use, so that importing memplan, the solvers or the command line does not import torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Problem": "memplan.problem",
    "Plan": "memplan.plans",
    "Program": "memplan.program",
    "plan": "memplan.api",
    "compile_step": "memplan.step",
    "analyze": "memplan.api",
    "recent_plans": "memplan.backend",
    "record": "memplan.record",
    "stream_weights": "memplan.stream",
    "enable_inductor": "memplan.inductor",
    "MemplanError": "memplan.errors",
    "BudgetInfeasibleError": "memplan.errors",
}

__all__ = [
    "BudgetInfeasibleError",
    "MemplanError",
    "Plan",
    "Problem",
    "Program",
    "__version__",
    "analyze",
    "compile_step",
    "enable_inductor",
    "plan",
    "recent_plans",
    "record",
    "stream_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'memplan' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

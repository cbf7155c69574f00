"""Recomputation: which ops run again and when, so that a step stays within a budget at the least time."""

from memplan.solvers.recompute.bound import peak_bound, recompute_bound
from memplan.solvers.recompute.search import frontier, minimise_peak, solve_recompute

__all__ = ["frontier", "minimise_peak", "peak_bound", "recompute_bound", "solve_recompute"]

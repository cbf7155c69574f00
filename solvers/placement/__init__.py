"""Placement: offsets for buffers that share an arena. Needs no torch."""

from memplan.solvers.placement.portfolio import solve_placement
from memplan.solvers.placement.problem import Placement, PlacementProblem, check_placement, read_csv, write_csv

__all__ = ["Placement", "PlacementProblem", "check_placement", "read_csv", "solve_placement", "write_csv"]

"""Recomputation: which ops run again and when, so that a step stays within a budget at the least time.

``state`` holds a sequence of runs and edits of it, ``moves`` makes the edits, ``weigh`` tells what one costs, ``anneal``
accepts them; all four are compiled, and run as plain Python to the same sequence. ``evict`` and ``lowest`` seek the
least peak. ``melt`` adds recomputation that fused regions make free. ``presence`` bounds the time for the stored order
by small integer programs, whose solutions start the search, and ``orderless`` for any order; ``bound`` and ``reach``
bound the peak. ``search`` is a search's state, ``solve`` puts all together; ``exact`` is the reference that tests and
benchmarks compare with.
"""

from memplan.solvers.recompute.bound import peak_bound, recompute_bound
from memplan.solvers.recompute.exact import solve_exact
from memplan.solvers.recompute.lowest import minimise_peak
from memplan.solvers.recompute.melt import melted
from memplan.solvers.recompute.reach import proves_infeasible
from memplan.solvers.recompute.solve import frontier, solve_recompute

__all__ = [
    "frontier",
    "melted",
    "minimise_peak",
    "peak_bound",
    "proves_infeasible",
    "recompute_bound",
    "solve_exact",
    "solve_recompute",
]

"""Offload beside recomputation: what is sent to a slower tier and when, and what runs again instead.

``engines`` replays a sequence with its offloads: gaps between uses, loads, and the tiers' engines; ``moves`` edits it,
``anneal`` accepts the edits; all three are compiled, and run as plain Python to the same plan. ``bound`` holds the
lower bounds, ``solve`` puts them together.
"""

from memplan.solvers.offload.bound import offload_peak_bound, streamed
from memplan.solvers.offload.solve import solve_offload

__all__ = ["offload_peak_bound", "solve_offload", "streamed"]

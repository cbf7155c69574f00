"""A bound on time that holds for every order of the first runs: the presence program along a chain of the precedences.

Where op u must run before op v in every sequence, the budget at the first run of u and at the first run of v bind the
same plan. Which of the other ops have run by then is left to the program. In training graphs nearly all ops stand in one
chain, and the bound is as good as that for the stored order; in graphs that leave the order free it is weaker.
"""

from __future__ import annotations

import time as clock

from memplan.problem import Phase, Problem
from memplan.solvers.recompute.presence import LARGE, presence

COUNTS = (1, 4, 16)  # positions of the programs, one program after the other
LARGEST = 40_000  # columns of a program
WORK = 0.5  # for all programs together, in CP-SAT's deterministic seconds
SECONDS = 2.0  # for one program by HiGHS; what it has proven by then counts, and no plan depends on it
MOST_OPS = 5_000  # with more, the precedences alone take over a second


def any_order(problem: Problem) -> list[int]:
    """For each op, as bits, the ops whose first run comes no later than its own in every sequence."""
    early = 0  # runs before backward begins
    before: list[int] = []
    made = {problem.writer[b] for b in problem.forward_outputs}
    for i, op in enumerate(problem.ops):
        bits = 1 << i
        for j in (*(problem.writer[b] for b in problem.operands[i]), *op.after, *op.after_all):
            bits |= before[j]
        if op.phase != Phase.FORWARD:
            bits |= early
        elif i in made or op.once:
            early |= bits
        before.append(bits)
    return before


def any_order_bound(
    problem: Problem, budget: int, goal: float, deadline: float = float("inf"), work: float = WORK
) -> float:
    """Time that no plan under ``budget`` bytes can go below, whatever its order; inf: there is none.

    ``goal``: the time of a plan; the programs end once they reach it. ``deadline``: of time.monotonic();
    ``work``: of all programs, in CP-SAT's deterministic seconds.
    """
    bound = problem.total_time
    if len(problem.ops) > MOST_OPS:
        return bound
    before = any_order(problem)
    loads = _forced(problem, before)
    chain = _heaviest_chain(before, loads, budget // 2)
    left = work
    for count in COUNTS:
        parts = [chain[len(chain) * k // count : len(chain) * (k + 1) // count] for k in range(count)]
        at = [max(part, key=lambda t: loads[t]) for part in parts if part]
        columns = (len(problem.buffers) + 2 * len(problem.ops)) * (len(at) + 1)
        seconds = min(deadline - clock.monotonic(), SECONDS if len(problem.ops) > LARGE else float("inf"))
        if not at or columns > LARGEST or min(seconds, left) <= 0 or bound >= goal * (1 - 1e-9):
            break
        found = presence(problem, budget, at, work=left, seconds=seconds, before=before)
        bound, left = max(bound, found.bound), left - found.work
        if len(at) == len(chain):
            break
    return bound


def _forced(problem: Problem, before: list[int]) -> list[int]:
    """For each op, resident bytes included, what some order must hold at its first run unless it runs ops again."""
    ops, size, writer = problem.ops, [b.size for b in problem.buffers], problem.writer
    loads = [op.workspace + problem.resident_bytes + sum(size[b] for b in op.writes) for op in ops]
    outputs = set(problem.outputs)
    for b, w in enumerate(writer):
        if w < 0:
            continue
        through = 0  # ops that come no later than a reader
        for r in problem.readers[b]:
            through |= before[r]
        for v in range(w + 1, len(ops)):
            if before[v] >> w & 1 and (b in outputs or through >> v & 1):
                loads[v] += size[b]
    return loads


def _heaviest_chain(before: list[int], loads: list[int], floor: int) -> list[int]:
    """The ops, each before the next in every sequence, with the largest sum of squared bytes over ``floor``."""
    weight = [float(max(0, load - floor)) ** 2 for load in loads]
    heavy = [v for v, w in enumerate(weight) if w > 0]
    best, previous = dict[int, float](), dict[int, int]()
    for v in heavy:
        u = max((u for u in best if before[v] >> u & 1), key=lambda u: best[u], default=-1)
        best[v], previous[v] = weight[v] + best.get(u, 0.0), u
    at = max(best, key=lambda v: best[v], default=-1)
    chain = []
    while at >= 0:
        chain.append(at)
        at = previous[at]
    return chain[::-1]

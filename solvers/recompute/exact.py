"""The exact reference for small graphs: Checkmate's mixed integer program, solved by HiGHS.

Jain et al., "Checkmate: Breaking the memory wall with optimal tensor rematerialization" (MLSys 2020), section 4, with
storages in place of values, workspaces, outputs and ops that run once. Stage t ends with the first run of op t; before
it any earlier op may run again, once, in stored order. Scope: first runs in stored order, at most one run of an op a
stage, and no second run of an op that makes a forward output once backward has begun.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from memplan.errors import UnsupportedError
from memplan.outcome import Limits, Status
from memplan.plans import Plan
from memplan.problem import Phase, Problem
from memplan.solvers.recompute.bound import peak_bound
from memplan.validate import check_sequence

LARGEST = 60  # ops; the program has about n^3 / 2 variables, HiGHS needs minutes beyond
DEFAULT = Limits()
STATUS = {0: Status.OPTIMAL, 1: Status.TIMED_OUT, 2: Status.INFEASIBLE, 3: Status.FAILED, 4: Status.FAILED}


class Program:
    """Variables by name and sparse rows of ``row @ x <= limit``."""

    def __init__(self) -> None:
        self.index: dict[tuple[str, int, int, int], int] = {}
        self.cost: list[float] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self.whole: list[int] = []
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []
        self.limits: list[float] = []

    def add(self, name: tuple[str, int, int, int], cost: float = 0.0, low: float = 0.0, whole: bool = True) -> None:
        """A variable in [low, 1]."""
        self.index[name] = len(self.cost)
        self.cost.append(cost)
        self.low.append(low)
        self.high.append(1.0)
        self.whole.append(int(whole))

    def costs(self) -> list[tuple[tuple[str, int, int, int], float]]:
        """The variables that cost something."""
        return [(name, self.cost[column]) for name, column in self.index.items() if self.cost[column]]

    def at_most(self, limit: float, *terms: tuple[float, tuple[str, int, int, int]]) -> None:
        """Σ factor · variable ≤ limit; variables that do not exist are 0."""
        for factor, name in terms:
            if name in self.index:
                self.rows.append(len(self.limits))
                self.columns.append(self.index[name])
                self.values.append(factor)
        self.limits.append(limit)

    def solve(self, seconds: float | None) -> tuple[Status, np.ndarray | None]:
        """Status and values."""
        shape = (len(self.limits), len(self.cost))
        matrix = coo_array((self.values, (self.rows, self.columns)), shape=shape).tocsr()
        options = {"mip_rel_gap": 0.0} | ({} if seconds is None else {"time_limit": seconds})
        result = milp(
            np.array(self.cost),
            constraints=LinearConstraint(matrix, -np.inf, np.array(self.limits)),
            integrality=np.array(self.whole),
            bounds=Bounds(np.array(self.low), np.array(self.high)),
            options=options,
        )
        return STATUS[result.status], result.x


def solve_exact(problem: Problem, budget: int, *, limits: Limits = DEFAULT, below: float | None = None) -> Plan:
    """The fastest plan of Checkmate's form under ``budget`` bytes, resident buffers included.

    ``below``: only plans faster than this time by a millionth count, which is proven sooner than an optimum. Raises
    UnsupportedError beyond LARGEST ops. INFEASIBLE is within the scope stated above.
    """
    n = len(problem.ops)
    if n > LARGEST:
        raise UnsupportedError(f"the exact reference takes at most {LARGEST} ops; this graph has {n}")
    program = _program(problem, budget - problem.resident_bytes)
    if below is not None:
        unit = max(below, 1e-9)
        program.at_most(1 - 1e-6, *((cost / unit, name) for name, cost in program.costs()))
    status, x = program.solve(limits.seconds)
    if x is None:
        sequence = tuple(range(n))
    else:
        runs = [(t, i) for t in range(n) for i in range(t + 1)]
        sequence = tuple(i for t, i in runs if x[program.index["R", t, i, 0]] > 0.5)
    peak, time = check_sequence(problem, sequence)
    unplanned_peak, unplanned_time = check_sequence(problem, tuple(range(n)))
    return Plan(
        sequence=sequence,
        budget=budget if x is not None else None,
        peak=peak,
        time=time,
        bound=time if status == Status.OPTIMAL else problem.total_time,
        peak_bound=peak_bound(problem),
        status=Status.FEASIBLE if status == Status.TIMED_OUT and x is not None else status,
        solver="recompute: Checkmate's program by HiGHS",
        unplanned_peak=unplanned_peak,
        unplanned_time=unplanned_time,
    )


def _program(problem: Problem, room: int) -> Program:
    """R[t, i]: op i runs in stage t. S[t, b]: b is held into stage t. F[t, b, k]: b is freed after op k in stage t."""
    ops, n, size = problem.ops, len(problem.ops), [b.size for b in problem.buffers]
    writer, readers = problem.writer, problem.readers
    begin = next((t for t, op in enumerate(ops) if op.phase != Phase.FORWARD), n)
    held = {b for b in problem.forward_outputs if writer[b] >= 0 and begin < n}
    made_by_op = [b for b in range(len(size)) if writer[b] >= 0]
    until = [min((u for u, op in enumerate(ops) if i in op.after_all), default=n) for i in range(n)]
    p = Program()
    unit = max(1, room)
    for t in range(n):
        for i in range(t + 1):
            fixed = t >= begin and any(b in held for b in ops[i].writes)
            if i == t or not (ops[i].once or fixed or t > until[i]):
                p.add(("R", t, i, 0), ops[i].time, float(i == t))
            else:
                p.add(("R", t, i, 0))
                p.high[-1] = 0.0
    for t in range(1, n + 1):
        for b in made_by_op:
            if writer[b] < t:
                forced = (t == n and b in problem.outputs) or (b in held and t >= begin)
                p.add(("S", t, b, 0), low=float(forced))
    for t in range(n):
        for b in made_by_op:
            for k in (writer[b], *readers[b]):
                if k <= t:
                    p.add(("F", t, b, k), whole=False)
    for t in range(n):
        for b in made_by_op:
            if writer[b] <= t:
                run = ("R", t, writer[b], 0)
                p.at_most(0, (1, ("S", t + 1, b, 0)), (-1, ("S", t, b, 0)), (-1, run))
                p.at_most(1, (1, ("S", t, b, 0)), (1, run))
                uses = [k for k in (writer[b], *readers[b]) if k <= t]
                for at, k in enumerate(uses):
                    free = ("F", t, b, k)
                    p.at_most(0, (1, free), (-1, ("R", t, k, 0)))
                    p.at_most(1, (1, free), (1, ("S", t + 1, b, 0)))
                    for later in uses[at + 1 :]:
                        p.at_most(1, (1, free), (1, ("R", t, later, 0)))
                    if at:
                        p.at_most(0, (1, ("R", t, k, 0)), (-1, ("S", t, b, 0)), (-1, run))
        load = [(size[b] / unit, ("S", t, b, 0)) for b in made_by_op]
        for k in range(t + 1):
            load += [(size[b] / unit, ("R", t, k, 0)) for b in ops[k].writes]
            p.at_most(room / unit, *load, (ops[k].workspace / unit, ("R", t, k, 0)))
            load += [(-size[b] / unit, ("F", t, b, k)) for b in (*problem.operands[k], *ops[k].writes)]
    return p

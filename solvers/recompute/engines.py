"""The engines that solve a presence program: CP-SAT for small graphs, HiGHS for large ones.

CP-SAT is ahead where a program is hard, and its limit counts work, so that plans do not depend on what else the machine
runs. HiGHS is ahead where hundreds of equal layers make the relaxation to fractions nearly whole.
"""

from __future__ import annotations

import time as clock
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

COST = 1e10  # the time of one step, in a program's whole units
NODES = 30  # that HiGHS may branch: most of the proof is there at the root


class Rows:
    """Variables that are 0 or 1, by column, and rows ``Σ factor · variable ≤ limit`` in whole numbers."""

    def __init__(self) -> None:
        self.free = set[int]()  # columns that may be either; all others are fixed
        self.ones = set[int]()
        self.cost = dict[int, int]()
        self.rows: list[tuple[int, list[tuple[int, int]]]] = []

    def reduced(self) -> tuple[list[int], list[tuple[int, list[tuple[int, int]]]]]:
        """The columns to decide on, and the rows over their places among them."""
        columns = sorted(self.free - self.ones)
        place = {column: at for at, column in enumerate(columns)}
        rows = []
        for limit, terms in self.rows:
            limit -= sum(factor for factor, column in terms if column in self.ones)
            kept = [(factor, place[column]) for factor, column in terms if column in place]
            if kept or limit < 0:
                rows.append((limit, kept))
        return columns, rows


@dataclass(frozen=True)
class Answer:
    """What an engine proved and found."""

    bound: float  # on the cost; inf: there is no solution
    chosen: frozenset[int] | None  # columns that are 1; None without a solution that would be found again
    work: float = 0.0  # that it took, in CP-SAT's deterministic seconds


def by_cp_sat(given: Rows, work: float, seconds: float, tolerance: float) -> Answer:
    """``work``: in CP-SAT's deterministic seconds; ``seconds``: wall clock; ``tolerance``: relative."""
    columns, rows = given.reduced()
    model = cp_model.CpModel()
    variables = [model.new_bool_var("") for _ in columns]
    for limit, terms in rows:
        model.add(_sum([(factor, variables[at]) for factor, at in terms]) <= limit)
    model.minimize(_sum([(given.cost.get(column, 0), variables[at]) for at, column in enumerate(columns)]))
    engine = cp_model.CpSolver()
    engine.parameters.num_workers = 1
    engine.parameters.catch_sigint_signal = False  # Ctrl-C is for the caller
    engine.parameters.linearization_level = 2
    engine.parameters.relative_gap_limit = tolerance
    engine.parameters.max_deterministic_time = work
    if seconds < np.inf:
        engine.parameters.max_time_in_seconds = max(0.01, seconds)
    status = engine.solve(model)
    spent = engine.response_proto.deterministic_time
    if status == cp_model.INFEASIBLE:
        return Answer(np.inf, None, spent)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE) or engine.wall_time >= seconds:
        return Answer(max(0.0, engine.best_objective_bound), None, spent)
    chosen = (column for column, variable in zip(columns, variables, strict=True) if engine.value(variable))
    return Answer(max(0.0, engine.best_objective_bound), frozenset(chosen) | given.ones, spent)


def _sum(terms: list[tuple[int, cp_model.IntVar]]) -> cp_model.LinearExprT:
    return cp_model.LinearExpr.weighted_sum([variable for _, variable in terms], [factor for factor, _ in terms])


def by_highs(given: Rows, seconds: float, tolerance: float) -> Answer:
    """``seconds``: wall clock, a solution that this cuts off is not used; ``tolerance``: relative."""
    columns, rows = given.reduced()
    values, places, starts, limits = list[float](), list[int](), [0], list[float]()
    for limit, terms in rows:
        unit = max((abs(factor) for factor, _ in terms), default=1)  # bytes: HiGHS's tolerance is one of small numbers
        values += [factor / unit for factor, _ in terms]
        places += [at for _, at in terms]
        starts.append(len(places))
        limits.append(limit / unit)
    matrix = csr_array((values, places, starts), shape=(len(rows), len(columns)))
    matrix.sum_duplicates()
    began = clock.monotonic()
    result = milp(
        np.array([given.cost.get(column, 0) / COST for column in columns]),
        constraints=LinearConstraint(matrix, -np.inf, np.array(limits)),
        bounds=Bounds(0, 1),
        integrality=np.ones(len(columns)),
        options={"time_limit": max(0.01, seconds), "node_limit": NODES, "mip_rel_gap": tolerance},
    )
    if result.status == 2:
        return Answer(np.inf, None)
    # 1e-6: the tolerance to which HiGHS keeps constraints.
    bound = 0.0 if result.mip_dual_bound is None else max(0.0, float(result.mip_dual_bound)) * (1 - 1e-6) * COST
    if result.x is None or (result.status == 1 and clock.monotonic() - began >= seconds):
        return Answer(bound, None)
    return Answer(bound, frozenset(c for c, value in zip(columns, result.x, strict=True) if value > 0.5) | given.ones)

"""Dynamic storage allocation: offsets for buffers of known size and lifetime, in an arena as small as possible.

The portfolio, cheapest first, ends where a height meets the bound: reduction to components in units; constructive
fits in several orders; branch and bound with restarts, first at the bound itself, then at heights between the bound
and the best one known, with limits that double from sweep to sweep, until every height below the best is refuted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from memplan.outcome import Limits, Status
from memplan.solvers.placement import branch
from memplan.solvers.placement.component import Component, Ints, Reduced, reduce_problem
from memplan.solvers.placement.exact import BASES, Ranking, Search, ranks
from memplan.solvers.placement.fit import fit_in_order, fit_in_time
from memplan.solvers.placement.problem import Placement, PlacementProblem

DEFAULT_WORK = 1_500_000_000  # elementary steps at work = 1; about 1e8 of them a second on one core of 2.5 GHz
SLICE = 4_000_000  # elementary steps between two looks at the clock: some 50 ms
FIRST_FAILS = 500  # failed nodes of one search in the first sweep; ten times what most public instances need
RESOLUTION = 2000  # heights closer than best / RESOLUTION are not told apart by a sweep


class Effort:
    """What is left of the limits; ``spent`` is true once a solve must end."""

    def __init__(self, limits: Limits) -> None:
        self.deadline = limits.deadline()
        self.work = limits.work * DEFAULT_WORK
        self.progress = limits.progress
        self.next_line = time.monotonic() + 1.0

    @property
    def spent(self) -> bool:
        return self.work <= 0 or time.monotonic() >= self.deadline

    def use(self, work: float) -> None:
        self.work -= work

    def report(self, height: int, bound: int) -> None:
        """At most one progress line a second."""
        now = time.monotonic()
        if self.progress is not None and now >= self.next_line:
            self.next_line = now + 1.0
            self.progress(f"placement: height {height}, bound {bound}, {max(0.0, self.work) / DEFAULT_WORK:.2f} left")


class Task:
    """One component on its way to a placement: the best offsets and the proven bound, both in units."""

    def __init__(self, component: Component, seed: int) -> None:
        self.component = component
        self.bound = component.bound
        self.height = int(component.size.sum())
        self.off: Ints = np.cumsum(component.size) - component.size
        self.solver = "stack"
        self.rng = np.random.default_rng(seed)
        self.weight = np.zeros(component.sections)
        self.search: Search | None = None

    def offer(self, height: int, off: Ints, solver: str) -> None:
        """Keep offsets that are lower than the best."""
        if height < self.height:
            self.height, self.off, self.solver = height, off.copy(), solver

    def fit(self, goal: int, effort: Effort) -> None:
        """Constructive fits until one reaches the goal; the first is linear and always runs."""
        c, n = self.component, len(self.component)
        off = np.zeros(n, np.int64)
        by_start = np.lexsort((-c.size, c.hi, c.lo))
        self.offer(fit_in_time(by_start, c.lo, c.hi, c.size, off, np.zeros(n + 1, np.int64)), off, "fit in time")
        where, ends = np.zeros((n, 3), np.int64), np.zeros(n, np.int64)
        for name, order in fit_orders(c):
            for best in (False, True):
                if self.height <= goal or effort.spent:
                    return
                height = fit_in_order(order, best, self.height - 1, c.lo, c.hi, c.size, off, where, ends)
                effort.use(n * n / 4)
                self.offer(height, off, f"{'best' if best else 'first'} fit by {name}")

    def attempt(self, goal: int, late: Ints, fails: int, round_: int, effort: Effort) -> int:
        """One search of branch and bound for a height of at most ``goal``: SOLVED, REFUTED or PAUSED."""
        if self.search is None:
            self.search = Search(self.component)
        search = self.search
        search.begin(goal, late, ranks(self.component, ranking(round_), self.weight, self.rng))
        outcome = branch.PAUSED
        while outcome == branch.PAUSED and search.fails < fails and not effort.spent:
            before = search.work
            outcome = search.advance(SLICE, fails)
            effort.use(search.work - before)
            effort.report(self.height, self.bound)
        if outcome == branch.SOLVED:
            self.offer(int((search.off + self.component.size).max()), search.off, "branch and bound")
        elif outcome == branch.REFUTED and not search.complete:
            outcome = branch.PAUSED
        self.weight = 0.8 * self.weight + search.weight / max(1.0, search.weight.sum())
        return outcome


def fit_orders(c: Component) -> Iterator[tuple[str, Ints]]:
    """Orders for ``fit_in_order``, the best on average first."""
    yield "size and lifetime", np.lexsort((-c.length, -(np.sqrt(c.length) * c.size)))
    yield "size", np.lexsort((-c.length, -c.size))
    yield "width", np.lexsort((-c.size, -(c.hi - c.lo)))
    yield "area", np.lexsort((-c.length, -(c.size * c.length)))
    yield "start", np.lexsort((-c.size, c.lo))


def ranking(round_: int) -> Ranking:
    """The ranking of a round: every base once as it is, then with what was learned and noise in turn."""
    sweep, base = divmod(round_, len(BASES))
    if sweep == 0:
        return Ranking(BASES[base])
    return Ranking(BASES[base], (0.3, 1.0)[sweep % 2], (0.03, 0.2)[sweep // 2 % 2])


def minimise(task: Task, goal: int, effort: Effort) -> None:
    """Lower the height of a component to ``goal`` (at least its bound) or to its optimum, as far as effort lasts."""
    c = task.component
    fails, round_ = FIRST_FAILS, 0
    while task.height > max(goal, task.bound) and not effort.spent:
        failed = max(goal, task.bound) - 1  # heights up to here are out of reach in this sweep
        while task.height - failed > 1 + task.height // RESOLUTION and not effort.spent:
            wanted = max(goal, task.bound) if failed < max(goal, task.bound) else (failed + task.height) // 2
            for _ in range(len(BASES)):
                outcome = task.attempt(wanted, wanted - c.size, fails, round_, effort)
                round_ += 1
                if outcome == branch.REFUTED and task.search is not None:
                    task.bound = max(task.bound, min(task.search.next_height, task.height))
                if outcome != branch.PAUSED or effort.spent:
                    break
            if outcome != branch.SOLVED:
                failed = max(wanted, task.bound - 1)
        fails *= 2


def decide(task: Task, capacity: int, late: Ints, effort: Effort) -> bool | None:
    """Is there a placement of the component within ``late`` offsets? True, False (proven) or None (effort spent)."""
    if task.bound > capacity:
        return False
    fails, round_ = float(FIRST_FAILS), 0
    while not effort.spent:
        outcome = task.attempt(capacity, late, int(fails), round_, effort)
        if outcome != branch.PAUSED:
            return outcome == branch.SOLVED
        round_ += 1
        fails *= 1.0 if round_ < len(BASES) else 1.03
    return None


def solve_placement(
    problem: PlacementProblem, *, capacity: int | None = None, limits: Limits | None = None
) -> Placement:
    """Offsets for every buffer, as low an arena as the limits allow; with a capacity, any that is within it.

    Without a capacity the status is OPTIMAL or FEASIBLE. With one it is FEASIBLE or OPTIMAL when the height is within
    it, INFEASIBLE when it is proven that none is, else TIMED_OUT; the last two still give the best offsets found.
    ``limits.seconds`` and Ctrl-C end the improvement, not the answer: a first placement always comes. One unit of
    ``limits.work`` is about 15 seconds of one core.
    """
    effort = Effort(limits or Limits())
    reduced = reduce_problem(problem)
    tasks = [Task(c, (limits or Limits()).seed + k) for k, c in enumerate(reduced.components)]
    tasks.sort(key=lambda task: -task.bound)
    floor = -(-reduced.bound // reduced.unit)
    refuted = False
    try:
        for task in tasks:
            task.fit(floor if capacity is None else max(floor, capacity // reduced.unit), effort)
        if capacity is None:
            for task in sorted(tasks, key=lambda task: -task.height):
                floor = max(floor, task.bound)
                minimise(task, floor, effort)
        else:
            refuted = not _all_within(problem, reduced, tasks, capacity, effort)
    except KeyboardInterrupt:
        pass  # the best placement so far is the answer
    return _placement(problem, reduced, tasks, capacity, refuted)


def _all_within(problem: PlacementProblem, reduced: Reduced, tasks: list[Task], capacity: int, effort: Effort) -> bool:
    """False only if it is proven that some component does not fit."""
    if reduced.bound > capacity:
        return False
    for task in tasks:
        if _height(problem, reduced, task) <= capacity:
            continue
        true_size = np.array([problem.size[i] for i in task.component.index], np.int64)
        # The top buffer needs no padding: offsets up to capacity − size, though the arena be no multiple of the unit.
        late = (capacity - true_size) // reduced.unit
        if decide(task, -(-capacity // reduced.unit), late, effort) is False:
            return False
    return True


def _height(problem: PlacementProblem, reduced: Reduced, task: Task) -> int:
    """Bytes that a component's best offsets take."""
    return max(int(o) * reduced.unit + problem.size[i] for o, i in zip(task.off, task.component.index, strict=True))


def _placement(
    problem: PlacementProblem, reduced: Reduced, tasks: list[Task], capacity: int | None, refuted: bool
) -> Placement:
    """Put the components together and say how the solve ended."""
    offsets = [0] * len(problem)
    for task in tasks:
        for o, i in zip(task.off, task.component.index, strict=True):
            offsets[i] = int(o) * reduced.unit
    height = max((o + s for o, s in zip(offsets, problem.size, strict=True)), default=0)
    proven = max((task.bound for task in tasks if task.bound > task.component.bound), default=0)
    pad = problem.alignment - 1  # of the top buffer, which a bound in units counts and the height does not
    bound = max(reduced.bound, proven * reduced.unit - pad)
    if capacity is not None and refuted:
        bound = max(bound, capacity + 1)
        status = Status.INFEASIBLE
    elif height <= bound:
        status = Status.OPTIMAL
    elif capacity is not None and height > capacity:
        status = Status.TIMED_OUT
    else:
        status = Status.FEASIBLE
    solvers = sorted({task.solver for task in tasks})
    return Placement(tuple(offsets), height, bound, status, ", ".join(solvers))

"""Dynamic storage allocation: offsets for buffers of known size and lifetime, in an arena as small as possible.

The portfolio, cheapest first, ends where a height meets the bound: reduction to components in units; constructive
fits in several orders; branch and bound as a dive that keeps whatever height it reaches; branch and bound with
restarts, first at the bound itself, then at heights between the bound and the best one known, with limits that double
from sweep to sweep, until every height below the best is refuted; in turns with it the same for the large buffers
alone, the small ones fitted around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np

from memplan.outcome import Limits, Status
from memplan.solvers.placement.component import Reduced, reduce_problem
from memplan.solvers.placement.exact import FIRST
from memplan.solvers.placement.problem import Placement, PlacementProblem
from memplan.solvers.placement.task import PARALLEL, Effort, Outcome, Task

# Failed nodes of one search: the first rankings get what solves half of the public instances; restarts that learn do
# best when they are short (of 200, 1,000 and 4,000 failed nodes).
FIRST_FAILS, FAILS = 1000, 200
RESOLUTION = 2000  # heights closer than best / RESOLUTION are not told apart by a sweep
# Buffers below load / SMALL are small: of a ResNet-50's step two in five.
SMALL = 2000
MOST_LARGE = 0.9  # of the buffers, above which the large ones alone are no easier to place


def solve_placement(
    problem: PlacementProblem, *, capacity: int | None = None, limits: Limits | None = None
) -> Placement:
    """Offsets for every buffer, as low an arena as the limits allow; with a capacity, any that is within it.

    Without a capacity the status is OPTIMAL or FEASIBLE. With one it is FEASIBLE or OPTIMAL when the height is within
    it, INFEASIBLE when it is proven that none is, else TIMED_OUT; the last two still give the best offsets found.
    ``limits.seconds`` and Ctrl-C end the improvement, not the answer: a first placement always comes. One unit of
    ``limits.work`` is some ten seconds.
    """
    limits = limits or Limits()
    reduced = reduce_problem(problem)
    tasks = [Task(c, limits.seed + k) for k, c in enumerate(reduced.components)]
    refuted = False
    with ThreadPoolExecutor(PARALLEL) as pool:
        effort = Effort(limits, pool)
        try:
            if capacity is None:
                for _ in _minimise_all(tasks, -(-reduced.bound // reduced.unit), effort):
                    pass
            else:
                refuted = not _all_within(reduced, tasks, capacity, effort)
        except KeyboardInterrupt:
            pass  # the best placement so far is the answer
    return _placement(problem, reduced, tasks, capacity, refuted)


def _minimise_all(tasks: list[Task], goal: int, effort: Effort) -> Iterator[Outcome]:
    """Lower the tasks' heights, always that of the highest, until one of them stands at a bound."""
    for task in tasks:
        task.fit(goal, effort)
    attempts = {task: minimise(task, goal, effort) for task in tasks}
    yield Outcome.PAUSED
    while tasks and not effort.spent:
        highest = max(tasks, key=lambda task: task.height)
        if highest.height <= max(goal, highest.bound):
            return
        yield next(attempts[highest])


def _large_first(task: Task, goal: int, effort: Effort) -> Iterator[Outcome]:
    """The large buffers as a problem of their own, and the small ones fitted around every better placement of it; for
    at most half of the effort."""
    c = task.component
    large = np.flatnonzero(c.size * SMALL >= c.bound)
    if len(large) > MOST_LARGE * len(c):
        return
    alone = reduce_problem(PlacementProblem(*(tuple(column[large].tolist()) for column in (c.lo, c.hi, c.size))))
    parts = [Task(part, k) for k, part in enumerate(alone.components)]
    off, reached, least = np.zeros(len(large), np.int64), None, effort.work / 2
    for outcome in _minimise_all(parts, goal // alone.unit, effort):
        height = max(part.height for part in parts)
        if reached is None or height < reached:
            reached = height
            for part in parts:
                off[part.component.index] = part.off * alone.unit
            task.fit_around(large, off, effort)
        if effort.work < least:
            return
        yield outcome


def _all_within(reduced: Reduced, tasks: list[Task], capacity: int, effort: Effort) -> bool:
    """Bring every task within the capacity in bytes, in turns; False only if it is proven that one cannot be."""
    for task in tasks:
        task.fit(capacity // reduced.unit, effort)
    if reduced.bound > capacity:
        return False
    attempts = [decide(task, capacity, effort) for task in tasks if task.bytes > capacity]
    while attempts and not effort.spent:
        outcomes = [next(attempt, Outcome.PAUSED) for attempt in attempts]
        if Outcome.REFUTED in outcomes:
            return False
        attempts = [a for a, outcome in zip(attempts, outcomes, strict=True) if outcome == Outcome.PAUSED]
    return True


def minimise(task: Task, goal: int, effort: Effort) -> Iterator[Outcome]:
    """Lower the height of a component to ``goal`` (at least its bound) or to its optimum, an attempt at a time."""
    for turn in range(0, len(FIRST), PARALLEL):
        if task.height > max(goal, task.bound):
            yield task.attempt(task.height - 1, FAILS, turn, effort)
    yield from _large_first(task, goal, effort)
    fails, turn = FAILS, 0
    while task.height > max(goal, task.bound):
        wanted = max(goal, task.bound)
        while task.height > wanted:
            for _ in range(0, len(FIRST), PARALLEL):
                outcome = task.attempt(wanted, fails if turn >= len(FIRST) else FIRST_FAILS, turn, effort)
                yield outcome
                turn += PARALLEL
                if outcome != Outcome.PAUSED:
                    break
            low = max(goal, task.bound) - 1 if outcome == Outcome.SOLVED else max(wanted, task.bound - 1)
            if task.height - low <= 1 + task.height // RESOLUTION:
                break
            wanted = (low + task.height) // 2
        fails *= 2


def decide(task: Task, capacity: int, effort: Effort) -> Iterator[Outcome]:
    """Is there a placement of the component within so many bytes? An attempt at a time, until one is not PAUSED."""
    c = task.component
    # The topmost buffer needs no padding: latest offsets follow from true sizes, and the arena is rounded up.
    late = (capacity + c.padding) // c.unit - c.size
    wanted = -(-capacity // c.unit)
    for round_ in count():
        turn = round_ * PARALLEL
        fails = FIRST_FAILS if turn < len(FIRST) else FAILS * luby(round_)
        yield Outcome.REFUTED if task.bound > wanted else task.attempt(wanted, fails, turn, effort, late)


def luby(k: int) -> int:
    """1 1 2 1 1 2 4 1 1 2 …: restart lengths within a factor of log n of the best fixed one (Luby et al., 1993)."""
    while (k + 2) & (k + 1):  # k + 1 is not 2^i − 1: in the second half of its block, which repeats the first
        k -= (1 << (k + 1).bit_length() - 1) - 1
    return (k + 2) // 2


def _placement(
    problem: PlacementProblem, reduced: Reduced, tasks: list[Task], capacity: int | None, refuted: bool
) -> Placement:
    """Put the components together and say how the solve ended."""
    offsets = np.zeros(len(problem), np.int64)
    for task in tasks:
        offsets[task.component.index] = task.off * reduced.unit
    height = max((int(o) + s for o, s in zip(offsets, problem.size, strict=True)), default=0)
    proven = max((task.bound for task in tasks if task.bound > task.component.bound), default=0)
    most_padding = problem.alignment - 1  # of the topmost buffer, which counts in units and not in bytes
    bound = max(reduced.bound, proven * reduced.unit - most_padding)
    if capacity is not None and refuted:
        bound = max(bound, capacity + 1)
        status = Status.INFEASIBLE
    elif height <= bound:
        status = Status.OPTIMAL
    elif capacity is not None and height > capacity:
        status = Status.TIMED_OUT
    else:
        status = Status.FEASIBLE
    highest = max(tasks, key=lambda task: task.height, default=None)
    return Placement(tuple(offsets.tolist()), height, bound, status, highest.solver if highest else "")

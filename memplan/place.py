"""Program → offsets: every storage of a step that memplan makes itself, forward and backward together, in one arena."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from memplan.build_problem import TANGENTS
from memplan.outcome import Limits
from memplan.problem import Category
from memplan.program import Program, Step, StepKind
from memplan.solvers.placement import PlacementProblem, check_placement, solve_placement

ALIGNMENT = 64  # bytes; torch's own CPU allocator aligns to it, so kernels choose the same code paths
# Most Programs meet their bound within the constructive fits; the rest of the default effort buys fractions of a percent.
_WORK = 0.1
_SECONDS = 20.0


@dataclass(frozen=True)
class Layout:
    """Where the storages of one Program stand in its arena, in bytes.

    ``load``: the largest sum of living bytes; no layout is lower than that. ``outside``: the most bytes that the Program holds at one instant
    beyond its resident storages and the arena: what the caller is handed in the forward, and the gradients it hands in.
    """

    offsets: Mapping[int, int]  # storage -> offset
    workspaces: Mapping[int, int]  # step -> offset of the bytes its kernel may use while it runs
    height: int
    load: int
    outside: int

    @property
    def fragmentation(self) -> float:
        return self.height / self.load - 1 if self.load else 0.0

    def held(self, program: Program) -> int:
        """Bytes held at most with the arena held throughout."""
        return sum(program.storages[s].size for s in program.resident) + self.height + self.outside


def place(program: Program, limits: Limits | None = None) -> Layout:
    """Offsets for a joint Program, checked. Forward outputs stay outside: the user may keep them for any time."""
    outside = set(program.resident) | _handed(program)
    lives = _lives(program)
    placed = [s for s in lives if s not in outside and program.storages[s].size > 0]
    working = [(at, step.workspace) for at, step in enumerate(program.steps) if _works(step)]
    problem = PlacementProblem(
        lower=(*(lives[s][0] for s in placed), *(at for at, _ in working)),
        upper=(*(lives[s][1] for s in placed), *(at + 1 for at, _ in working)),
        size=(*(program.storages[s].size for s in placed), *(size for _, size in working)),
        alignment=ALIGNMENT,
    )
    placement = solve_placement(problem, limits=limits or Limits(work=_WORK, seconds=_SECONDS))
    check_placement(problem, placement)
    count = len(placed)
    return Layout(
        dict(zip(placed, placement.offsets[:count], strict=True)),
        {at: offset for (at, _), offset in zip(working, placement.offsets[count:], strict=True)},
        placement.height,
        _load(problem),
        _most(program, lives, outside - set(program.resident)),
    )


def _handed(program: Program) -> set[int]:
    """Storages that cross to the user or come from it within the step, gradients of parameters excepted."""
    tangents = {s for step in program.steps if step.name == TANGENTS for s in step.makes}
    return tangents | {s for s, storage in enumerate(program.storages) if storage.category == Category.OUTPUT}


def _works(step: Step) -> bool:
    return step.kind == StepKind.RUN and step.workspace > 0


def _lives(program: Program) -> dict[int, tuple[int, int]]:
    """Half-open span of steps of each storage that a step makes."""
    spans = {s: (at, len(program.steps)) for at, step in enumerate(program.steps) for s in step.makes}
    for at, step in enumerate(program.steps):
        spans.update({s: (spans[s][0], at) for s in step.frees if s in spans})
    return spans


def _most(program: Program, lives: Mapping[int, tuple[int, int]], storages: set[int]) -> int:
    events = sorted(event for s in storages if s in lives for event in _events(lives[s], program.storages[s].size))
    return _running_maximum(events)


def _load(problem: PlacementProblem) -> int:
    spans = zip(problem.lower, problem.upper, problem.size, strict=True)
    return _running_maximum(sorted(e for lower, upper, size in spans for e in _events((lower, upper), size)))


def _events(span: tuple[int, int], size: int) -> Iterator[tuple[int, int]]:
    yield span[0], size
    yield span[1], -size


def _running_maximum(events: list[tuple[int, int]]) -> int:
    """``events``: (position, change in bytes), sorted, so that at one position what dies goes first."""
    live = most = 0
    for _, change in events:
        live += change
        most = max(most, live)
    return most

"""Program → offsets: every storage of a step that memplan makes itself, forward and backward together, in one arena."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from memplan.build_problem import TANGENTS
from memplan.outcome import Limits
from memplan.problem import Category
from memplan.program import Program
from memplan.solvers.placement import PlacementProblem, check_placement, solve_placement

ALIGNMENT = 64  # bytes; torch's own CPU allocator aligns to it, so kernels choose the same code paths
# Bytes up to which torch places a storage itself: a kernel wraps numbers in tensors at one call and not at the next, and
# a result of the same size that took such a tensor's place would push out what is planned there afterwards.
SCALAR = ALIGNMENT
# Most Programs meet their bound within the constructive fits. Where a fit stays further above the load than by _CLOSE, more
# effort is worth its seconds: it decides whether a ResNet at 70 % has an arena within the budget.
_WORK, _MORE_WORK = 0.1, 4
_CLOSE = 1.01
_SECONDS = 20.0
# Lists of arguments, results and blocks: 5 to 7 KB were seen beside an arena on steps of 200 to 600 kernels.
_BOOKKEEPING = 16 * 1024


@dataclass(frozen=True)
class Layout:
    """Where the storages of one Program stand in its arena, in bytes.

    ``load``: the largest sum of living bytes; no layout is lower. ``outside``: bytes that may be held at one instant
    beyond the resident storages and the arena: what the caller is handed in the forward, the gradients it hands in, and
    what a kernel takes past torch's allocator.
    """

    offsets: Mapping[int, int]  # storage -> offset
    workspaces: Mapping[int, tuple[int, int]]  # step -> offset and size of what its kernel may use while it runs
    height: int
    load: int
    unseen: int  # the part of ``outside`` that kernels take past torch's allocator
    outside: int
    crosses: bool  # something in the arena lives from the forward into the backward

    @property
    def fragmentation(self) -> float:
        return self.height / self.load - 1 if self.load else 0.0

    def held(self, program: Program) -> int:
        """Bytes held at most with the arena held throughout."""
        return sum(program.storages[s].size for s in program.resident) + self.height + self.outside


@dataclass(frozen=True)
class Region:
    """Bytes of the arena that a running kernel's temporaries may use until ``until``, on the kernel's clock."""

    offset: int
    size: int
    until: float


def place(
    program: Program,
    workspaces: Mapping[int, int],
    unseen: int,
    beside: AbstractSet[int] = frozenset(),
    limits: Limits | None = None,
) -> Layout:
    """Offsets for a joint Program, checked. Forward outputs stay outside: the user may keep them for any time; so do the
    storages ``beside``, and scalars.

    ``workspaces``: for a step, the bytes that its kernel takes from torch's allocator while it runs. ``unseen``: the
    most that any kernel takes past it.
    """
    outside = set(program.resident) | _handed(program) | beside
    outside |= {s for s, storage in enumerate(program.storages) if storage.size <= SCALAR}
    lives = _lives(program)
    placed = [s for s in lives if s not in outside and program.storages[s].size > 0]
    working = [(at, size) for at, size in workspaces.items() if size > 0]
    problem = PlacementProblem(
        lower=(*(lives[s][0] for s in placed), *(at for at, _ in working)),
        upper=(*(lives[s][1] for s in placed), *(at + 1 for at, _ in working)),
        size=(*(program.storages[s].size for s in placed), *(size for _, size in working)),
        alignment=ALIGNMENT,
    )
    load = _load(problem)
    placement = solve_placement(problem, limits=limits or Limits(work=_WORK, seconds=_SECONDS))
    if limits is None and placement.height > _CLOSE * load:
        more = solve_placement(problem, limits=Limits(work=_MORE_WORK, seconds=_SECONDS))
        placement = min(placement, more, key=lambda found: found.height)
    check_placement(problem, placement)
    count = len(placed)
    return Layout(
        dict(zip(placed, placement.offsets[:count], strict=True)),
        {at: (offset, size) for (at, size), offset in zip(working, placement.offsets[count:], strict=True)},
        placement.height,
        load,
        unseen,
        _most(program, lives, outside - set(program.resident)) + unseen + _BOOKKEEPING,
        any(lives[s][0] < at < lives[s][1] for s in placed for at in _handover(program)),
    )


def place_temporaries(temporaries: Sequence[tuple[int, float, float]], regions: Sequence[Region]) -> list[int]:
    """Offsets for a kernel's own allocations ``(size, born, died)``, the largest first; −1 where none fits.

    A kernel's peak may come before its result exists, so the place of the result serves until then, too.
    """
    offsets = [-1] * len(temporaries)
    by_end = sorted(regions, key=lambda region: region.until)  # what serves the shortest is used first
    for k in sorted(range(len(temporaries)), key=lambda k: -temporaries[k][0]):
        size, born, died = temporaries[k]
        meets = [j for j, (_, b, d) in enumerate(temporaries) if offsets[j] >= 0 and b < died and born < d]
        taken = sorted((offsets[j], offsets[j] + temporaries[j][0]) for j in meets)
        for region in by_end:
            at = region.offset
            for start, end in taken:
                if start < at + size and at < end:
                    at = -(-end // ALIGNMENT) * ALIGNMENT
            if died <= region.until and at + size <= region.offset + region.size:
                offsets[k] = at
                break
    return offsets


def _handed(program: Program) -> set[int]:
    """Storages that cross to the user or come from it within the step, gradients of parameters excepted."""
    tangents = {s for at in _handover(program) for s in program.steps[at].makes}
    return tangents | {s for s, storage in enumerate(program.storages) if storage.category == Category.OUTPUT}


def _handover(program: Program) -> list[int]:
    """The step between forward and backward, where there is one."""
    return [at for at, step in enumerate(program.steps) if step.name == TANGENTS]


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

"""Program → offsets: every storage of a step that memplan makes itself, forward and backward together, in one arena."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

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
_WORK, _MORE_WORK = 0.1, 2
_CLOSE = 1.01
_SECONDS = 20.0
# Lists of arguments, results and blocks: 5 to 7 KB were seen beside an arena on steps of 200 to 600 kernels.
_BOOKKEEPING = 16 * 1024


@dataclass(frozen=True)
class Layout:
    """Where the storages of one Program stand in its arena, in bytes.

    ``load``: the largest sum of living bytes; no layout is lower. ``outside``: bytes that may be held at one instant
    beyond the resident storages and the arena: what the caller is handed in the forward, the gradients it hands in and what
    it takes to make them, and what a kernel takes past torch's allocator.
    """

    offsets: Mapping[int, int]  # storage -> offset
    workspaces: Mapping[int, int]  # step -> bytes kept free, in one piece, for what its kernel takes for itself
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
class Kernel:
    """What a kernel allocates, on its own clock: ``own`` as (bytes, born, died), and its results' births."""

    own: tuple[tuple[int, float, float], ...]
    results: Mapping[int, float]  # storage -> born

    def end(self, offsets: Sequence[int]) -> int:
        """Bytes up to which its own allocations reach at these offsets."""
        return max((offset + size for offset, (size, *_) in zip(offsets, self.own, strict=True)), default=0)

    @property
    def one_piece(self) -> int:
        """Bytes of one piece that hold its own allocations in any case."""
        return self.end(_own_offsets(self, [], []))


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
    return Layout(
        dict(zip(placed, placement.offsets, strict=False)),
        dict(working),
        placement.height,
        load,
        unseen,
        _most(program, lives, outside - set(program.resident)) + unseen + _BOOKKEEPING,
        any(lives[s][0] < at < lives[s][1] for s in placed for at in _handover(program)),
    )


def fitted(
    program: Program,
    layout: Layout,
    kernels: Mapping[int, Kernel],
    beside: AbstractSet[int] = frozenset(),
    past: int = 0,
) -> tuple[Layout, dict[int, list[int]]]:
    """A layout that holds what ``kernels`` were seen to take, and where: the one given, as high as that takes, or a new
    one with room in one piece where that was too high.

    The storages ``beside`` stand outside after all, and kernels take ``past`` bytes more past torch's allocator.
    """
    found, own = with_temporaries(program, layout, kernels)
    if found.height == layout.height and not beside:
        return found, own
    needs = {at: size for at, size in layout.workspaces.items() if beside.isdisjoint(program.steps[at].makes)}
    needs |= {at: kernels[at].one_piece for at, offsets in own.items() if kernels[at].end(offsets) > layout.height}
    again, places = with_temporaries(program, place(program, needs, layout.unseen + past, beside), kernels)
    return (again, places) if beside or again.height < found.height else (found, own)


def with_temporaries(
    program: Program, layout: Layout, kernels: Mapping[int, Kernel]
) -> tuple[Layout, dict[int, list[int]]]:
    """For each step among ``kernels`` offsets for what its kernel takes for itself, each as low as is free while it
    lives; and the layout, as high as they need.

    A kernel's peak may come before its result exists, so the place of the result serves until then, together with what
    is free beside it.
    """
    made: dict[int, list[int]] = {}
    gone: dict[int, list[int]] = {}
    for storage, (begin, end) in _lives(program).items():
        if storage in layout.offsets and begin < end:
            made.setdefault(begin, []).append(storage)
            gone.setdefault(end, []).append(storage)
    span = {s: (offset, offset + program.storages[s].size) for s, offset in layout.offsets.items()}
    found: dict[int, list[int]] = {}
    taken: dict[int, tuple[int, int]] = {}
    for at in range(len(program.steps)):
        for storage in gone.get(at, ()):
            del taken[storage]
        if at in kernels:
            results = [(span[s], born) for s, born in kernels[at].results.items() if s in span]
            found[at] = _own_offsets(kernels[at], list(taken.values()), results)
        taken |= {storage: span[storage] for storage in made.get(at, ())}
    most = max((kernels[at].end(offsets) for at, offsets in found.items()), default=0)
    return replace(layout, height=max(layout.height, most)), found


def _own_offsets(
    kernel: Kernel, taken: list[tuple[int, int]], results: list[tuple[tuple[int, int], float]]
) -> list[int]:
    """The largest first. ``taken``: the whole time; ``results``: from when they are born."""
    offsets = [-1] * len(kernel.own)
    for k in sorted(range(len(offsets)), key=lambda k: -kernel.own[k][0]):
        size, begin, end = kernel.own[k]
        beside = [j for j, (_, b, e) in enumerate(kernel.own) if offsets[j] >= 0 and b < end and begin < e]
        blocked = [*taken, *(span for span, born in results if born < end)]
        blocked += [(offsets[j], offsets[j] + kernel.own[j][0]) for j in beside]
        offsets[k] = _lowest(size, blocked)
    return offsets


def _lowest(size: int, blocked: list[tuple[int, int]]) -> int:
    at = 0
    for start, end in sorted(blocked):
        if start >= at + size:
            break
        at = max(at, -(-end // ALIGNMENT) * ALIGNMENT)
    return at


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
    """Most bytes held at one instant of the storages and of what the caller takes at the handover."""
    events = [event for s in storages if s in lives for event in _events(lives[s], program.storages[s].size)]
    for at in _handover(program):
        events += _events((at, at + 1), program.steps[at].workspace)
    return _running_maximum(sorted(events))


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

"""Run a Program's kernels with their results and workspaces at planned offsets in one allocation.

The first step records which allocation of each kernel becomes which result; from the second on, torch's allocator
(``arena.cpp``) hands those allocations their planned places. Kernels are called as ever, so the bits stay the same and
kernels without an ``out=`` form (convolution, normalisation, attention, embedding) are planned like all others.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from memplan.capture import tensors
from memplan.place import Layout
from memplan.problem import Category
from memplan.program import Program, Step, StepKind
from memplan.runtime import native

log = logging.getLogger("memplan")

Call = Callable[[list[Any]], Any]

_IDLE, _KEPT, _PENDING = 0, 1, 2  # states of an arena, as arena.cpp counts them; 3: a thread runs in it


@dataclass(frozen=True)
class ArenaStatistics:
    """What one compiled function's arenas did. ``results``: how many kernels' results have a place there."""

    height: int  # bytes of one arena
    arenas: int
    results: int
    unplaced: int  # results whose memory the kernel does not take from torch's allocator, and forward outputs
    placed: int  # allocations served
    refused: int  # allocations whose planned bytes were in use or too few: served by torch


class Pool:
    """The arenas of one compiled function: its forward and its backward run in the same one.

    Each step under way has its own. One that holds nothing but gradients the user keeps is left to them, its other
    pages given back. Functions whose steps are under way at once (a model in pieces) use arenas only where all of them
    fit the budget together: each is held at its whole height while the others run.
    """

    _all: ClassVar[weakref.WeakSet[Pool]] = weakref.WeakSet()
    _lock: ClassVar = threading.RLock()

    def __init__(self, program: Program, layout: Layout, parts: int, budget: int | None = None) -> None:
        """``program``: the joint one that ``layout`` belongs to. ``parts``: how many Executables run it."""
        self.layout = layout
        self._budget = budget
        self._program = program
        self._resident = sum(program.storages[s].size for s in program.resident)
        self._beyond = layout.height + layout.outside
        self._planned = {step.name: at for at, step in enumerate(program.steps) if step.kind == StepKind.RUN}
        self._parts = self._waiting = parts  # scripts, and those still to be recorded
        self._pending = False  # while recording: a forward has run, its backward has not
        self._off = False
        self._arenas: list[int] = []
        self.results = self.unplaced = 0  # storages with a place in the arena, and without
        with Pool._lock:
            Pool._all.add(self)

    def statistics(self) -> ArenaStatistics:
        library = native.library()
        assert library is not None
        return ArenaStatistics(
            self.layout.height,
            len(self._arenas),
            self.results,
            self.unplaced,
            sum(library.arena_placed(a) for a in self._arenas),
            sum(library.arena_refused(a) for a in self._arenas),
        )

    def places(self, step: Step) -> tuple[int, list[int]] | None:
        """(index of the joint Program's step, its storages) for a step of the forward's or the backward's Program."""
        at = self._planned.get(step.name)
        return None if at is None else (at, list(self._program.steps[at].makes))

    def storage(self, index: int) -> tuple[int, int, bool]:
        """(size, offset or −1, whether the user may keep it) of a storage of the joint Program."""
        stored = self._program.storages[index]
        return stored.size, self.layout.offsets.get(index, -1), stored.category == Category.GRADIENT

    def workspace(self, at: int) -> tuple[int, int]:
        return self.layout.workspaces.get(at, 0), self._program.steps[at].workspace

    def recorded(self) -> None:
        with Pool._lock:
            self._waiting -= 1

    def enter(self, script: int, args: Sequence[Any], begins: bool) -> bool:
        """Let this thread run a script in an arena until ``library.end()``; False: run without one."""
        library = native.library()
        if library is None:
            return False
        with Pool._lock:
            if begins:
                self._share()
            self._pending = begins and self._waiting > 0 and self._parts > 1
            if self._off or self._waiting:
                return False
            arena = self._fresh() if begins else self._of(args)
            if arena is None:
                return False
            library.begin(script, arena)
            return True

    def _of(self, args: Sequence[Any]) -> int | None:
        """The arena in which the forward left what it saved."""
        library = native.library()
        assert library is not None
        for value in args:
            if isinstance(value, torch.Tensor):
                arena = library.arena_of(value.untyped_storage().data_ptr())
                if arena in self._arenas:
                    return arena
        return None

    def _fresh(self) -> int | None:
        """An arena in which nothing lives; what else idles is given back."""
        library = native.library()
        assert library is not None
        found: int | None = None
        for arena in tuple(self._arenas):
            state = library.arena_state(arena)
            if state == _IDLE and found is None:
                found = arena
            elif state in (_IDLE, _KEPT):
                library.arena_trim(arena)
                library.arena_close(arena)
                self._arenas.remove(arena)
        if found is None:
            for arena in self._arenas:
                if library.arena_state(arena) == _PENDING:
                    library.arena_trim(arena)
            found = library.arena_new(self.layout.height)
            if found is not None:
                self._arenas.append(found)
        return found

    def _share(self) -> None:
        """Do without arenas where those of the functions under way together are more than the budget."""
        together = [self, *(other for other in Pool._all if other is not self and other._under_way())]
        budgets = [pool._budget for pool in together if pool._budget is not None]
        held = max(pool._resident for pool in together) + sum(pool._beyond for pool in together)
        if len(together) > 1 and budgets and held > min(budgets):
            log.info("no arena: the steps of %d functions are under way at once, within one budget", len(together))
            for pool in together:
                pool._off = True
                pool.close()

    def _under_way(self) -> bool:
        library = native.library()
        assert library is not None
        return not self._off and (self._pending or any(library.arena_state(a) >= _PENDING for a in self._arenas))

    def close(self) -> None:
        library = native.library()
        for arena in self._arenas:
            if library is not None:
                library.arena_close(arena)
        self._arenas = []

    def __del__(self) -> None:
        self.close()


class Script:
    """One Executable's kernels and the places of their allocations."""

    def __init__(self, pool: Pool, program: Program, begins: bool) -> None:
        """``begins``: it is the step's first part, and takes an arena; else it finds that of its arguments."""
        library = native.library()
        assert library is not None
        self._library = library
        self._pool = pool
        self._steps = program.steps
        self._kernels = tuple(at if step.kind == StepKind.RUN else -1 for at, step in enumerate(program.steps))
        self._begins = begins
        self._known = False
        self.handle = library.script_new(len(program.steps))

    def __del__(self) -> None:
        self._library.script_free(self.handle)

    def run(self, calls: Sequence[Call], slots: list[Any]) -> None:
        """Run the calls of the Program's steps over ``slots``, which hold the arguments."""
        library = self._library
        in_arena = self._pool.enter(self.handle, slots, self._begins)
        if self._known and not in_arena:
            for call in calls:
                call(slots)
            return
        if not in_arena:
            library.begin(None, None)
        step = library.step
        try:
            for at, call in zip(self._kernels, calls, strict=True):
                if at >= 0:
                    step(at)
                    value = call(slots)
                    if not in_arena:
                        self._record(at, value)
                    del value
                else:
                    call(slots)
        finally:
            library.end()
        if not in_arena:
            self._known = True
            self._pool.recorded()

    def _record(self, at: int, value: Any) -> None:
        """Learn which allocations of the kernel just run hold its results, and give those their places."""
        planned = self._pool.places(self._steps[at])
        if planned is None:
            return
        joint, made = planned
        allocations = dict.fromkeys(self._library.recorded(t.untyped_storage().data_ptr()) for t in tensors(value))
        found = [ordinal for ordinal in allocations if ordinal >= 0]
        if len(found) != len(made):
            self._pool.unplaced += len(made)
            return
        self._library.script_workspace(self.handle, at, *self._pool.workspace(joint))
        for ordinal, storage in sorted(zip(found, made, strict=True)):
            size, offset, kept = self._pool.storage(storage)
            self._library.script_request(self.handle, at, ordinal, size, offset, kept)
            self._pool.results += offset >= 0
            self._pool.unplaced += offset < 0

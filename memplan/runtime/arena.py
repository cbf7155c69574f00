"""Run a Program's kernels with their results and workspaces at planned offsets in one allocation.

The first step records which allocation of each kernel becomes which result; from the second on, torch's allocator
(``arena.cpp``) hands those allocations their planned places. Kernels are called as ever, so the bits stay the same and
kernels without an ``out=`` form (convolution, normalisation, attention, embedding) are planned like all others.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from memplan.place import Layout, fitted
from memplan.problem import Category
from memplan.program import Program, Step, StepKind
from memplan.runtime import native
from memplan.runtime.kernels import Recorded, addresses, matched
from memplan.runtime.write import Calls

log = logging.getLogger("memplan")

_ALLOCATE = (StepKind.RUN, StepKind.PREFETCH)  # steps whose allocations have planned places

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


@dataclass(frozen=True)
class Place:
    """Where an allocation goes; offset −1: where torch puts it. ``kept``: the user may hold it after the step."""

    size: int
    offset: int
    kept: bool


class Pool:
    """The arenas of one compiled function: its forward and its backward run in the same one.

    Each step under way has its own. One that holds nothing but gradients the user keeps is left to them, its other
    pages given back. Functions whose steps are under way at once (a model in pieces) use arenas only where all of them
    fit the budget together: each is held at its whole height while the others run. Any other function that begins a
    step (evaluation beside training) takes over: arenas that idle are given back, as if torch had allocated.
    """

    _all: ClassVar[weakref.WeakSet[Pool]] = weakref.WeakSet()
    _lock: ClassVar = threading.RLock()

    def __init__(self, program: Program, layout: Layout, parts: int, budget: int | None = None) -> None:
        """``program``: the joint one that ``layout`` belongs to. ``parts``: how many Executables run it."""
        self.layout = layout
        self._budget = budget
        self.program = program
        self._resident = sum(program.storages[s].size for s in program.resident)
        self._beyond = layout.height + layout.outside
        self._planned = {step.name: at for at, step in enumerate(program.steps) if step.kind in _ALLOCATE}
        self._parts = self._waiting = parts  # scripts, and those still to be recorded
        self._scripts: list[Script] = []  # recorded ones, until all are
        self._pending = False  # while recording: a forward has run, its backward has not
        self.off = False
        self._companions: weakref.WeakSet[Pool] = weakref.WeakSet()  # pools that had steps under way beside this one's
        self._arenas: list[int] = []  # never bound anew: the finalizer holds it
        weakref.finalize(self, _close, self._arenas).atexit = False
        self.results = self.unplaced = 0  # storages with a place in the arena, and without
        self._own: dict[int, list[int]] = {}  # by step: offsets of what its kernel takes for itself
        self._missed: dict[int, tuple[int, ...]] = {}  # by step: storages that its kernel does not take from torch
        with Pool._lock:
            Pool._all.add(self)

    @classmethod
    def all(cls) -> tuple[Pool, ...]:
        """The pools of every compiled function that lives."""
        return tuple(cls._all)

    def statistics(self) -> ArenaStatistics:
        library = native.library()
        assert library is not None
        with Pool._lock:
            return ArenaStatistics(
                self.layout.height,
                len(self._arenas),
                self.results,
                self.unplaced,
                sum(library.arena_placed(a) for a in self._arenas),
                sum(library.arena_refused(a) for a in self._arenas),
            )

    def made_by(self, step: Step) -> tuple[int, tuple[int, ...]] | None:
        """(the joint Program's step, the storages it makes) for a step of the forward's or the backward's Program."""
        at = self._planned.get(step.name)
        return None if at is None else (at, self.program.steps[at].makes)

    def missed(self, step: int, made: tuple[int, ...]) -> None:
        """The kernel of a step of the joint Program allocates otherwise than planned: it runs without the arena."""
        self._missed[step] = made
        self.unplaced += len(made)

    def storage(self, index: int) -> Place:
        stored = self.program.storages[index]
        return Place(stored.size, self.layout.offsets.get(index, -1), stored.category == Category.GRADIENT)

    def recorded(self, script: Script) -> None:
        """Once every part is recorded, see that the layout holds what the kernels take, and write the scripts."""
        with Pool._lock:
            self._scripts.append(script)
            self._waiting -= 1
            if self._waiting == 0:
                self._fit()
                while self._scripts:
                    self._scripts.pop().write()

    def _fit(self) -> None:
        """A layout that holds what the kernels were seen to take; none, if that does not fit the budget."""
        kernels = {seen.step: seen.kernel for script in self._scripts for seen in script.kernels()}
        beside = {storage for made in self._missed.values() for storage in made}
        past = max((self.program.steps[at].workspace for at in self._missed), default=0)
        self.layout, self._own = fitted(self.program, self.layout, kernels, beside, past)
        self._beyond = self.layout.height + self.layout.outside
        if self._budget is not None and self._resident + self._beyond > self._budget:
            log.info("no arena: with what kernels were seen to take it would not fit the budget")
            self.off = True

    def temporaries(self, seen: Recorded) -> dict[int, Place]:
        """Where a recorded kernel's own allocations go."""
        places = {k: Place(a.size, -1, kept=False) for k, a in enumerate(seen.allocations) if k not in seen.results}
        for k, offset in zip(seen.own, self._own[seen.step], strict=True):
            places[k] = replace(places[k], offset=offset)
        return places

    def enter(self, script: int, args: Sequence[Any], begins: bool) -> bool:
        """Let this thread run a script in an arena until it unwinds; False: run without one."""
        library = native.library()
        if library is None:
            return False
        with Pool._lock:
            if begins:
                self._share()
                for other in set(Pool._all) - set(self._companions) - {self}:
                    other.release_idle()
            self._pending = begins and self._waiting > 0 and self._parts > 1
            if self.off or self._waiting:
                return False
            arena = self._fresh() if begins or not self.layout.crosses else self._of(args)
            if arena is None:
                self.release_idle()  # what runs without an arena must not do so beside one
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
        together = [self, *(other for other in Pool.all() if other is not self and other._under_way())]
        for other in together[1:]:
            self._companions.add(other)
            other._companions.add(self)
        budgets = [pool._budget for pool in together if pool._budget is not None]
        held = max(pool._resident for pool in together) + sum(pool._beyond for pool in together)
        if len(together) > 1 and budgets and held > min(budgets):
            log.info("no arena: the steps of %d functions are under way at once, within one budget", len(together))
            for pool in together:
                pool.off = True
                pool.close()

    def _under_way(self) -> bool:
        library = native.library()
        assert library is not None
        return not self.off and (self._pending or any(library.arena_state(a) >= _PENDING for a in self._arenas))

    def release_idle(self) -> None:
        """Give back what no step under way needs."""
        library = native.library()
        assert library is not None
        for arena in tuple(self._arenas):
            state = library.arena_state(arena)
            if state == _IDLE:
                library.arena_close(arena)
                self._arenas.remove(arena)
            elif state == _KEPT:
                library.arena_trim(arena)

    def close(self) -> None:
        _close(self._arenas)


def _close(arenas: list[int]) -> None:
    """Give arenas up; a block that lives on keeps its own."""
    library = native.library()
    assert library is not None or not arenas
    while arenas and library is not None:
        library.arena_close(arenas.pop())


def _renew_lock() -> None:
    """In a forked child: another thread may have held the lock when the process was copied."""
    Pool._lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def release_idle() -> None:
    """Give back every arena in which nothing lives, and of those that hold gradients the rest: between steps, where
    others need the memory or it is measured."""
    library = native.library()
    if library is None:
        return
    with Pool._lock:
        for pool in Pool.all():
            pool.release_idle()


class Script:
    """One Executable's kernels and the places of their allocations."""

    def __init__(self, pool: Pool, program: Program, begins: bool) -> None:
        """``begins``: it is the step's first part, and takes an arena; else it finds that of its arguments."""
        library = native.library()
        assert library is not None
        self._library = library
        self._pool = pool
        self._steps = program.steps
        self._kernels = tuple(step.kind in _ALLOCATE for step in program.steps)
        self._begins = begins
        self._known = self._recording = False
        self._kernels_seen: dict[int, Recorded] = {}
        self.handle = library.script_new(len(program.steps))
        weakref.finalize(self, library.script_free, self.handle).atexit = False

    def run(self, calls: Calls, slots: list[Any]) -> None:
        """Run the Program's calls over ``slots``, which hold the arguments."""
        library, before = self._library, self._library.running()
        recording = False
        try:
            in_arena = self._pool.enter(self.handle, slots, self._begins)
            recording = not in_arena and self._begin_recording()
            if in_arena or recording:
                self._run(calls, slots, recording)
            else:
                for call in calls.functions:
                    call(slots)
        finally:  # an interrupt may have come at any instant, before the first kernel, too
            library.unwind(before)
            if recording:
                self._recording = False

    def _run(self, calls: Calls, slots: list[Any], recording: bool) -> None:
        step = self._library.step
        for at, call in zip(calls.steps, calls.functions, strict=True):
            if self._kernels[at]:
                step(at)
                value = call(slots)
                if recording:
                    self._record(at, value)
                del value
            else:
                call(slots)
        if recording:
            self._known = True
            self._pool.recorded(self)

    def _begin_recording(self) -> bool:
        """False where it is known, and while another thread records it."""
        with Pool._lock:
            if self._known or self._recording:
                return False
            self._recording = True
        self._kernels_seen.clear()
        self._library.begin(None, None)
        return True

    def _record(self, at: int, value: Any) -> None:
        """Learn which allocations of the kernel just run hold its results."""
        planned = self._pool.made_by(self._steps[at])
        if planned is None:
            return
        step, made = planned
        seen = matched(self._pool.program, step, addresses(value), native.recorded(self._library))
        if seen is not None:
            self._kernels_seen[at] = seen
        else:
            self._pool.missed(step, made)

    def kernels(self) -> Iterable[Recorded]:
        """What was recorded."""
        return self._kernels_seen.values()

    def write(self) -> None:
        """Give every allocation seen its place."""
        for at, seen in self._kernels_seen.items():
            places = {k: self._pool.storage(storage) for k, storage in seen.results.items()}
            placed = sum(where.offset >= 0 for where in places.values())
            self._pool.results += placed
            self._pool.unplaced += len(places) - placed
            places |= self._pool.temporaries(seen)
            for k, where in sorted(places.items()):
                asked = seen.allocations[k].size
                if asked:
                    self._library.script_request(self.handle, at, asked, where.offset, where.kept)
        self._kernels_seen.clear()

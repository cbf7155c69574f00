"""What eager holds in a forward without gradients beyond the captured graph's needs: tensors that a name in the model's
code still refers to.

The model runs once more over fake tensors, each kernel noted with the instants at which its results die; the graph's
kernels are found among those in order.
"""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from itertools import accumulate
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memplan import torch_compat
from memplan.capture import tensors
from memplan.lower import Lowered
from memplan.program import Program, Step, StepKind

log = logging.getLogger("memplan")

Key = tuple[str, tuple[tuple[int, ...], ...]]  # a kernel's name without its form, shapes of its results


@dataclass
class Made:
    """A kernel that ran, and for each storage that it made how many kernels had run when that died."""

    key: Key
    until: list[int | None] = field(default_factory=list)  # None: alive at the end


def forward_lifetimes(run: Callable[[], object]) -> list[Made]:
    """Runs a forward over fake tensors; empty where it needs values, which fake tensors do not have."""
    recorder = _Recorder()
    try:
        with torch.no_grad(), recorder:
            results = run()
    except RuntimeError as error:
        log.debug("no lifetimes of eager's tensors: %s", error)
        return []
    made = [Made(one.key, list(one.until)) for one in recorder.made]
    del results  # what the caller is given lives on
    return made


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[Made] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {torch_compat.storage_key(t) for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_tensor(t)}
        fresh = {key: t for t in tensors(results) if (key := torch_compat.storage_key(t)) not in given}
        if fresh:
            made = Made(_key(func, results))
            for tensor in fresh.values():
                made.until.append(None)
                weakref.finalize(tensor.untyped_storage(), self._died, made, len(made.until) - 1)
            self.made.append(made)
        return results

    def _died(self, made: Made, place: int) -> None:
        made.until[place] = len(self.made)


def held_by_names(lowered: Lowered, lifetimes: Sequence[Made]) -> Program:
    """The Program with storages held as long as eager holds them, where that is longer. No storage is held shorter."""
    program = lowered.program
    runs = [at for at, step in enumerate(program.steps) if step.kind == StepKind.RUN and step.makes]
    nodes = [lowered.bindings[at].node for at in runs]
    keys = [_key(node.target, node.meta["val"]) if node is not None else None for node in nodes]
    matcher = SequenceMatcher(None, [made.key for made in lifetimes], keys, autojunk=False)
    step_of = {a + k: runs[b + k] for a, b, size in matcher.get_matching_blocks() for k in range(size)}
    through = list(accumulate((step_of.get(e, -1) for e in range(len(lifetimes))), max))  # steps done with e kernels
    until: dict[int, int] = {}
    for e, at in step_of.items():
        for s, died in zip(program.steps[at].makes, lifetimes[e].until, strict=False):
            if died:
                until[s] = through[died - 1]
    found = set(step_of.values())
    _hand_on(program, [at for at in runs if at not in found], until)
    return _freed_later(program, until)


def _hand_on(program: Program, absent: Sequence[int], until: dict[int, int]) -> None:
    """Where a graph's kernel copies what eager changes in place, or passes on as it is, the copy is what eager holds."""
    sizes = [storage.size for storage in program.storages]
    last_read = {s: at for at, step in enumerate(program.steps) for s in step.reads}
    for at in absent:
        step = program.steps[at]
        for read in step.reads:
            if last_read[read] == at and [sizes[read]] == [sizes[s] for s in step.makes] and until.get(read, 0) > at:
                until[step.makes[0]] = until.pop(read)
                break


def _freed_later(program: Program, until: dict[int, int]) -> Program:
    """Storages named in ``until`` are freed after that step, if they were freed before it."""
    later: dict[int, list[int]] = defaultdict(list)
    steps: list[Step] = []
    for at, step in enumerate(program.steps):
        stay = [s for s in step.frees if until.get(s, -1) > at]
        for s in stay:
            later[until[s]].append(s)
        gone = tuple(s for s in step.frees if s not in stay)
        if gone or not stay:
            steps.append(replace(step, frees=gone))
        if at in later:
            steps.append(Step(StepKind.FREE, "free", step.phase, frees=tuple(later[at])))
    return replace(program, steps=tuple(steps))


def _key(target: Any, value: object) -> Key:
    """Batch norms have one name in eager, others in graphs."""
    name = str(target).removeprefix("aten.").partition(".")[0].strip("_")
    return "batch_norm" if "batch_norm" in name else name, tuple(tuple(t.shape) for t in tensors(value) if t.numel())


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)

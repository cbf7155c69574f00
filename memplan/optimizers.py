"""What torch.optim holds while it updates the parameters: its state, and the temporaries of each of its forms. No torch.

Read off torch/optim/{sgd,adam}.py (2.11 to 2.13): ``for-loop`` updates one parameter after the other, ``foreach`` each
list of parameters of one dtype with every kernel at once, ``fused`` in one kernel. A temporary is held as long as Python
holds the name it is bound to, which may be until the next parameter binds it anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from memplan.errors import OptionError
from memplan.problem import Category, Phase
from memplan.program import Program, Step, StepKind, Storage

FORMS = ("for-loop", "foreach", "fused")


@dataclass(frozen=True)
class _Kernel:
    """One call: what it reads (the last of it changes in place, unless it makes something) and makes, by role."""

    name: str
    reads: tuple[str, ...]
    makes: str = ""
    spends: str = ""  # a value without a name in the source, gone once this kernel has read it


_DECAY = _Kernel("mul_", ("parameter",))
_MOMENTS = (
    _Kernel("lerp_", ("gradient", "exp_avg")),
    _Kernel("mul_", ("exp_avg_sq",)),
    _Kernel("addcmul_", ("gradient", "exp_avg_sq")),
)
_STEP = (_Kernel("add_", ("denominator",)), _Kernel("addcdiv_", ("exp_avg", "denominator", "parameter")))
_ADAM: dict[str, tuple[_Kernel, ...]] = {
    "for-loop": (
        *_MOMENTS,
        _Kernel("sqrt", ("exp_avg_sq",), makes="root"),
        _Kernel("div", ("root",), makes="denominator", spends="root"),
        *_STEP,
    ),
    "foreach": (
        *_MOMENTS,
        _Kernel("sqrt", ("exp_avg_sq",), makes="denominator"),
        _Kernel("div_", ("denominator",)),
        *_STEP,
    ),
}
_SGD = (_Kernel("add_", ("gradient", "parameter")),)
_MOMENTUM = (
    _Kernel("mul_", ("momentum_buffer",)),
    _Kernel("add_", ("gradient", "momentum_buffer")),
    _Kernel("add_", ("momentum_buffer", "parameter")),
)
# By name: the state of a parameter, and the kernels of the forms that are not fused. Defaults of torch.optim: AdamW decays
# the weights, the others do not.
_KNOWN: dict[str, tuple[tuple[str, ...], dict[str, tuple[_Kernel, ...]]]] = {
    "sgd": ((), {"for-loop": _SGD, "foreach": _SGD}),
    "momentum": (("momentum_buffer",), {"for-loop": _MOMENTUM, "foreach": _MOMENTUM}),
    "adam": (("exp_avg", "exp_avg_sq"), _ADAM),
    "adamw": (("exp_avg", "exp_avg_sq"), {form: (_DECAY, *kernels) for form, kernels in _ADAM.items()}),
}


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of torch.optim in one of its forms."""

    name: str
    form: str

    @classmethod
    def parse(cls, text: str, device_type: str) -> Optimizer:
        """ "adamw" in torch's default form for the device ("cuda": foreach, else for-loop), or "adamw:fused". Raises
        OptionError."""
        name, colon, form = str(text).partition(":")  # an optimizer itself, given by mistake, is no name either
        if name not in _KNOWN:
            raise OptionError(f"unknown optimizer {name!r}; known are {', '.join(_KNOWN)}")
        if colon and form not in FORMS:
            raise OptionError(f"unknown form {form!r} of an optimizer; write for example '{name}:{FORMS[1]}'")
        return cls(name, form or ("foreach" if device_type == "cuda" else "for-loop"))

    @property
    def states(self) -> tuple[str, ...]:
        """What is kept for each parameter, as large as it."""
        return _KNOWN[self.name][0]

    @property
    def kernels(self) -> tuple[_Kernel, ...]:
        if self.form == "fused":
            return (_Kernel("step", ("gradient", *self.states, "parameter")),)
        return _KNOWN[self.name][1][self.form]


@dataclass(frozen=True)
class Trained:
    """A parameter that gets a gradient: the names of their storages, and the dtype."""

    parameter: str
    gradient: str
    dtype: str


def with_update(
    program: Program,
    optimizer: Optimizer,
    trained: Sequence[Trained],
    gone: Sequence[int],
    time: Callable[[int], float],
) -> Program:
    """The Program of forward and backward with the optimizer's state resident beside it and its update behind it.

    ``trained``: in the optimizer's order; ``gone``: storages that the caller holds no more once the backward has ended;
    ``time``: microseconds of a kernel that moves so many bytes.
    """
    return _Update(program, optimizer, trained, time).write(gone)


class _Update:
    def __init__(
        self, program: Program, optimizer: Optimizer, trained: Sequence[Trained], time: Callable[[int], float]
    ) -> None:
        self.program, self.optimizer, self.time = program, optimizer, time
        self.storages = list(program.storages)
        held = {s: None for s in program.resident}
        for step in program.steps:
            held |= dict.fromkeys(step.makes)
            for s in step.frees:
                del held[s]
        named = {program.storages[s].name: s for s in held}
        self.trained = trained
        self.roles = {
            "parameter": [named[t.parameter] for t in trained],
            "gradient": [named[t.gradient] for t in trained],
        }
        for state in optimizer.states:
            self.roles[state] = [self._like(s, state, Category.OPTIMIZER) for s in self.roles["parameter"]]
        self.states = [s for state in optimizer.states for s in self.roles[state]]
        self.bound: dict[str, list[int]] = {}  # temporaries by the name that holds them
        self.steps: list[Step] = []

    def write(self, gone: Sequence[int]) -> Program:
        if gone:
            self._free(gone)
        for batch in self._batches():
            for kernel in self.optimizer.kernels:
                self._run(kernel, batch)
        for held in self.bound.values():
            self._free(held)
        return replace(
            self.program,
            storages=tuple(self.storages),
            resident=(*self.program.resident, *self.states),
            steps=(*self.program.steps, *self.steps),
        )

    def _batches(self) -> list[list[int]]:
        """Indices of the parameters that are updated together."""
        if self.optimizer.form == "for-loop":
            return [[k] for k in range(len(self.trained))]
        groups: dict[str, list[int]] = defaultdict(list)
        for k, one in enumerate(self.trained):
            groups[one.dtype].append(k)
        return list(groups.values())

    def _run(self, kernel: _Kernel, batch: Sequence[int]) -> None:
        reads = [s for role in kernel.reads for s in self.bound.get(role) or [self.roles[role][k] for k in batch]]
        parameters = [self.roles["parameter"][k] for k in batch]
        makes = [self._like(s, kernel.makes, Category.TEMPORARY) for s in parameters] if kernel.makes else []
        changed = makes or reads[-len(batch) :]
        moved = sum(self.storages[s].size for s in (*reads, *changed))
        alone = self.optimizer.form == "for-loop"
        name = (
            f"{kernel.name}({self.storages[parameters[0]].name})" if alone else f"_{self.optimizer.form}_{kernel.name}"
        )
        self.steps.append(
            Step(StepKind.RUN, name, Phase.OPTIMIZER, tuple(dict.fromkeys(reads)), tuple(makes), time=self.time(moved))
        )
        if kernel.makes:
            self._free(self.bound.pop(kernel.makes, ()))
            self.bound[kernel.makes] = makes
        if kernel.spends:
            self._free(self.bound.pop(kernel.spends))

    def _like(self, parameter: int, role: str, category: Category) -> int:
        one = self.storages[parameter]
        self.storages.append(Storage(f"{one.name}.{role}", one.size, category, one.module, one.source))
        return len(self.storages) - 1

    def _free(self, storages: Sequence[int]) -> None:
        if storages:
            self.steps.append(Step(StepKind.FREE, "free", Phase.OPTIMIZER, frees=tuple(storages)))

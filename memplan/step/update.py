"""What torch.optim does to one parameter, as ops: the kernels of its ``foreach=False`` form, in its order.

An update is known by what decides which ops it has; every number (learning rate, betas, bias corrections) is an input
read at each step, so that schedules and warm starts need no new plan. The same bits as torch.optim with ``foreach=False``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import fx

from memplan.errors import UnsupportedError

aten = torch.ops.aten
Group = Mapping[str, Any]
State = MutableMapping[str, Any]
Emit = Callable[..., fx.Node]


class Update(ABC):
    """The update of one parameter. Two equal ones have the same ops."""

    states: tuple[str, ...]  # tensors of the optimizer's state, as large as the parameter
    scalars: tuple[str, ...]  # numbers that each step hands in

    @classmethod
    @abstractmethod
    def of(cls, group: Group) -> Self:
        """The update that a parameter group asks for."""

    @abstractmethod
    def begin(self, parameter: torch.Tensor, group: Group, state: State) -> tuple[float, ...]:
        """Make what the state lacks, as torch.optim does at the first step; returns the step's ``scalars``."""

    @abstractmethod
    def emit(self, emit: Emit, parameter: fx.Node, gradient: fx.Node, operands: Mapping[str, fx.Node]) -> None:
        """Append the ops; ``operands``: the states and scalars by name."""

    def end(self, state: State) -> None:
        """Count the step."""
        if "step" in state:
            state["step"] += 1


@dataclass(frozen=True)
class SGDUpdate(Update):
    """torch.optim.SGD."""

    maximize: bool
    decays: bool
    momentum: bool
    nesterov: bool

    @classmethod
    def of(cls, group: Group) -> Self:
        momentum = group["momentum"] != 0
        return cls(group["maximize"], group["weight_decay"] != 0, momentum, momentum and group["nesterov"])

    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def scalars(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("weight_decay", "momentum", "fresh", "rate")

    def begin(self, parameter: torch.Tensor, group: Group, state: State) -> tuple[float, ...]:
        fresh = 1.0 - group["dampening"]
        if self.momentum and state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            fresh = 1.0  # the first gradient is taken whole
        return group["weight_decay"], group["momentum"], fresh, -float(group["lr"])

    def emit(self, emit: Emit, parameter: fx.Node, gradient: fx.Node, operands: Mapping[str, fx.Node]) -> None:
        if self.maximize:
            gradient = emit(aten.neg.default, gradient)
        if self.decays:
            gradient = emit(aten.add.Tensor, gradient, parameter, alpha=operands["weight_decay"])
        if self.momentum:
            buffer = operands["momentum_buffer"]
            emit(aten.mul_.Tensor, buffer, operands["momentum"])
            emit(aten.add_.Tensor, buffer, gradient, alpha=operands["fresh"])
            if self.nesterov:
                gradient = emit(aten.add.Tensor, gradient, buffer, alpha=operands["momentum"])
            else:
                gradient = buffer
        emit(aten.add_.Tensor, parameter, gradient, alpha=operands["rate"])


@dataclass(frozen=True)
class AdamUpdate(Update):
    """torch.optim.Adam and AdamW."""

    maximize: bool
    decays: bool
    decoupled: bool
    amsgrad: bool

    @classmethod
    def of(cls, group: Group) -> Self:
        decoupled = group["decoupled_weight_decay"]
        return cls(group["maximize"], group["weight_decay"] != 0, decoupled, group["amsgrad"])

    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if self.amsgrad else []))

    @property
    def scalars(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("weight_decay", "toward", "beta2", "square", "root", "eps", "rate")

    def begin(self, parameter: torch.Tensor, group: Group, state: State) -> tuple[float, ...]:
        if "step" not in state:
            state["step"] = torch.tensor(0.0, dtype=_step_dtype())
            if group["fused"]:  # whose kernel wants it there
                state["step"] = torch.tensor(0.0, dtype=torch.float32, device=parameter.device)
        for name in self.states:
            if name not in state:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        rate, decay = float(group["lr"]), group["weight_decay"]
        beta1, beta2 = map(float, group["betas"])
        step = float(state["step"]) + 1
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        weight_decay = 1 - rate * decay if self.decoupled else decay
        return weight_decay, 1 - beta1, beta2, 1 - beta2, correction2**0.5, group["eps"], -(rate / correction1)

    def emit(self, emit: Emit, parameter: fx.Node, gradient: fx.Node, operands: Mapping[str, fx.Node]) -> None:
        mean, square = operands["exp_avg"], operands["exp_avg_sq"]
        if self.maximize:
            gradient = emit(aten.neg.default, gradient)
        if self.decays and self.decoupled:
            emit(aten.mul_.Tensor, parameter, operands["weight_decay"])
        elif self.decays:
            gradient = emit(aten.add.Tensor, gradient, parameter, alpha=operands["weight_decay"])
        emit(aten.lerp_.Scalar, mean, gradient, operands["toward"])
        emit(aten.mul_.Tensor, square, operands["beta2"])
        emit(aten.addcmul_.default, square, gradient, gradient, value=operands["square"])
        if self.amsgrad:
            largest = operands["max_exp_avg_sq"]
            emit(aten.maximum.out, largest, square, out=largest)
            square = largest
        root = emit(aten.sqrt.default, square)
        emit(aten.div_.Tensor, root, operands["root"])
        emit(aten.add_.Tensor, root, operands["eps"])
        emit(aten.addcdiv_.default, parameter, mean, root, value=operands["rate"])


def _step_dtype() -> torch.dtype:
    """As torch.optim counts steps: in float32, in float64 where that is the default."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


_UPDATES: dict[type[torch.optim.Optimizer], type[Update]] = {
    torch.optim.SGD: SGDUpdate,
    torch.optim.Adam: AdamUpdate,
    torch.optim.AdamW: AdamUpdate,
}


def updates_of(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, tuple[int, Update]]:
    """For each parameter the optimizer trains now, its group and its update. Raises UnsupportedError."""
    kind = _UPDATES.get(type(optimizer))  # not of a subclass: its step may be another
    if kind is None:
        raise UnsupportedError(f"the update of {type(optimizer).__name__} is not known to memplan")
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    if any(getattr(optimizer, name, None) for name in hooks):
        raise UnsupportedError("the optimizer has hooks around its step")
    found: dict[torch.Tensor, tuple[int, Update]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for flag in ("capturable", "differentiable"):
            if group.get(flag):
                raise UnsupportedError(f"{flag}=True of {type(optimizer).__name__}")
        update = kind.of(group)
        for parameter in group["params"]:
            if parameter.requires_grad:
                if parameter.is_complex():
                    raise UnsupportedError("a complex parameter")
                if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                    raise UnsupportedError("a hook on a parameter's gradient")
                found[parameter] = index, update
    return found

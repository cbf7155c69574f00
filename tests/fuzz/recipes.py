"""A random model as data: small enough to print in a failure, and to shrink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

import tests.fuzz.numerics  # noqa: F401 - adds to FUNCTIONS
from tests.fuzz.functions import FUNCTIONS, Tensor
from tests.fuzz.modules import MODULES

OUTPUTS = ("mean", "value", "view", "twice", "detached", "indices", "input", "nothing", "part", "parameter")


@dataclass(frozen=True)
class Recipe:
    """``blocks``: name and variant of each; ``outputs``: what of the values the model returns beside its loss."""

    blocks: tuple[tuple[str, int], ...]
    outputs: tuple[tuple[str, int], ...] = ()
    shape: tuple[int, int, int] = (2, 4, 8)  # batch, length, width
    alone: bool = True  # the first output is the loss itself, and nothing else is read
    mutates: bool = False  # writes into its second input, where there is one

    @property
    def loose(self) -> bool:
        """Holds arithmetic in 16 bits."""
        return any(name == "autocast" or name == "casts" and k in (1, 2) for name, k in self.blocks)


class Model(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        width = recipe.shape[2]
        self.blocks = nn.ModuleList(MODULES[name](width, k) for name, k in recipe.blocks if name in MODULES)
        self.bias = nn.Parameter(torch.linspace(-0.5, 0.5, width))

    def forward(self, x: Tensor, *, extra: Tensor | None = None) -> Any:
        past = [x + self.bias]
        modules = iter(self.blocks)
        for name, k in self.recipe.blocks:
            made = next(modules)(past[-1], past) if name in MODULES else FUNCTIONS[name](past[-1], past, k)
            past.append(made)
        if extra is not None:
            past.append(past[-1] * (extra.sin() if self.recipe.mutates else extra))
            if self.recipe.mutates:
                extra.mul_(0.5).add_(past[0].detach())
        loss = past[-1].square().mean()
        return (
            loss
            if self.recipe.alone
            else (loss, *(self._output(kind, past[k % len(past)], x) for kind, k in self.recipe.outputs))
        )

    def _output(self, kind: str, value: Tensor, x: Tensor) -> Any:
        return {
            "mean": lambda: value.mean(),
            "value": lambda: value,
            "view": lambda: value.transpose(1, 2)[:, ::2],
            "twice": lambda: {"same": value, "again": value.view(-1)},
            "detached": lambda: value.detach(),
            "indices": lambda: value.argmax(-1),
            "input": lambda: x,
            "nothing": lambda: None,
            "part": lambda: value[0],
            "parameter": lambda: self.bias,
        }[kind]()


SELDOM = st.sampled_from((False, False, False, True))
_TINY = st.tuples(st.sampled_from((2, 1, 3)), st.sampled_from((4, 2, 6)), st.sampled_from((8, 4, 12)))


def recipes(longest: int = 10, shapes: st.SearchStrategy[tuple[int, int, int]] = _TINY) -> st.SearchStrategy[Recipe]:
    block = st.tuples(st.sampled_from(sorted(FUNCTIONS) + sorted(MODULES)), st.integers(0, 3))
    outputs = st.lists(st.tuples(st.sampled_from(OUTPUTS), st.integers(0, 7)), max_size=4).map(tuple)
    return st.builds(
        Recipe,
        st.lists(block, min_size=1, max_size=longest).map(tuple),
        outputs,
        shapes,
        alone=st.booleans(),
        mutates=SELDOM,
    )


@dataclass(frozen=True)
class Run:
    """How a model is compiled and used."""

    budget: int | None = 60  # percent of the unplanned peak
    arbitrary: int | None = None  # seed of an arbitrary valid plan in place of the solver's
    peak: bool = False  # objective="peak", without a budget
    recompute: bool = True
    placement: bool = False
    fusion: bool = False
    reuse: bool = True
    disk: bool = False  # activations may go to a file
    profile: bool = False  # measure every op
    update: bool = False  # parameters change between the steps
    input_gradient: bool = False
    strided: bool = False  # the input is a view of a larger tensor
    aliased: bool = False  # a second input shares its memory
    other_batch: bool = False  # the last step has another batch size
    train: bool = True
    frozen: bool = False  # every other parameter
    beside: bool = False  # another compiled model runs between forward and backward

    @property
    def options(self) -> dict[str, Any]:
        given: dict[str, Any] = {
            "runtime_estimator": "profile" if self.profile else "analytic",
            "solver_work": 0.01,
            "solver_time_limit_s": 1.0,
            "recompute.enabled": self.recompute,
            "placement.enabled": self.placement,
            "reuse.enabled": self.reuse,
        }
        if self.disk:
            given["swap.tiers"] = "disk"
        if self.fusion:
            given |= {"fusion.enabled": True, "lowering": "eager"}
        if self.peak:
            given["objective"] = "peak"
        return given


def runs(arbitrary: bool) -> st.SearchStrategy[Run]:
    return st.builds(
        Run,
        budget=st.sampled_from((60, 90, 75, 40, 25, 5, 110)),
        arbitrary=st.integers(0, 10**6) if arbitrary else st.none(),
        peak=SELDOM,
        recompute=st.sampled_from((True, True, True, False)),
        placement=SELDOM,
        fusion=SELDOM,
        reuse=st.sampled_from((True, True, True, False)),
        disk=SELDOM,
        profile=SELDOM,
        update=st.booleans(),
        input_gradient=st.booleans(),
        strided=SELDOM,
        aliased=SELDOM,
        other_batch=SELDOM,
        train=st.sampled_from((True, True, True, True, False)),
        frozen=SELDOM,
        beside=SELDOM,
    )


def leaves(value: Any) -> Sequence[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]

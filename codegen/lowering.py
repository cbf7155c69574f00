"""One door to every lowering, and the callable that stands for a region in an fx graph."""

from __future__ import annotations

import shutil
from functools import cached_property
from typing import Any

import torch

from memplan import torch_compat
from memplan.codegen.compiled import CompiledRegion
from memplan.codegen.eager import compile_eager
from memplan.codegen.inductor_cpu import compile_inductor
from memplan.codegen.region import Region
from memplan.codegen.triton_launch import compile_triton
from memplan.errors import OptionError

LOWERINGS = ("triton", "inductor", "eager")


def default_lowering(device: str) -> str:
    """The fastest that is available: Triton on CUDA, Inductor's C++ where a compiler is found, else eager."""
    if device == "cuda":
        return "triton"
    return "inductor" if any(shutil.which(compiler) for compiler in ("g++", "clang++", "cl")) else "eager"


def compile_region(region: Region, lowering: str | None = None) -> CompiledRegion:
    """Compile for the region's device; ``lowering`` None means the default. Raises OptionError for an unknown one."""
    chosen = lowering or default_lowering(region.device)
    if chosen == "eager":
        return compile_eager(region)
    if chosen == "triton":
        return compile_triton(region)
    if chosen == "inductor":
        return compile_inductor(region)
    raise OptionError(f"unknown lowering {chosen!r}; one of {', '.join(LOWERINGS)}")


class FusedRegion:
    """The target of a ``call_function`` node: looks like one functional op, compiles at first need.

    Returns the output tensor itself when the region has one output, else a tuple.
    """

    def __init__(self, region: Region, lowering: str | None = None) -> None:
        self.region = region
        self.lowering = lowering
        self.__name__ = self.__qualname__ = f"region_{region.name}"

    @cached_property
    def compiled(self) -> CompiledRegion:
        return compile_region(self.region, self.lowering)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        fake = inputs and isinstance(inputs[0], torch_compat.FakeTensor)
        results = tuple(self.region.graph_module(*inputs)) if fake else self.compiled.run([*inputs])
        return results[0] if len(results) == 1 else results

    def __repr__(self) -> str:
        return self.__name__

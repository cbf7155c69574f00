"""One door to every lowering, and the callable that stands for a region in an fx graph."""

from __future__ import annotations

import shutil
from functools import cache, cached_property
from typing import Any

import torch

from memplan import torch_compat
from memplan.codegen.compiled import CompiledRegion, RegionFunction
from memplan.codegen.eager import compile_eager
from memplan.codegen.inductor_cpu import compile_inductor
from memplan.codegen.region import Region
from memplan.codegen.triton_launch import compile_triton
from memplan.errors import OptionError

LOWERINGS = ("triton", "inductor", "eager")


@cache
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

    Returns the output tensor itself when the region has one output, else a tuple. Raises AssertionError for operands that
    lie otherwise in memory than the region was compiled for.
    """

    def __init__(self, region: Region, lowering: str | None = None) -> None:
        self.region = region
        self.lowering = lowering
        self.__name__ = self.__qualname__ = f"region_{region.name}"

    @cached_property
    def compiled(self) -> CompiledRegion:
        return compile_region(self.region, self.lowering)

    @property
    def unchecked(self) -> RegionFunction:
        """What runs operands that are known to lie as they should: takes a list, returns a tuple, however many results."""
        return self.compiled.run

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if inputs and isinstance(inputs[0], torch_compat.FakeTensor):
            results = tuple(self.region.graph_module(*inputs))
        else:
            for value, expected in zip(inputs, self.region.inputs, strict=True):
                torch_compat.assert_size_stride(value, expected.shape, expected.stride)
                assert value.dtype == expected.dtype, f"{self}: {value.dtype} in place of {expected.dtype}"
            results = self.unchecked([*inputs])
        return results[0] if len(results) == 1 else results

    def __repr__(self) -> str:
        return self.__name__

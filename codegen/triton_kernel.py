"""The launch shape of a kernel, and what a region's kernels are once written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memplan.codegen.triton_values import Access


@dataclass(frozen=True)
class Tile:
    """The launch shape: ``x`` rows by ``r`` columns in a program; ``steps``: row tiles that one program takes in turn, so
    that its part of a column reduction stays in registers; ``looped``: the row is walked in chunks of ``r``."""

    x: int
    r: int = 1
    steps: int = 1
    warps: int = 4
    looped: bool = False


@dataclass(frozen=True)
class Kernel:
    """One launch. ``grid``: programs; ``tensors``: what to pass, by name (in3, out0, part1)."""

    name: str
    source: str
    grid: tuple[int, int]
    tensors: tuple[str, ...]
    warps: int


@dataclass(frozen=True)
class KernelPlan:
    """The kernels of a region, in launch order. ``parts``: numel and dtype of each buffer of partial results."""

    kernels: tuple[Kernel, ...]
    parts: tuple[tuple[int, torch.dtype], ...]
    accesses: tuple[Access, ...]
    tile: Tile

    @property
    def source(self) -> str:
        return "\n\n".join(k.source for k in self.kernels)

    @property
    def workspace(self) -> int:
        """Bytes of the partial results."""
        return sum(numel * dtype.itemsize for numel, dtype in self.parts)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)

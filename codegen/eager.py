"""The reference: a region run op by op, as eager PyTorch does. Also the fallback where no compiler is at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from memplan.codegen.region import Region

RegionFunction = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]


def compile_eager(region: Region) -> RegionFunction:
    """A function of the region's inputs that returns its outputs, each in memory of its own with the strides promised.

    A view among the outputs is copied: what eager returns would share the memory of a tensor that the planner frees.
    """
    graph_module = region.graph_module
    strides = tuple((t.shape, t.stride) for t in region.outputs)

    def run(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        results = []
        for value, (shape, stride) in zip(graph_module(*inputs), strides):
            if value.stride() != stride or value.storage_offset() != 0:
                value = value.new_empty_strided(shape, stride).copy_(value)
            results.append(value)
        return tuple(results)

    return run

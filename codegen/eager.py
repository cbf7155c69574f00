"""The reference: a region run op by op, as eager PyTorch does. Also the fallback where no compiler is at hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memplan.codegen.compiled import CompiledRegion
from memplan.codegen.region import Region


def compile_eager(region: Region) -> CompiledRegion:
    """Runs the region's graph. A view among the outputs is copied: eager's would share memory the planner frees."""
    graph_module = region.graph_module
    types = tuple((t.shape, t.stride) for t in region.outputs)

    def run(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        results = []
        for value, (shape, stride) in zip(graph_module(*inputs), types):
            if value.stride() != stride or value.storage_offset() != 0:
                value = value.new_empty_strided(shape, stride).copy_(value)
            results.append(value)
        return tuple(results)

    return CompiledRegion(run, _workspace(region), "eager")


def _workspace(region: Region) -> int:
    """An upper bound: every inner value at once."""
    results = set(region.graph_module.graph.output_node().all_input_nodes)
    inner = 0
    for node in region.op_nodes:
        values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
        if node not in results:
            inner += sum(v.numel() * v.dtype.itemsize for v in values if isinstance(v, torch.Tensor))
    return inner

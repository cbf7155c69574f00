"""What a kernel's results are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memplan.codegen.region import Region


def in_float64(region: Region, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The region's graph over float64 in place of every floating type."""
    wide = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}
    copied = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in region.graph_module.graph.nodes:
        values[node] = copied.node_copy(node, lambda n: values[n])
        values[node].args = torch.fx.node.map_aggregate(values[node].args, lambda v: wide.get(v, v))
        values[node].kwargs = torch.fx.node.map_aggregate(values[node].kwargs, lambda v: wide.get(v, v))
    module = torch.fx.GraphModule(torch.nn.Module(), copied)
    return list(module(*(t.double() if t.is_floating_point() else t for t in inputs)))


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error relative to the output's scale, finite elements only."""
    finite = torch.isfinite(exact) & torch.isfinite(found)
    if not finite.any():
        return 0.0
    scale = exact[finite].double().abs().max().clamp_min(1e-30)
    return float((found[finite].double() - exact[finite].double()).abs().max() / scale)


def same_kinds(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.isfinite(), expected.isfinite())

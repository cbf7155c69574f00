"""What every captured graph goes through before a Problem is read from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from memplan.passes.dtypes import KernelDtypes
from memplan.passes.duplicates import MergeDuplicates
from memplan.passes.masks import KnownMasks
from memplan.passes.slices import JoinSlices
from memplan.passes.views import MergeViews


@dataclass(frozen=True)
class Simplify:
    """Less to compute and to hold, with the same numbers, whatever the budget."""

    name: ClassVar[str] = "simplify"

    def apply(self, graph_module: fx.GraphModule) -> bool:
        """Returns whether the graph changed."""
        rewrites = (KernelDtypes(), KnownMasks(), JoinSlices(), MergeViews(), MergeDuplicates())
        modified = [rewrite.apply(graph_module) for rewrite in rewrites]  # each of them, whatever the first returns
        return any(modified)

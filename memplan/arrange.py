"""A lowered Program → the layout of its arena, kernels' own allocations included as they are seen before it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from memplan.cost import CostModel
from memplan.cost.measured import MeasuredCost
from memplan.cost.signature import Signature, signature
from memplan.cost.workspace import unseen
from memplan.lower import Lowered
from memplan.place import SCALAR, Kernel, Layout, fitted, place
from memplan.runtime import native
from memplan.runtime.kernels import addresses, matched

_Seen = tuple[tuple[int | None, ...], list[native.Allocation]]


class Arranger:
    """Layouts of one model's Programs; each op and shape is looked at once."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self._seen: dict[Signature, _Seen | None] = {}

    def layout(self, lowered: Lowered) -> Layout:
        """An arena for what torch's allocator hands out; what kernels take past it stays beside."""
        program, kernels = lowered.program, dict[int, Kernel]()
        workspaces: dict[int, int] = {}
        most = 0
        for at, (step, binding) in enumerate(zip(program.steps, lowered.bindings, strict=True)):
            node = binding.node
            if node is None:
                continue  # the caller's doing
            workspaces[at] = step.workspace
            if isinstance(node.target, torch._ops.OpOverload):
                past = unseen(signature(node), torch.get_num_threads())
                workspaces[at] = max(0, step.workspace - past)
                most = max(most, past)
                seen = self._look_at(node) if workspaces[at] > SCALAR else None
                recorded = matched(program, at, *seen) if seen is not None else None
                if recorded is not None:
                    kernels[at] = recorded.kernel
        return fitted(program, place(program, workspaces, most), kernels)[0]

    def _look_at(self, node: fx.Node) -> _Seen | None:
        """Where results lie and what was allocated, in a call on made-up operands; None where there are no measurements."""
        library = native.library()
        if library is None or not isinstance(self.cost, MeasuredCost):
            return None

        def watch(run: Callable[[], Any]) -> _Seen:
            made, allocations = native.observed(library, run)
            return addresses(made), allocations

        described = signature(node)
        if described not in self._seen:
            self._seen[described] = self.cost.observe(node, watch)
        return self._seen[described]

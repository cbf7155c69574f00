"""A scheduled graph as pure data: runs over copies of storages, for the solvers that rearrange a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from memplan import torch_compat
from memplan.build_problem import BUFFER, OP, TANGENTS, view_source
from memplan.capture import input_nodes, is_getitem, is_tangent, tensors
from memplan.passes.schedule import Scheduled
from memplan.problem import Problem
from memplan.solvers.fusion import FusionProblem, Run


class RunGraph:
    """``problem``: the runs, in the graph's order. ``members[i]``: the nodes that run i evaluates, its kernel first (none
    for the arrival of the tangents). ``behind[node]``: the storage copies behind its tensors, by fake storage key."""

    def __init__(
        self, scheduled: Scheduled, base: Problem, may_fuse: Callable[[fx.Node], bool], launch_bytes: int
    ) -> None:
        self.scheduled, self.base = scheduled, base
        *self.nodes, self.output = scheduled.graph_module.graph.nodes
        self.position = {node: at for at, node in enumerate(self.nodes)}
        self.members: list[list[fx.Node]] = []
        self.run_of: dict[fx.Node, int] = {}
        self.behind: dict[fx.Node, dict[int, int]] = {}
        self._sizes: list[int] = []
        self._first: dict[int, int] = {}  # op of the base problem -> its first run
        self._all: dict[int, list[int]] = {}  # ... and all of them
        self._may_fuse = may_fuse
        runs = tuple(self._runs())
        held = [*input_nodes(self.output), *(n for n in self.nodes if is_tangent(n))]  # by the caller, to the end
        kept = frozenset(c for n in held for c in self.behind.get(n, {}).values())
        self.problem = FusionProblem(runs, tuple(self._sizes), kept, launch_bytes)

    def place(self, run: int) -> int:
        """Position of the run's kernel in the graph; the tangents arrive where the backward begins."""
        nodes = self.members[run]
        return self.position[nodes[0]] if nodes else self.scheduled.forward_nodes

    def holder(self, run: int, made: int) -> fx.Node:
        """The node of a run whose value is the copy ``made`` itself: the kernel, or a getitem of its tuple."""
        tensors_ = (n for n in self.members[run] if isinstance(n.meta["val"], torch.Tensor))
        return next(n for n in tensors_ if made in self.behind[n].values())

    def _runs(self) -> Iterator[Run]:
        boundary = self.scheduled.forward_nodes
        late = [n for n in self.nodes if is_tangent(n)]
        for node in self.nodes:
            if node.op == "placeholder" and node not in late:
                self._store(node)
        for at, node in enumerate(self.nodes):
            if at == boundary and late:
                self.members.append([])
                yield Run(TANGENTS, writes=tuple(c for n in late for c in self._store(n)))
            if node.op == "placeholder":
                continue
            if node.op == "call_function" and OP in node.meta and not is_getitem(node):
                yield self._run(node, domain=int(at >= boundary))
            else:
                self._store(node)
                if is_getitem(node) and node.args[0] in self.run_of:
                    self.run_of[node] = self.run_of[node.args[0]]  # type: ignore[index]
                    self.members[self.run_of[node]].append(node)

    def _run(self, node: fx.Node, domain: int) -> Run:
        op = self.base.ops[node.meta[OP]]
        index = len(self.members)
        self.members.append([node])
        self.run_of[node] = index
        self._first.setdefault(node.meta[OP], index)
        reads = tuple(dict.fromkeys(c for a in input_nodes(node) for c in self.behind.get(a, {}).values()))
        self._all.setdefault(node.meta[OP], []).append(index)
        after = (
            *(self._first[j] for j in op.after if self._first.get(j, index) != index),
            *(run for j in op.after_all for run in self._all[j]),
        )
        fusible = not op.once and not op.mutates and self._may_fuse(node)
        return Run(node.name, reads, self._store(node), after, domain if fusible else -1, op.workspace)

    def _store(self, node: fx.Node) -> tuple[int, ...]:
        """Find the copies behind a node's tensors; returns those that it makes."""
        known = {k: c for a in input_nodes(node) for k, c in self.behind.get(a, {}).items()}
        seen = self.behind[node] = {}
        source = view_source(node)
        fresh: list[int] = []
        for tensor in tensors(node.meta.get("val")):
            key = torch_compat.storage_key(tensor)
            if key in seen:
                continue
            if key in known:
                seen[key] = known[key]
            elif source is not None:
                seen[key] = next(iter(self.behind[source].values()))
            else:
                seen[key] = len(self._sizes)
                fresh.append(seen[key])
                self._sizes.append(self._size(node, tensor, len(fresh) - 1))
        return tuple(fresh)

    def _size(self, node: fx.Node, tensor: torch.Tensor, place: int) -> int:
        if node.op == "call_function" and OP in node.meta:
            return self.base.buffers[self.base.ops[node.meta[OP]].writes[place]].size
        if BUFFER in node.meta:
            return self.base.buffers[node.meta[BUFFER]].size
        return torch_compat.size_hint(tensor.untyped_storage().nbytes())

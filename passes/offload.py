"""Send copies to slower tiers and bring them back, as the plan says: one call each for start and end of a transfer.

The graph keeps the plan's order; readers after a stay read the copy that came back, and views of it are made anew.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from memplan.build_problem import BUFFER, OP, RECOMPUTE, TANGENTS, BuiltProblem
from memplan.capture import input_nodes, is_getitem
from memplan.errors import UnsupportedError
from memplan.outcome import Limits
from memplan.passes.copying import holders, resolve
from memplan.passes.schedule import Scheduled
from memplan.plans import Offload as Stay
from memplan.program import StepKind
from memplan.runtime import tiers
from memplan.runtime.space import ALIGNMENT, aligned
from memplan.solvers.placement import PlacementProblem, solve_placement

MOVE = "memplan_move"  # node meta: the Move of a node that transfers, and runs no kernel
_STORE = "memplan_store"  # node meta: keeps the store alive whose number is among the node's arguments
_WORK = 0.1  # of the placement's default effort: a tier has room to spare


@dataclass(frozen=True)
class Move:
    """What a transfer's node is in the Program."""

    kind: StepKind
    tier: str


@dataclass(frozen=True)
class Offload:
    """``stays``: the plan's, by positions of its ``sequence``. ``directory``: of the disk tier's file; ``limits``: most
    bytes of each tier, where it has a limit."""

    name: ClassVar[str] = "offload"
    sequence: Sequence[int]
    stays: Sequence[Stay]
    directory: str | None = None
    limits: Mapping[str, int] = field(default_factory=dict)

    def apply(self, built: BuiltProblem, scheduled: Scheduled) -> Scheduled:
        """Raises UnsupportedError where a copy cannot be replaced in its readers."""
        contents = _contents(self, built)
        actions = _Actions(self, built, scheduled, contents)
        places = _Places(self, built, contents)
        return _Writer(self.stays, contents, actions, scheduled, places).write()


def _contents(offload: Offload, built: BuiltProblem) -> list[int]:
    """For each stay the one whose copy-out sent what it brings back, itself included; -1 where a home has it."""
    ops, buffers = built.problem.ops, built.problem.buffers
    changed: dict[int, list[int]] = defaultdict(list)
    for position, op in enumerate(offload.sequence):
        for b in ops[op].mutates:
            changed[b].append(position)
    there: dict[tuple[int, int], dict[str, int]] = {}
    returned: dict[tuple[int, int], int] = {}
    found = [-1] * len(offload.stays)
    for k, stay in sorted(enumerate(offload.stays), key=lambda item: (item[1].out_from, item[1].in_until)):
        key, home = (stay.buffer, stay.made_at), buffers[stay.buffer].home
        has = there.setdefault(key, {home: -1} if home else {})
        if any(returned.get(key, stay.made_at + 1) <= p < stay.out_from for p in changed[stay.buffer]):
            has.clear()
        found[k] = has.setdefault(stay.tier, k)
        returned[key] = stay.in_until
    return found


class _Actions:
    """Where in the scheduled graph each stay's transfers start and end."""

    def __init__(self, offload: Offload, built: BuiltProblem, scheduled: Scheduled, contents: Sequence[int]) -> None:
        self.nodes = list(scheduled.graph_module.graph.nodes)[:-1]
        self.boundary = scheduled.forward_nodes
        names = [built.problem.ops[op].name for op in offload.sequence]
        self.handover = names.index(TANGENTS) if TANGENTS in names else len(names)
        kernels = [at for at, n in enumerate(self.nodes) if _is_kernel(n)]
        runs = [p for p in range(len(names)) if p != self.handover]
        self.kernel_at = dict(zip(runs, kernels, strict=True))  # position -> index of its node
        self.end, self.contents = len(names), contents
        self.homes = [bool(buffer.home) for buffer in built.problem.buffers]
        found = [action for k, stay in enumerate(offload.stays) for action in self._of(k, stay)]
        self.before: dict[int, list[tuple[str, int]]] = defaultdict(list)  # index -> (what, stay), forward's part
        self.after: dict[int, list[tuple[str, int]]] = defaultdict(list)  # the same, behind the boundary
        for _, _, _, k, what, index, late in sorted(found):
            (self.after if late else self.before)[index].append((what, k))

    def _of(self, k: int, stay: Stay) -> list[tuple[int, int, int, int, str, int, bool]]:
        """(position, rank at it, when it ends, stay, what, index, behind the boundary), in the order of the rules.

        A copy that is read in the backward starts to come back there: what crosses from the forward must be whole.
        """
        home = self.homes[stay.buffer]
        actions = []
        if self.contents[k] == k:
            actions.append((stay.out_from, 0, stay.out_until, "start_out"))
        if not (home and stay.out_until == 0):
            actions.append((stay.out_until, 1, stay.out_until, "end_out"))
        if not (home and stay.in_from == self.end):
            crosses = stay.in_from <= self.handover < stay.in_until
            start = self.handover + 1 if crosses else stay.in_from
            actions += [(start, 2, stay.in_until, "start_in"), (stay.in_until, 3, stay.in_until, "end_in")]
        return [(position, rank, until, k, what, *self._index(position)) for position, rank, until, what in actions]

    def _index(self, position: int) -> tuple[int, bool]:
        """The node before which the transfers of a position stand: behind the run before it and its results."""
        if position == 0:
            return next((at for at, n in enumerate(self.nodes) if n.op != "placeholder"), len(self.nodes)), False
        if position - 1 == self.handover:
            return self.boundary, True
        at = self.kernel_at[position - 1] + 1
        kernel = self.nodes[at - 1]
        while at < len(self.nodes) and is_getitem(self.nodes[at]) and self.nodes[at].args[0] is kernel:
            at += 1
        return at, at >= self.boundary and position > self.handover


class _Places:
    """The stores of the tiers, and which place in its store each stay's copy has."""

    def __init__(self, offload: Offload, built: BuiltProblem, contents: Sequence[int]) -> None:
        stays, buffers = offload.stays, built.problem.buffers
        lives: dict[str, dict[int, int]] = {stay.tier: {} for stay in stays}  # tier -> copy-out -> end of its bytes
        for stay, k in zip(stays, contents, strict=True):
            if k >= 0 and stay.tier != buffers[stay.buffer].home:  # what goes home has its place there
                lives[stay.tier][k] = max(lives[stay.tier].get(k, 0), stay.in_until + 1)
        self.site: dict[int, int] = {}  # copy-out -> its place among the sites of its tier's store
        self.store: dict[str, tiers.Store] = {}
        for tier, ends in lives.items():
            sizes = tuple(aligned(buffers[stays[k].buffer].size) for k in ends)
            problem = PlacementProblem(tuple(stays[k].out_from for k in ends), tuple(ends.values()), sizes, ALIGNMENT)
            placement = solve_placement(problem, limits=Limits(work=_WORK))
            sites = list(zip(placement.offsets, sizes, strict=True))
            self.store[tier] = tiers.Store(
                sites, placement.height, offload.directory, offload.limits.get(tier), pinned=tier == "host"
            )
            self.site |= {k: site for site, k in enumerate(ends)}


class _Writer:
    """Copies the scheduled graph node by node, with the transfers between its runs."""

    def __init__(
        self,
        stays: Sequence[Stay],
        contents: Sequence[int],
        actions: _Actions,
        scheduled: Scheduled,
        places: _Places,
    ) -> None:
        self.stays, self.contents, self.actions = stays, contents, actions
        self.scheduled, self.places = scheduled, places
        self.new = fx.Graph()
        self.now: dict[fx.Node, fx.Node] = {}  # scheduled node -> the node that has its value from here on
        self.tickets: dict[int, fx.Node] = {}  # copy-out -> what stands for its contents
        self.at_home: dict[int, fx.Node] = {}  # buffer -> what stands for its contents at home
        self.back: dict[int, fx.Node] = {}  # stay -> its copy on the way back
        self.holder = [self._holder(stay) for stay in stays]
        self.aliases = _aliases(actions.nodes)

    def write(self) -> Scheduled:
        forward_nodes = -1
        nodes = self.actions.nodes
        for at in range(len(nodes) + 1):
            self._run(self.actions.before[at])
            if at == self.scheduled.forward_nodes:
                forward_nodes = len(self.new.nodes)
            self._run(self.actions.after[at])
            if at < len(nodes):
                self._copy(nodes[at])
        output = self.scheduled.graph_module.graph.output_node()
        out = self.new.output(fx.node.map_arg(output.args[0], self._resolve))
        out.meta = copy.copy(output.meta)
        return Scheduled(fx.GraphModule(self.scheduled.graph_module, self.new), forward_nodes)

    def _run(self, actions: Sequence[tuple[str, int]]) -> None:
        for what, k in actions:
            getattr(self, f"_{what}")(k, self.stays[k])

    def _start_out(self, k: int, stay: Stay) -> None:
        source = self.now[self.holder[k]]
        if k in self.places.site:
            store = self.places.store[stay.tier]
            args = (source, store.number, self.places.site[k])
            self.tickets[k] = self._ticket(tiers.offload, args, StepKind.OFFLOAD, stay.tier, source)
        else:
            changed = (source, self._home(k, stay))
            self.at_home[stay.buffer] = self._ticket(tiers.restore, changed, StepKind.OFFLOAD, stay.tier, source)

    def _end_out(self, k: int, stay: Stay) -> None:
        self._move(tiers.written, (self._away(k, stay), self.now[self.holder[k]]), StepKind.WAIT, stay.tier)

    def _start_in(self, k: int, stay: Stay) -> None:
        holder = self.holder[k]
        back = self._move(tiers.prefetch, (self._away(k, stay),), StepKind.PREFETCH, stay.tier)
        back.meta |= {key: value for key, value in holder.meta.items() if key not in (OP, RECOMPUTE, MOVE)}
        self.back[k] = back

    def _end_in(self, k: int, stay: Stay) -> None:
        self._move(tiers.wait, (self._away(k, stay), self.back[k]), StepKind.WAIT, stay.tier)
        for node in self.aliases[self.holder[k]]:
            self.now.pop(node, None)
        self.now[self.holder[k]] = self.back.pop(k)

    def _away(self, k: int, stay: Stay) -> fx.Node:
        """What stands for the contents of a stay."""
        ticket = self.tickets.get(self.contents[k])
        return self._home(k, stay) if ticket is None else ticket

    def _home(self, k: int, stay: Stay) -> fx.Node:
        if stay.buffer not in self.at_home:
            source = self.now[self.holder[k]]
            args = (source, self.places.store[stay.tier].number)
            self.at_home[stay.buffer] = self._ticket(tiers.home, args, StepKind.HOME, stay.tier, source)
        return self.at_home[stay.buffer]

    def _ticket(
        self, call: Callable[..., Any], args: tuple[Any, ...], kind: StepKind, tier: str, source: fx.Node
    ) -> fx.Node:
        ticket = self._move(call, args, kind, tier)
        ticket.meta["val"] = source.meta["val"].new_empty(1, dtype=torch.int64, device="cpu")
        ticket.meta[_STORE] = self.places.store[tier]
        return ticket

    def _move(self, call: Callable[..., Any], args: tuple[Any, ...], kind: StepKind, tier: str) -> fx.Node:
        node = self.new.call_function(call, args)
        node.meta[MOVE] = Move(kind, tier)
        return node

    def _holder(self, stay: Stay) -> fx.Node:
        """The scheduled node whose value is the copy: the kernel of its run, or a getitem of it."""
        nodes = self.actions.nodes
        if stay.made_at < 0:
            kernel, values = nodes[0], [n for n in nodes if n.op == "placeholder"]
        else:
            kernel = nodes[self.actions.kernel_at[stay.made_at]]
            values = [n for n in (kernel, *kernel.users) if n is kernel or is_getitem(n)]
        found = [n for n in values if isinstance(n.meta.get("val"), torch.Tensor) and n.meta.get(BUFFER) == stay.buffer]
        if len(found) != 1:
            raise UnsupportedError(f"{kernel.name}: {len(found)} values that share a storage to offload")
        return found[0]

    def _resolve(self, node: fx.Node) -> fx.Node:
        """The node that has a value from here on; views of a copy that came back are made anew."""
        return resolve(node, self.now, self._again)

    def _again(self, node: fx.Node) -> None:
        if node.op != "call_function" or OP in node.meta:
            raise UnsupportedError(f"{node.name}: a second value of a storage that was offloaded")
        self._copy(node)

    def _copy(self, node: fx.Node) -> None:
        for operand in input_nodes(node):
            self._resolve(operand)
        self.now[node] = self.new.node_copy(node, lambda n: self.now[n])


def _is_kernel(node: fx.Node) -> bool:
    return node.op == "call_function" and OP in node.meta and not is_getitem(node)


def _aliases(nodes: Sequence[fx.Node]) -> Mapping[fx.Node, list[fx.Node]]:
    """For each node that holds a storage first, the other nodes whose values look at it."""
    found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node, held in holders(nodes).items():
        for holder in held:
            if holder is not node:
                found[holder].append(node)
    return found


def stores(graph_module: fx.GraphModule) -> dict[str, tiers.Store]:
    """The stores that an offloaded graph uses, by tier."""
    moves = [n for n in graph_module.graph.nodes if _STORE in n.meta]
    return {n.meta[MOVE].tier: n.meta[_STORE] for n in moves}

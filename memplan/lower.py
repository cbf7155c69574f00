"""A graph in plan order → the Program that runs it: one step a node, storages freed after their last reader."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import fx

from memplan import torch_compat
from memplan.build_problem import BUFFER, OP, RECOMPUTE, TANGENTS, view_source
from memplan.capture import input_nodes, is_getitem, is_tangent, tensors
from memplan.passes.offload import MOVE
from memplan.passes.reuse import overwritten
from memplan.problem import Buffer, Category, Phase, Problem
from memplan.program import Program, Step, StepKind, Storage


@dataclass(frozen=True)
class Binding:
    """What a step does at run time: call ``node``'s target, put its results into slots, clear slots.

    ``results``: (place in the returned tuple, slot); place -1 is the returned value itself.
    """

    node: fx.Node | None = None
    results: tuple[tuple[int, int], ...] = ()
    drops: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lowered:
    """A Program and how to run it; ``bindings[i]`` belongs to ``program.steps[i]``.

    The first ``inputs`` slots hold the arguments; ``outputs`` are nodes (read from their slots) or constants.
    """

    program: Program
    bindings: tuple[Binding, ...]
    slot_of: dict[fx.Node, int]
    inputs: int
    outputs: tuple[object, ...]


def lower(graph_module: fx.GraphModule, problem: Problem, forward_nodes: int) -> Lowered:
    """Kernel nodes carry the op of ``problem`` they run in ``meta[OP]``; the first ``forward_nodes`` nodes of the graph
    are the forward's (0 for a backward graph)."""
    return _Lowering(graph_module, problem, forward_nodes).lower()


class _Lowering:
    def __init__(self, graph_module: fx.GraphModule, problem: Problem, forward_nodes: int) -> None:
        *self.nodes, self.output = graph_module.graph.nodes
        self.problem = problem
        self.backward_from = forward_nodes
        self.storages: list[Storage] = []
        self.behind: dict[fx.Node, dict[int, int]] = {}  # node -> its fake tensors' storage keys -> storages
        self.given: dict[int, int] = {}  # storage keys of arguments and constants -> storages
        self.slot_of: dict[fx.Node, int] = {}
        self.steps: list[Step] = []
        self.bindings: list[Binding] = []

    def lower(self) -> Lowered:
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        late = [n for n in inputs if is_tangent(n)] if self.backward_from else []  # joint graphs only
        for node in inputs:
            self._slot(node)
        resident = [s for n in inputs for s in self._stored(n) if not self._has_home(n)]
        resident += [s for n in self.nodes if n.op == "get_attr" for s in self._stored(n)]
        saved = [n for n in inputs if (OP in n.meta or MOVE in n.meta) and not is_tangent(n)]
        owned = {s for n in inputs if n not in saved for s in self.behind[n].values()}
        owned |= {s for n in self.nodes if n.op == "get_attr" for s in self.behind[n].values()}
        made = {node: self._stored(node) for node in self.nodes if node.op not in ("placeholder", "get_attr")}
        deaths, drops = self._deaths(owned)

        tangents = [s for n in late for s in self.behind[n].values()]
        self._free(deaths[-1], drops[-1])
        for at, node in enumerate(self.nodes):
            if tangents and at == self.backward_from:
                self._handover(tangents)
            if node.op != "placeholder" and not self._with_its_kernel(node):
                self._call(at, node, made.get(node, []))
            self._free(deaths[at], drops[at])
        if tangents and self.backward_from >= len(self.nodes):  # a backward in which nothing runs
            self._handover(tangents)
        program = Program(
            tuple(self.storages),
            tuple(s for s in dict.fromkeys(resident) if s not in tangents),
            tuple(self.steps),
            self.problem.tiers,
        )
        outputs = tuple(self.output.args[0])  # type: ignore[arg-type]
        return Lowered(program, tuple(self.bindings), self.slot_of, len(inputs), outputs)

    def _handover(self, tangents: list[int]) -> None:
        """The caller hands the output's gradients to the backward."""
        workspace = next(op.workspace for op in self.problem.ops if op.name == TANGENTS)
        self._emit(Step(StepKind.RUN, TANGENTS, Phase.BACKWARD, makes=tuple(tangents), workspace=workspace), Binding())

    def _slot(self, node: fx.Node) -> int:
        return self.slot_of.setdefault(node, len(self.slot_of))

    def _stored(self, node: fx.Node) -> list[int]:
        """Find the storages behind a node's tensors; returns those that the node makes."""
        given = node.op in ("placeholder", "get_attr") and not is_tangent(node)  # arguments may be views of one storage
        operands = reversed(input_nodes(node))  # where keys clash, the first operand is the one an op looks at
        known = self.given if given else {key: s for a in operands for key, s in self.behind[a].items()}
        seen = self.behind[node] = {}
        fresh: list[int] = []
        for tensor in tensors(node.meta.get("val")):
            key = torch_compat.storage_key(tensor)
            if key in seen:
                continue
            source = overwritten(node) or view_source(node)
            if key in known:
                seen[key] = known[key]
            elif source is not None:
                seen[key] = next(iter(self.behind[source].values()))
            else:
                seen[key] = len(self.storages)
                fresh.append(seen[key])
                if given:
                    self.given[key] = seen[key]
                self.storages.append(self._storage(node, tensor, len(fresh) - 1))
        return fresh

    def _storage(self, node: fx.Node, tensor: object, place: int) -> Storage:
        """Sizes and categories are the Problem's; a saved value or an input that no op makes tells its own size."""
        op = node.meta.get(OP)
        if op is not None and node.op != "placeholder":
            return _as_storage(self.problem.buffers[self.problem.ops[op].writes[place]])
        if MOVE in node.meta and node.meta[MOVE].kind in (StepKind.OFFLOAD, StepKind.HOME):
            return Storage(node.name, 0, Category.TEMPORARY)  # a ticket: a number in memory that no allocator counts
        buffer = node.meta.get(BUFFER)
        if buffer is not None:
            return _as_storage(self.problem.buffers[buffer])
        size = torch_compat.size_hint(tensor.untyped_storage().nbytes())  # type: ignore[attr-defined]
        return Storage(str(node.target), size, Category.INPUT)

    def _has_home(self, node: fx.Node) -> bool:
        """Whether an argument lies on a slower tier, and takes no bytes of the device."""
        return BUFFER in node.meta and bool(self.problem.buffers[node.meta[BUFFER]].home)

    def _with_its_kernel(self, node: fx.Node) -> bool:
        """Getitems of a kernel's tuple are filled by the kernel's own step."""
        return is_getitem(node) and OP in node.meta and node.args[0] in self.behind

    def _deaths(self, owned: set[int]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """For each node position the storages that die after it, and the slots to clear then. -1: before the first."""
        last_use = {node: at if node.op != "placeholder" else -1 for at, node in enumerate(self.nodes)}
        for at, node in enumerate(self.nodes):
            for source in input_nodes(node):
                last_use[source] = at
        for source in input_nodes(self.output):
            last_use[source] = len(self.nodes)
        death: dict[int, int] = {}
        for node, keys in self.behind.items():
            for s in keys.values():
                death[s] = max(death.get(s, -1), last_use[node])
        deaths: dict[int, list[int]] = defaultdict(list)
        for s, at in death.items():
            if s not in owned and at < len(self.nodes):
                deaths[at].append(s)
        drops: dict[int, list[int]] = defaultdict(list)
        for node, keys in self.behind.items():
            stored = set(keys.values()) - owned
            if not stored or self._is_tuple(node):
                continue
            at = max(death[s] for s in stored) if len(stored) == 1 else last_use[node]
            if at < len(self.nodes):
                drops[at].append(self._slot(node))
        return deaths, drops

    def _is_tuple(self, node: fx.Node) -> bool:
        """A kernel whose value is read only through its own getitems needs no slot for the tuple."""
        is_list = isinstance(node.meta.get("val"), (list, tuple))
        return is_list and all(self._with_its_kernel(u) for u in node.users)

    def _call(self, at: int, node: fx.Node, made: list[int]) -> None:
        backward = at >= self.backward_from
        phase = Phase.BACKWARD if backward else Phase.FORWARD
        reads = tuple(dict.fromkeys(s for a in input_nodes(node) for s in self.behind[a].values()))
        if self._is_tuple(node):
            results = tuple((int(u.args[1]), self._slot(u)) for u in node.users)  # type: ignore[arg-type]
        else:
            results = ((-1, self._slot(node)),)
        index = node.meta.get(OP)
        if MOVE in node.meta:
            move = node.meta[MOVE]
            held = () if move.kind == StepKind.HOME else reads
            step = Step(move.kind, node.name, phase, held, tuple(made), tier=move.tier)
        elif index is None or is_getitem(node) or node.op == "get_attr":
            step = Step(StepKind.VIEW, node.name, phase, reads)
        else:
            op = self.problem.ops[index]
            step = Step(
                StepKind.RUN,
                node.name,
                op.phase if op.phase == Phase.OPTIMIZER else phase,
                reads,
                tuple(made),
                workspace=op.workspace,
                time=op.time,
                recompute=bool(node.meta.get(RECOMPUTE)),
            )
        self._emit(step, Binding(node, results))

    def _free(self, storages: list[int], slots: list[int]) -> None:
        if storages or slots:
            self._emit(Step(StepKind.FREE, "free", self._phase(), frees=tuple(storages)), Binding(drops=tuple(slots)))

    def _phase(self) -> Phase:
        return self.steps[-1].phase if self.steps else (Phase.FORWARD if self.backward_from else Phase.BACKWARD)

    def _emit(self, step: Step, binding: Binding) -> None:
        self.steps.append(step)
        self.bindings.append(binding)


def _as_storage(buffer: Buffer) -> Storage:
    return Storage(buffer.name, buffer.size, buffer.category, buffer.module, buffer.source)

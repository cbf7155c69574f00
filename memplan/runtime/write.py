"""The text of a Program: one Python function a kernel, its operands' slots written out.

On small tensors a step's time is that of its calls, and every second one is a view's. So what a view comes to is written
where it is read, and what dies after a kernel is dropped in the kernel's function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import fx

from memplan import torch_compat
from memplan.codegen.lowering import FusedRegion
from memplan.lower import Binding, Lowered
from memplan.program import StepKind
from memplan.runtime.own import KERNELS
from memplan.runtime.views import Alias, looked_at

Slots = list[Any]
Call = Callable[[Slots], Any]  # returns what the kernel returned


@dataclass(frozen=True)
class Calls:
    """What runs a Program, in order; ``steps[i]`` is the first of the Program's steps that ``functions[i]`` does."""

    functions: list[Call]
    steps: Sequence[int]


def one_a_step(module: fx.GraphModule, lowered: Lowered) -> Calls:
    """Every step as a function, every view by the op that the graph has for it."""
    writer = _Writer(module, lowered.slot_of)
    parts = [[binding] for binding in lowered.bindings]
    return Calls(writer.functions(parts), range(len(parts)))


def one_a_kernel(module: fx.GraphModule, lowered: Lowered, known: Mapping[fx.Node, Alias]) -> Calls:
    """Functions of a kernel and all that follows until the next, for operands that lie as a first run showed.

    Views that are ``known`` are made where they are read; results that show an argument are left to their ops, which tell
    autograd. Regions do not look how their operands lie.
    """
    results = {value for value in lowered.outputs if isinstance(value, fx.Node)}
    of_arguments = {view for view in results & known.keys() if known[view].root.op == "placeholder"}
    known = {view: alias for view, alias in known.items() if view not in of_arguments}
    unread = _unread(lowered, known.keys() - results)
    empty = {lowered.slot_of[node] for node in unread if node in lowered.slot_of}
    writer = _Writer(module, lowered.slot_of, known, empty)
    parts: list[list[Binding]] = []
    first: list[int] = []
    kinds = (step.kind for step in lowered.program.steps)
    for at, (kind, binding) in enumerate(zip(kinds, lowered.bindings, strict=True)):
        if binding.node in unread:
            continue
        if not parts or kind not in (StepKind.VIEW, StepKind.FREE):
            parts.append([])
            first.append(at)
        parts[-1].append(binding)
    return Calls(writer.functions(parts), first)


def _unread(lowered: Lowered, known: set[fx.Node]) -> set[fx.Node]:
    """Views whose slots nobody reads: those that are known, and those that only such views look at."""
    unread = set(known)
    for node in reversed(lowered.slot_of):
        if looked_at(node) is not None and unread >= node.users.keys():
            unread.add(node)
    return unread


class _Writer:
    """The text of steps; what it cannot spell it names in ``constants``."""

    def __init__(
        self,
        module: fx.GraphModule,
        slot_of: Mapping[fx.Node, int],
        known: Mapping[fx.Node, Alias] | None = None,
        empty: AbstractSet[int] = frozenset(),
    ) -> None:
        """``known``: views that need no op; None where a first run has not shown how anything lies. ``empty``: slots that
        are never filled."""
        self._module = module
        self._slot_of = slot_of
        self._known = known or {}
        self._empty = empty
        self._checked = known is None
        # None of the functions is put here: those that know it would be cyclic garbage.
        self._constants: dict[str, Any] = {"__view": torch_compat.reinterpret}

    def functions(self, parts: Sequence[Sequence[Binding]]) -> list[Call]:
        """One a part, named after the first node in it, whose value it returns."""
        calls: list[Call] = []
        text = []
        for part in parts:
            name = next((binding.node.name for binding in part if binding.node is not None), "free")
            lines = [f" {line}" for at, b in enumerate(part) for line in self._lines(b, "other" if at else "value")]
            text += [f"def {name}(slots):", " value = None", *lines, " return value", f"__calls.append({name})"]
        exec(compile("\n".join(text), "<memplan program>", "exec"), self._constants, {"__calls": calls})  # noqa: S102 - our own text
        return calls

    def _lines(self, binding: Binding, value: str) -> list[str]:
        """``value``: the name that what the step makes is given."""
        node = binding.node
        if node is None:
            return [f"slots[{slot}] = None" for slot in binding.drops if slot not in self._empty]
        if node.op == "get_attr":
            return [f"slots[{binding.results[0][1]}] = {self._named(attrgetter(str(node.target))(self._module))}"]
        call = f"{value} = {self._operand(node) if node in self._known else self._called(node)}"
        kept = [
            f"slots[{slot}] = {value}" + (f"[{place}]" if place >= 0 else "")
            for place, slot in binding.results
            if slot not in self._empty
        ]
        return [call, *kept]

    def _called(self, node: fx.Node) -> str:
        given = ", ".join([*map(self._text, node.args), *(f"{k}={self._text(v)}" for k, v in node.kwargs.items())])
        if self._checked or not isinstance(node.target, FusedRegion):
            return f"{self._named(KERNELS.get(node.target) or torch_compat.direct(node.target))}({given})"
        only = "[0]" if len(node.target.region.outputs) == 1 else ""
        return f"{self._named(node.target.unchecked)}([{given}]){only}"

    def _text(self, value: Any) -> str:
        """An argument: slots for its nodes, everything else as it is."""
        if isinstance(value, fx.Node):
            return self._operand(value)
        if not _holds_nodes(value):
            return self._named(value)
        if isinstance(value, slice):
            return f"slice({self._text(value.start)}, {self._text(value.stop)}, {self._text(value.step)})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self._named(k)}: {self._text(v)}" for k, v in value.items()) + "}"
        inside = "".join(f"{self._text(v)}, " for v in value)
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"

    def _operand(self, node: fx.Node) -> str:
        alias = self._known.get(node)
        if alias is None:
            return f"slots[{self._slot_of[node]}]"
        return f"__view(slots[{self._slot_of[alias.root]}], {alias.size}, {alias.stride}, {alias.offset})"

    def _named(self, value: Any) -> str:
        name = f"__{len(self._constants)}"
        self._constants[name] = value
        return name


def _holds_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found)

"""Run a lowered Program: a flat list of calls over slots, nothing held beyond its planned free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import fx

from memplan import torch_compat
from memplan.lower import Binding, Lowered
from memplan.runtime.arena import Script

Slots = list[Any]
Call = Callable[[Slots], Any]  # returns what the kernel returned


class Executable:
    """Callable with a list of arguments, which it empties: an argument lives no longer than its slot."""

    def __init__(self, graph_module: fx.GraphModule, lowered: Lowered, script: Script | None = None) -> None:
        """``script``: where the Program's memory lies in an arena; without one, torch decides."""
        self._boxed_call = True  # AOTAutograd then hands over its arguments instead of holding them
        self.program = lowered.program
        self._script = script
        self._inputs = lowered.inputs
        self._slots = len(lowered.slot_of)
        self._calls = _written(graph_module, lowered)
        self._outputs = [
            (lowered.slot_of[value], None) if isinstance(value, fx.Node) else (-1, value) for value in lowered.outputs
        ]

    def __call__(self, args: list[Any]) -> list[Any]:
        slots: Slots = [*args, *[None] * (self._slots - self._inputs)]
        args.clear()
        try:
            if self._script is not None:
                self._script.run(self._calls, slots)
            else:
                for call in self._calls:
                    call(slots)
        except BaseException:
            slots.clear()  # or the traceback would hold all that the step held
            raise
        return [slots[slot] if slot >= 0 else constant for slot, constant in self._outputs]


def _written(module: fx.GraphModule, lowered: Lowered) -> list[Call]:
    """One Python function a step, its operands' slots written out: on small tensors a step's time is that of its calls."""
    calls: list[Call] = []
    constants: dict[str, Any] = {}  # no function is put here: those that know it would be cyclic garbage
    writer = _Writer(constants, lowered.slot_of)
    lines = []
    for binding in lowered.bindings:
        name = "free" if binding.node is None else binding.node.name
        lines += [
            f"def {name}(slots):",
            *(f" {line}" for line in writer.body(module, binding)),
            f"__calls.append({name})",
        ]
    exec(compile("\n".join(lines), "<memplan program>", "exec"), constants, {"__calls": calls})  # noqa: S102 - our own text
    return calls


@dataclass(frozen=True)
class _Writer:
    """The text of steps; what it cannot spell it names in ``constants``."""

    constants: dict[str, Any]
    slot_of: dict[fx.Node, int]

    def body(self, module: fx.GraphModule, binding: Binding) -> list[str]:
        node = binding.node
        if node is None:
            return [f"slots[{slot}] = None" for slot in binding.drops] or ["pass"]
        if node.op == "get_attr":
            return [f"slots[{binding.results[0][1]}] = {self._named(attrgetter(str(node.target))(module))}"]
        given = [self._text(a) for a in node.args] + [f"{k}={self._text(v)}" for k, v in node.kwargs.items()]
        call = f"value = {self._named(torch_compat.direct(node.target))}({', '.join(given)})"
        kept = [f"slots[{slot}] = value" + (f"[{place}]" if place >= 0 else "") for place, slot in binding.results]
        return [call, *kept, "return value"]

    def _text(self, value: Any) -> str:
        """An argument: slots for its nodes, everything else as it is."""
        if isinstance(value, fx.Node):
            return f"slots[{self.slot_of[value]}]"
        if not _holds_nodes(value):
            return self._named(value)
        if isinstance(value, slice):
            return f"slice({self._text(value.start)}, {self._text(value.stop)}, {self._text(value.step)})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self._named(k)}: {self._text(v)}" for k, v in value.items()) + "}"
        inside = "".join(f"{self._text(v)}, " for v in value)
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"

    def _named(self, value: Any) -> str:
        name = f"__{len(self.constants)}"
        self.constants[name] = value
        return name


def _holds_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found)

"""Run a lowered Program: a flat list of calls over slots, nothing held beyond its planned free."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memplan import torch_compat
from memplan.lower import Lowered
from memplan.runtime.arena import Script
from memplan.runtime.views import aliases, is_known
from memplan.runtime.write import Call, Calls, Slots, one_a_kernel, one_a_step


class Executable:
    """Callable with a list of arguments, which it empties: an argument lives no longer than its slot.

    The first run does all as the graph has it: views by their ops, regions with a look at how operands lie. Views that came
    to what tracing foresaw are made without their ops from then on, and nobody looks again, whenever the arguments lie
    in memory as they did.
    """

    def __init__(self, graph_module: fx.GraphModule, lowered: Lowered, script: Script | None = None) -> None:
        """``script``: where the Program's memory lies in an arena; without one, torch decides."""
        self._boxed_call = True  # AOTAutograd then hands over its arguments instead of holding them
        self.program = lowered.program
        self._script = script
        self._inputs = lowered.inputs
        self._slots = len(lowered.slot_of)
        self._outputs = [
            (lowered.slot_of[value], None) if isinstance(value, fx.Node) else (-1, value) for value in lowered.outputs
        ]
        self._plain = one_a_step(graph_module, lowered)
        self._trial: _Trial | None = _Trial(graph_module, lowered, self._plain)
        self._usual: tuple[Calls, list[_Seen]] = self._trial.calls, []

    def __call__(self, args: list[Any]) -> list[Any]:
        slots: Slots = [*args, *[None] * (self._slots - self._inputs)]
        args.clear()
        try:
            calls, seen = self._usual
            if not _lie_as_seen(slots, seen):
                calls = self._plain
            if self._script is not None:
                self._script.run(calls, slots)
            else:
                for call in calls.functions:
                    call(slots)
        except BaseException:
            slots.clear()  # or the traceback would hold all that the step held
            raise
        if (trial := self._trial) is not None:
            self._usual, self._trial = trial.passed(), None
        return [slots[slot] if slot >= 0 else constant for slot, constant in self._outputs]


_Seen = tuple[int, tuple[int, ...], tuple[int, ...]]  # an argument's slot, sizes and strides


def _lie_as_seen(slots: Slots, seen: list[_Seen]) -> bool:
    try:
        for slot, size, stride in seen:
            torch_compat.assert_size_stride(slots[slot], size, stride)
    except AssertionError:
        return False
    return True


class _Trial:
    """The first run: what every view comes to is compared with what tracing foresaw."""

    def __init__(self, module: fx.GraphModule, lowered: Lowered, plain: Calls) -> None:
        self._module, self._lowered, self._plain = module, lowered, plain
        self._known = aliases(lowered.slot_of)
        self._wrong: set[fx.Node] = set()
        nodes = [binding.node for binding in lowered.bindings]
        self.calls = Calls([self._checked(*pair) for pair in zip(nodes, plain.functions, strict=True)], plain.steps)

    def _checked(self, node: fx.Node | None, call: Call) -> Call:
        alias = self._known.get(node) if node is not None else None
        if alias is None or node is None:
            return call
        slot, wrong = self._lowered.slot_of[alias.root], self._wrong

        def checked(slots: Slots) -> Any:
            value = call(slots)
            if not alias.describes(value, slots[slot]):
                wrong.add(node)
            return value

        return checked

    def passed(self) -> tuple[Calls, list[_Seen]]:
        """The calls to run from now on, and how arguments must lie for that."""
        placeholders = ((n.meta.get("val"), slot) for n, slot in self._lowered.slot_of.items() if n.op == "placeholder")
        arguments = [(value, slot) for value, slot in placeholders if isinstance(value, torch.Tensor)]
        if not all(is_known(value) for value, _ in arguments):
            return self._plain, []  # other sizes may come: nothing is taken for granted
        known = {node: alias for node, alias in self._known.items() if node not in self._wrong}
        seen = [(slot, tuple(value.shape), value.stride()) for value, slot in arguments]
        return one_a_kernel(self._module, self._lowered, known), seen

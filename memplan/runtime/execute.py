"""Run a lowered Program: a flat list of calls over slots, nothing held beyond its planned free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

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
        self._calls = [_bind(graph_module, binding, lowered.slot_of) for binding in lowered.bindings]
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


def _bind(module: fx.GraphModule, binding: Binding, slot_of: dict[fx.Node, int]) -> Call:
    if binding.node is None:
        return _free(binding.drops)
    if binding.node.op == "get_attr":
        return _constant(module, binding)
    return _kernel(binding, slot_of)


def _free(drops: tuple[int, ...]) -> Call:
    def free(slots: Slots) -> None:
        for slot in drops:
            slots[slot] = None

    return free


def _constant(module: fx.GraphModule, binding: Binding) -> Call:
    assert binding.node is not None
    value: Any = module
    for name in str(binding.node.target).split("."):
        value = getattr(value, name)
    slot = binding.results[0][1]

    def constant(slots: Slots) -> None:
        slots[slot] = value

    return constant


def _kernel(binding: Binding, slot_of: dict[fx.Node, int]) -> Call:
    node = binding.node
    assert node is not None and callable(node.target)
    target, results = node.target, binding.results
    args = list(node.args)
    from_slots = [(k, slot_of[a]) for k, a in enumerate(args) if isinstance(a, fx.Node)]
    nested = [(k, _template(a, slot_of)) for k, a in enumerate(args) if _holds_nodes(a)]
    kwargs = dict(node.kwargs)
    named = [(k, _template(v, slot_of)) for k, v in kwargs.items() if isinstance(v, fx.Node) or _holds_nodes(v)]

    def kernel(slots: Slots) -> Any:
        given = args.copy()
        for k, slot in from_slots:
            given[k] = slots[slot]
        for k, fill in nested:
            given[k] = fill(slots)
        value = target(*given, **(kwargs | {k: fill(slots) for k, fill in named} if named else kwargs))
        for place, slot in results:
            slots[slot] = value if place < 0 else value[place]
        return value

    return kernel


def _holds_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found) and not isinstance(value, fx.Node)


def _template(value: Any, slot_of: dict[fx.Node, int]) -> Callable[[Slots], Any]:
    """A function that rebuilds a nested argument from the slots."""

    def fill(slots: Slots) -> Any:
        return fx.node.map_arg(value, lambda n: slots[slot_of[n]])

    return fill

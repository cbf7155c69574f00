"""Results of norms under autocast in the dtypes that torch's kernels give them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memplan.capture import is_getitem

aten = torch.ops.aten

# Norms with the place of their weight among the arguments; the bias comes next, mean and deviation are results 1 and 2.
NORMS = {
    aten.native_layer_norm.default: 2,
    aten.native_group_norm.default: 1,
    aten.native_batch_norm.default: 1,
    aten._native_batch_norm_legit.default: 1,
    aten._native_batch_norm_legit.no_stats: 1,
    aten._native_batch_norm_legit_functional.default: 1,
}
_ALIASES = (aten.detach.default, aten.alias.default)
GROUPS_BACKWARD = aten.native_group_norm_backward.default


@dataclass(frozen=True)
class KernelDtypes:
    """Runs on a captured graph. Under autocast a norm gets a narrow operand and float32 parameters. On the CPU its kernel
    then gives float32 statistics, where the fake one says the operand's dtype: half the bytes that will be held. A group
    norm's gradient is as narrow as its operand, where the fake one says float32.
    """

    name: ClassVar[str] = "kernel-dtypes"

    def apply(self, graph_module: fx.GraphModule) -> bool:
        """Returns whether a value's description changed; the graph itself does not."""
        modified = False
        for node in graph_module.graph.nodes:
            for place, dtype in _given(node):
                value = node.meta["val"]
                if value[place] is not None and value[place].dtype != dtype:
                    node.meta["val"] = (*value[:place], value[place].to(dtype), *value[place + 1 :])
                    modified = True
            _follow(node)
        return modified


def _given(node: fx.Node) -> Iterator[tuple[int, torch.dtype]]:
    """Place and dtype of results whose dtype the kernel chooses."""
    if (node.target not in NORMS and node.target is not GROUPS_BACKWARD) or _value(node.args[0]).device.type != "cpu":
        return
    if node.target is GROUPS_BACKWARD:
        yield 0, _value(node.args[1]).dtype
        return
    place = NORMS[node.target]  # type: ignore[index]
    parameters = [a for a in node.args[place : place + 2] if isinstance(a, fx.Node)]
    for result in (1, 2) if parameters else ():
        yield result, _value(parameters[0]).dtype


def _follow(node: fx.Node) -> None:
    """Describe a part or an alias of something as that is described."""
    if not isinstance(_value(node), torch.Tensor):
        return  # numbers, and what tracing left undescribed
    if is_getitem(node):
        part = _value(node.args[0])[node.args[1]]
        if part.dtype != _value(node).dtype:
            node.meta["val"] = part
    elif node.target in _ALIASES and _value(node.args[0]).dtype != _value(node).dtype:
        node.meta["val"] = node.target(_value(node.args[0]))  # type: ignore[operator]


def _value(node: Any) -> Any:
    return node.meta.get("val")

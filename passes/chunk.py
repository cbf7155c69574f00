"""Never make the logits: a vocabulary projection and its cross-entropy run together, over blocks of tokens."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from memplan.passes.calls import argument, insert, name_of, only_user, rewritten, value_of
from memplan.runtime.loss import loss_of_rows

_CASTS = {"float", "to", "type", "contiguous"}


@dataclass(frozen=True)
class ChunkLoss:
    """Runs on dynamo's graph, so that AOTAutograd derives and shares everything around it.

    Rewritten is ``cross_entropy`` (mean or sum, with ignore_index) of a ``linear`` whose result goes nowhere else: through
    casts, views and slices of the leading dimensions only. Logits that the model returns stay as they are, and so do
    class weights, label smoothing, class probabilities and symbolic sizes.
    """

    name: ClassVar[str] = "chunk-loss"
    for_memory_alone: ClassVar[bool] = False
    rows: int = 256  # of a block at most: fewer make the products on a CPU core slower, 4 % at 128 and 20 % at 32
    least_rows: int = 64
    blocks: int = 4  # at least, where each then has the least rows: a quarter of the logits

    def apply(self, graph_module: fx.GraphModule) -> fx.GraphModule | None:
        """The rewritten copy; None where nothing is to be rewritten."""
        losses = ("cross_entropy", "cross_entropy_loss")
        return rewritten(graph_module, lambda node: name_of(node) in losses, self._rewrite)

    def _rewrite(self, graph: fx.Graph, loss: fx.Node) -> bool:
        logits, target, made = argument(loss, 0, "input"), argument(loss, 1, "target"), value_of(loss)
        mean = argument(loss, 6, "reduction", "mean")
        plain = (
            argument(loss, 2, "weight") is None
            and argument(loss, 3, "size_average") is None
            and argument(loss, 5, "reduce") is None
            and mean in ("mean", "sum")
            and argument(loss, 7, "label_smoothing", 0.0) == 0.0
        )
        value, classes = value_of(logits), value_of(target)
        if not plain or made is None or value is None or classes is None or value.dim() != 2 or classes.dim() != 1:
            return False
        rows = min(self.rows, max(self.least_rows, value.shape[0] // self.blocks))
        if value.shape[0] <= rows:
            return False
        chain = _back_to_linear(logits, value.shape[1])
        if chain is None:
            return False
        linear, *slices = chain
        hidden, weight, bias = (argument(linear, k, name) for k, name in enumerate(("input", "weight", "bias")))
        computed = value_of(linear)
        assert computed is not None
        for step in slices:
            hidden = insert(graph, loss, operator.getitem, (hidden, step.args[1]))
        ignored = argument(loss, 4, "ignore_index", -100)
        args = (hidden, weight, bias, target, ignored, mean == "mean", rows, computed.dtype, made.dtype)
        loss.replace_all_uses_with(insert(graph, loss, loss_of_rows, args))
        graph.erase_node(loss)
        return True


def _back_to_linear(node: Any, classes: int) -> list[fx.Node] | None:
    """The projection that makes the logits, then the slices of its rows on the way from there; None if there is more."""
    slices: list[fx.Node] = []
    while isinstance(node, fx.Node) and only_user(node) is not None:
        value = value_of(node)
        if value is None or not value.is_floating_point() or not value.dim() or value.shape[-1] != classes:
            return None
        if name_of(node) == "linear":
            return [node, *reversed(slices)]
        if name_of(node) == "getitem" and _keeps_last(node):
            slices.append(node)
        elif name_of(node) == "view":
            if slices:  # rows sliced after rows were merged: the merge comes first, which hidden rows do not show
                return None
        elif name_of(node) not in _CASTS:
            return None
        node = node.args[0]
    return None


def _keeps_last(node: fx.Node) -> bool:
    """A slice of leading dimensions by constants."""
    source, index = value_of(node.args[0]), node.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    plain = all(p is Ellipsis or (isinstance(p, slice) and _is_constant(p)) for p in parts)
    if source is None or not plain:
        return False
    reaches_last = Ellipsis in parts or len(parts) == source.dim()
    return not reaches_last or parts[-1] in (slice(None), Ellipsis)


def _is_constant(part: slice) -> bool:
    return not any(isinstance(bound, fx.Node) for bound in (part.start, part.stop, part.step))

"""Values that choose between elements, or come from no operand: where, clamp, cat, pad, scatter, gather, iota, constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memplan.codegen.index import Index, Linear
from memplan.codegen.region import short_name
from memplan.codegen.triton_ops import NAMES, literal, register_dtype
from memplan.codegen.triton_values import At, Value, Values
from memplan.codegen.triton_views import aten, prims, shape_of
from memplan.errors import UnsupportedError


class Writer(Values):
    """Writes the statements of every op that regions hold."""

    def _where(self, node: fx.Node, index: Index, at: At) -> Value:
        condition, a, b = (self.operand(arg, index, at) for arg in node.args)
        dtype = register_dtype(node.meta["val"].dtype)
        if condition.is_literal:
            return a if condition.text == "True" else b
        text = f"tl.where({condition.cast(torch.bool)}, {a.cast(dtype)}, {b.cast(dtype)})"
        return self._plain(node, text, condition, a, b)

    def _clamp(self, node: fx.Node, index: Index, at: At) -> Value:
        value = self.operand(node.args[0], index, at)
        text, operands = value.text, [value]
        for name, bound in zip(("maximum", "minimum"), (*node.args[1:3], None, None)):
            if bound is not None:
                limit = self.operand(bound, index, at)
                operands.append(limit)
                text = f"{name}({text}, {limit.cast(register_dtype(node.meta['val'].dtype))})"
        return self._plain(node, text, *operands)

    def _constant(self, node: fx.Node, index: Index, at: At) -> Value:
        fill = _fill_of(node)
        dtype: torch.dtype = node.meta["val"].dtype
        number: Any = float(fill) if dtype.is_floating_point else bool(fill) if dtype == torch.bool else int(fill)
        return Value(literal(number), register_dtype(dtype), is_literal=True)

    def _iota(self, node: fx.Node, index: Index, at: At) -> Value:
        start, step = (
            (node.kwargs.get("start", 0), node.kwargs.get("step", 1)) if node.target is prims.iota.default else (0, 1)
        )
        if node.target is aten.arange.start_step:
            start, step = node.args[0], node.args[2] if len(node.args) > 2 else 1
        form = index[0] * step + start  # type: ignore[operator]
        rows, columns = self.spans(form)
        self.note(node)
        dtype: torch.dtype = node.meta["val"].dtype
        zero = "" if form.terms else f" + tl.zeros({self.unit}, tl.int32)"
        text = f"({self.offset_text(form)}{zero}).to({NAMES[register_dtype(dtype)]})"
        return self.define(node.name, text, register_dtype(dtype), rows, columns)

    def _part(self, form: Linear, start: int, end: int, size: int, at: At) -> tuple[str, dict[int, tuple[int, int]]]:
        """The condition start <= form < end, and what it says of the outermost atom's range."""
        tests = [f"({self.offset_text(form)} >= {start})"] if start > 0 else []
        tests += [f"({self.offset_text(form)} < {end})"] if end < size else []
        if not form.terms:
            raise UnsupportedError("a part is chosen along a broadcast dimension")
        atom, step = max(form.terms, key=lambda t: t[1])
        rest = form + Linear.atom(atom, -step)
        low, high = rest.span(at.bounds)
        if 0 <= low and high < step and start % step == 0 and end % step == 0:
            old = at.bounds[atom]
            return " & ".join(tests), {atom: (max(old[0], start // step), min(old[1], end // step - 1))}
        return " & ".join(tests), {}

    def _cat(self, node: fx.Node, index: Index, at: At) -> Value:
        parts: Any = node.args[0]
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(index)  # type: ignore[operator]
        size = shape_of(node)[dim]
        start, chosen = 0, []
        for part in parts:
            end = start + shape_of(part)[dim]
            condition, bounds = self._part(index[dim], start, end, size, at)
            inner = (*index[:dim], index[dim] + -start, *index[dim + 1 :])
            value = self.value(part, inner, at.within(bounds, condition))
            chosen.append((f"{self.offset_text(index[dim])} < {end}", self._copy_to(node, value)))
            start = end
        text = chosen[-1][1].text
        for condition, value in reversed(chosen[:-1]):
            text = f"tl.where({condition}, {value.text}, {text})"
        rows, columns = self.spans(index[dim])
        return self._plain(node, text, *(v for _, v in chosen), Value("", torch.bool, rows, columns))

    def _copy_to(self, node: fx.Node, value: Value) -> Value:
        dtype = register_dtype(node.meta["val"].dtype)
        return Value(value.cast(dtype), dtype, value.rows, value.columns, value.is_literal)

    def _inside(
        self, node: fx.Node, source: fx.Node, index: Index, starts: dict[int, int], rest: Value, at: At
    ) -> Value:
        """``source`` where the index lies in the box that begins at ``starts``, else ``rest``."""
        conditions: list[str] = []
        bounds: dict[int, tuple[int, int]] = {}
        inner = list(index)
        for d, start in starts.items():
            end = start + shape_of(source)[d]
            condition, narrowed = self._part(index[d], start, end, shape_of(node)[d], at)
            conditions += [condition] if condition else []
            bounds |= narrowed
            inner[d] = index[d] + -start
        guard = " & ".join(conditions)
        value = self._copy_to(node, self.value(source, tuple(inner), at.within(bounds, guard)))
        if not guard:
            return value
        spans = [self.spans(index[d]) for d in starts]
        along = Value("", torch.bool, any(s[0] for s in spans), any(s[1] for s in spans))
        return self._plain(node, f"tl.where({guard}, {value.text}, {rest.text})", value, rest, along)

    def _pad(self, node: fx.Node, index: Index, at: At) -> Value:
        arguments: Any = node.args
        source, pads = arguments[:2]
        fill = node.args[2] if len(node.args) > 2 else 0
        rank = len(index)
        starts = {rank - 1 - k: pads[2 * k] for k in range(len(pads) // 2)}  # type: ignore[arg-type,index]
        if min(pads) < 0:  # type: ignore[type-var,arg-type]
            raise UnsupportedError(f"{node.name} crops")
        return self._inside(node, source, index, starts, Value(literal(fill), torch.float32, is_literal=True), at)  # type: ignore[arg-type]

    def _slice_scatter(self, node: fx.Node, index: Index, at: At) -> Value:
        arguments: Any = node.args
        base, source = arguments[:2]
        given: dict[int, Any] = dict(enumerate(arguments))
        dim, start, step = given.get(2, 0), given.get(3), given.get(5, 1)
        if step != 1:
            raise UnsupportedError(f"{node.name} scatters with a stride")
        dim = dim % len(index)
        start = max(0, (start or 0) + shape_of(node)[dim] if (start or 0) < 0 else start or 0)
        return self._inside(node, source, index, {dim: start}, self._copy_to(node, self.operand(base, index, at)), at)

    def _select_scatter(self, node: fx.Node, index: Index, at: At) -> Value:
        arguments: Any = node.args
        base, source, dim, place = arguments
        dim = dim % len(index)
        place = place % shape_of(node)[dim]  # type: ignore[operator]
        condition = f"({self.offset_text(index[dim])} == {place})"
        inner = (*index[:dim], *index[dim + 1 :])
        value = self._copy_to(node, self.value(source, inner, at.within({}, condition)))  # type: ignore[arg-type]
        rest = self._copy_to(node, self.operand(base, index, at))
        rows, columns = self.spans(index[dim])
        text = f"tl.where({condition}, {value.text}, {rest.text})"
        return self._plain(node, text, value, rest, Value("", torch.bool, rows, columns))

    def _gather(self, node: fx.Node, index: Index, at: At) -> Value:
        arguments: Any = node.args
        source, dim, table = arguments[:3]
        dim = dim % len(index)
        chosen = self.value(table, index, at)  # type: ignore[arg-type]
        atom = len(self.space.sizes) + len(self._tables)
        self._tables[atom] = chosen.text
        self._table_span[atom] = (chosen.rows, chosen.columns)
        inner = (*index[:dim], Linear.atom(atom), *index[dim + 1 :])
        bounds = {atom: (0, shape_of(source)[dim] - 1)}  # type: ignore[arg-type]
        return self.value(source, inner, At({**at.bounds, **bounds}, at.guard))  # type: ignore[arg-type]

    def _scatter(self, node: fx.Node, index: Index, at: At) -> Value:
        arguments: Any = node.args
        base, dim, table, fill = arguments
        dim = dim % len(index)
        if shape_of(table)[dim] != 1:  # type: ignore[arg-type]
            raise UnsupportedError(f"{node.name} scatters several elements a row")
        first = (*index[:dim], Linear(), *index[dim + 1 :])
        chosen = self.value(table, first, at)  # type: ignore[arg-type]
        value = self.value(fill, first, at) if isinstance(fill, fx.Node) else self.operand(fill, index, at)
        rest = self.operand(base, index, at)
        dtype = register_dtype(node.meta["val"].dtype)
        rows, columns = self.spans(index[dim])
        text = f"tl.where({chosen.text} == {self.offset_text(index[dim])}, {value.cast(dtype)}, {rest.cast(dtype)})"
        return self._plain(node, text, chosen, value, rest, Value("", torch.bool, rows, columns))


def _fill_of(node: fx.Node) -> Any:
    name = short_name(node)
    if name in ("full", "full_like", "new_full"):
        return node.args[1] if name != "new_full" else node.args[2]
    if name == "scalar_tensor":
        return node.args[0]
    return 0 if "zeros" in name else 1


Writer.special = {
    aten.where.self: Writer._where,
    aten.clamp.default: Writer._clamp, aten.clamp.Tensor: Writer._clamp,
    aten.cat.default: Writer._cat, aten.constant_pad_nd.default: Writer._pad,
    aten.slice_scatter.default: Writer._slice_scatter, aten.select_scatter.default: Writer._select_scatter,
    aten.gather.default: Writer._gather, aten.scatter.value: Writer._scatter, aten.scatter.src: Writer._scatter,
    prims.iota.default: Writer._iota, aten.arange.start_step: Writer._iota,
} | dict.fromkeys(
    [
        aten.full.default, aten.full_like.default, aten.zeros_like.default, aten.ones_like.default, aten.zeros.default,
        aten.ones.default, aten.scalar_tensor.default, aten.new_zeros.default, aten.new_ones.default,
        aten.new_full.default,
    ],
    Writer._constant,
)  # fmt: skip

"""The values of a region as Triton statements: each is asked for at an index, and written once for each index."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from memplan.codegen.index import Bounds, Index, Linear, broadcast, offset
from memplan.codegen.region import TensorType, placeholders, short_name, source_of
from memplan.codegen.triton_ops import ARITHMETIC, COMPARISONS, DIVISIONS, NAMES, SUMS, literal, power, register_dtype
from memplan.codegen.triton_schedule import Space
from memplan.codegen.triton_views import COPIES, REDUCTIONS, aten, operand_index, reduced_count, reduced_dims, shape_of
from memplan.errors import UnsupportedError


@dataclass(frozen=True)
class Value:
    """A variable or a literal of the generated code. ``rows``, ``columns``: the axes it varies along."""

    text: str
    dtype: torch.dtype
    rows: bool = False
    columns: bool = False
    is_literal: bool = False

    def cast(self, dtype: torch.dtype) -> str:
        """The value as an expression of a register type; literals take the type of what they meet."""
        if self.is_literal or self.dtype == dtype:
            return self.text
        if dtype == torch.bool:
            return f"({self.text} != 0)"
        return f"{self.text}.to({NAMES[dtype]})"


@dataclass(frozen=True)
class Access:
    """One load or store: which tensor, at which offset, in which walk over the row."""

    tensor: int  # place among the region's inputs, or outputs for a store
    where: Linear
    bytes: int  # distinct elements in the whole launch, times the item size
    scan: int
    store: bool = False


@dataclass(frozen=True)
class At:
    """Where a value is asked for: inside which ranges of the atoms, and under which condition."""

    bounds: Bounds = field(hash=False, compare=False)
    guard: str = ""

    def within(self, atom_bounds: dict[int, tuple[int, int]], condition: str) -> At:
        both = f"{self.guard} & {condition}" if self.guard and condition else self.guard or condition
        return At({**self.bounds, **atom_bounds}, both)


_RESERVED = [
    "x",
    "r",
    "p",
    "x_in",
    "r_in",
    "start",
    "step",
    "part",
    "tl",
    "libdevice",
    "triton",
    "maximum",
    "minimum",
    "row_max",
    "row_min",
    "column_max",
    "column_min",
]


class Values:
    """Writes statements. ``say(text, wide)`` puts one where values of that width are computed.

    ``special``: ops that are written in a way of their own.
    """

    special: Mapping[Any, Callable[..., Value]] = {}

    def __init__(self, space: Space, mask_x: bool, mask_r: bool, say: Callable[[str, bool], None]) -> None:
        self.space, self.say = space, say
        self.mask_x, self.mask_r = mask_x, mask_r
        self.memo: dict[tuple[fx.Node, Index, str], Value] = {}
        self.finished: dict[fx.Node, tuple[Value, ...]] = {}  # reductions done, with all their results
        self.reduce: Callable[[fx.Node], None] | None = None  # how to do one that is not
        self.accesses: list[Access] = []
        self.scan = 0
        self.root = At(dict(space.bounds))
        self._taken = set(_RESERVED)
        self._tables: dict[int, str] = {}  # atom that stands for a computed index -> its variable
        self._table_span: dict[int, tuple[bool, bool]] = {}  # and the axes that variable varies along
        self._comment = ""
        self._inputs = {n: at for at, n in enumerate(placeholders(space.graph))}

    def forget_wide(self) -> None:
        """Values along the row end with the loop that computed them."""
        self.memo = {key: value for key, value in self.memo.items() if not value.columns}

    # Names, offsets, masks

    def name(self, wish: str) -> str:
        """A name no statement has taken; casts are called so."""
        wish = wish.replace("_to_copy", "cast").replace("convert_element_type", "cast").lstrip("_")
        stem = re.sub(r"_\d+$", "", wish)
        count, found = 0, wish
        while found in self._taken:
            count += 1
            found = f"{stem}_{count}"
        self._taken.add(found)
        return found

    def offset_text(self, form: Linear) -> str:
        """A linear form over x, r and table variables."""
        terms = [*self._axis("x", self.space.x, form), *self._axis("r", self.space.r, form)]
        terms += [_times(c, self._tables[a]) for a, c in form.terms if a in self._tables]
        if form.const or not terms:
            terms.append(str(form.const))
        return " + ".join(terms).replace("+ -", "- ")

    def _axis(self, variable: str, atoms: tuple[int, ...], form: Linear) -> list[str]:
        """The form's part along one axis; runs of atoms that lie together in memory become one term."""
        sizes = self.space.sizes
        terms: list[str] = []
        last, inner = len(atoms) - 1, 1
        while last >= 0:
            step = form.coefficient(atoms[last])
            first, extent = last, sizes[atoms[last]]
            while first > 0 and form.coefficient(atoms[first - 1]) == step * extent:
                first -= 1
                extent *= sizes[atoms[first]]
            if step:
                base = variable if inner == 1 else f"{variable} // {inner}"
                base = base if first == 0 else f"{base} % {extent}"
                terms.insert(0, _times(step, f"({base})" if base != variable else base))
            inner *= extent
            last = first - 1
        return terms

    def spans(self, form: Linear) -> tuple[bool, bool]:
        """Whether an index varies along rows and along columns; a table's variable varies along both axes it may."""
        tables = [self._table_span[a] for a, _ in form.terms if a in self._tables]
        rows = any(a in self.space.x for a, _ in form.terms) or any(t[0] for t in tables)
        columns = any(a in self.space.r for a, _ in form.terms) or any(t[1] for t in tables)
        return rows, columns

    def mask(self, rows: bool, columns: bool, guard: str = "") -> str:
        parts = [guard] if guard else []
        parts += ["x_in"] if rows and self.mask_x else []
        parts += ["r_in"] if columns and self.mask_r else []
        return " & ".join(parts)

    def load(self, pointer: str, form: Linear, rows: bool, columns: bool, guard: str) -> str:
        place = pointer if not form.terms and not form.const else f"{pointer} + {self.offset_text(form)}"
        mask = self.mask(rows, columns, guard)
        return f"tl.load({place}, {mask}, other=0)" if mask else f"tl.load({place})"

    # Values

    def value(self, node: fx.Node, index: Index, at: At) -> Value:
        key = (node, index, at.guard)
        if key not in self.memo:
            self.memo[key] = self._compute(node, index, at)
        return self.memo[key]

    def _compute(self, node: fx.Node, index: Index, at: At) -> Value:
        if node.op == "placeholder":
            return self._input(node, index, at)
        if node.target in REDUCTIONS or (node.target is operator.getitem and node.args[0].target in REDUCTIONS):  # type: ignore[union-attr]
            return self._reduction(node, index)
        if node.target in COPIES:
            source: Any = node.args[0]
            return self._copy(node, self.value(source, index, at))
        found = operand_index(node, index, at.bounds)
        if found is not None:
            view: Any = node.args[0] if node.target is not operator.getitem else node.args[0].args[0]  # type: ignore[union-attr]
            return self.value(view, found, at)
        handler = self.special.get(node.target)
        if handler is not None:
            return handler(self, node, index, at)
        return self._elementwise(node, index, at)

    def _input(self, node: fx.Node, index: Index, at: At) -> Value:
        kind = TensorType.of(node.meta["val"], node.name)
        form = offset(index, kind.stride)
        rows, columns = self.spans(form)
        text = self.load(f"in{self._inputs[node]}", form, rows, columns, at.guard)
        if register_dtype(kind.dtype) != kind.dtype:
            text += ".to(tl.float32)"
        self._access(self._inputs[node], form, kind, at.bounds)
        return self.define(f"v{self._inputs[node]}", text, register_dtype(kind.dtype), rows, columns)

    def _access(self, tensor: int, form: Linear, kind: TensorType, bounds: Bounds, store: bool = False) -> None:
        """Distinct elements: those of the atoms an offset varies with, or of the axes its table varies along."""
        elements, chosen = 1, 1
        for atom, _ in form.terms:
            if atom in self._tables:
                rows, columns = self._table_span[atom]
                chosen = self.space.extent((self.space.x if rows else ()) + (self.space.r if columns else ()))
            else:
                elements *= bounds[atom][1] - bounds[atom][0] + 1
        elements = max(elements, chosen)
        self.accesses.append(Access(tensor, form, elements * kind.dtype.itemsize, self.scan, store))

    def store(self, place: int, node: fx.Node, index: Index) -> None:
        kind = TensorType.of(node.meta["val"], node.name)
        value = self.value(node, index, self.root)
        form = offset(index, kind.stride)
        rows, columns = self.spans(form)
        self._access(place, form, kind, self.root.bounds, store=True)
        where = f"out{place} + {self.offset_text(form)}" if form.terms else f"out{place} + {self.scalar_offset}"
        mask = self.mask(rows, columns)
        self.say(f"tl.store({where}, {value.text}{', ' + mask if mask else ''})", columns)

    scalar_offset = "tl.zeros([1, 1], tl.int32)"

    def define(self, wish: str, text: str, dtype: torch.dtype, rows: bool, columns: bool) -> Value:
        name = self.name(wish)
        self.say(f"{name} = {text}", columns)
        return Value(name, dtype, rows, columns)

    def _result(self, node: fx.Node, text: str, *operands: Value) -> Value:
        """A named value of the node's type; half precision rounds here, where eager does."""
        dtype: torch.dtype = node.meta["val"].dtype
        self.note(node)
        if register_dtype(dtype) != dtype:
            text = f"({text}).to({NAMES[dtype]}).to(tl.float32)"
        rows, columns = any(o.rows for o in operands), any(o.columns for o in operands)
        return self.define(node.name, text, register_dtype(dtype), rows, columns)

    def note(self, node: fx.Node) -> None:
        """A comment where the statements of another op of the region begin."""
        origin = (node.meta.get("custom") or {}).get("from")
        if isinstance(origin, fx.Node):
            text = f"# {short_name(origin)}  {source_of(origin)}".rstrip()
            if text != self._comment:
                self._comment = text
                self.say(text, any(a in self.space.r for f in self.space.index.get(node, ()) for a in f.atoms))

    def _copy(self, node: fx.Node, value: Value) -> Value:
        dtype: torch.dtype = node.meta["val"].dtype
        source: Any = node.args[0]
        if value.is_literal or dtype == source.meta["val"].dtype:
            return value
        if register_dtype(dtype) == dtype:
            if value.dtype == dtype:
                return value
            return self._result(node, value.cast(dtype), value)
        return self._result(node, value.cast(torch.float32), value)

    def _reduction(self, node: fx.Node, index: Index) -> Value:
        source: Any = node.args[0] if node.target is operator.getitem else node
        if reduced_count(source) == 1:
            return self._reduction_of_one(node, source, index)
        if index != self.space.index[node]:
            raise UnsupportedError(f"{source.name} is read across rows")
        if source not in self.finished:
            if self.reduce is None:
                raise UnsupportedError(f"{source.name} is needed before it is complete")
            self.reduce(source)
        part: Any = node.args[1] if node.target is operator.getitem else 0
        return self.finished[source][part]

    def _reduction_of_one(self, node: fx.Node, source: fx.Node, index: Index) -> Value:
        """Over a dimension of one element: the element itself, or no variance."""
        operand: Any = source.args[0]
        at = iter(
            index
            if len(index) < len(shape_of(operand))
            else [f for d, f in enumerate(index) if d not in reduced_dims(source)]
        )
        inner = tuple(Linear() if d in reduced_dims(source) else next(at) for d in range(len(shape_of(operand))))
        value = self.value(operand, inner, self.root)
        kind = REDUCTIONS[source.target]
        if kind == "any":
            return self._result(node, value.cast(torch.bool), value)
        if kind in ("var", "var_mean") and (node.target is not operator.getitem or node.args[1] == 0):
            zero = f"{value.text} - {value.text}"
            return self._result(
                node, zero if source.kwargs.get("correction", 1) == 0 else f"({zero}) / ({zero})", value
            )
        return self._result(node, value.cast(register_dtype(node.meta["val"].dtype)), value)

    def operand(self, argument: Any, index: Index, at: At) -> Value:
        if isinstance(argument, fx.Node):
            return self.value(argument, broadcast(index, shape_of(argument)), at)
        return Value(literal(argument), torch.float64, is_literal=True)

    def _elementwise(self, node: fx.Node, index: Index, at: At) -> Value:
        target, value = node.target, node.meta["val"]
        operands = [self.operand(a, index, at) for a in node.args if isinstance(a, (fx.Node, int, float))]
        if operands and all(o.is_literal for o in operands):
            first = operands[0]
            dtype = register_dtype(value.dtype)
            operands[0] = Value(f"tl.full({self.unit}, {first.text}, {NAMES[dtype]})", dtype)
        if target in COMPARISONS:
            kinds = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args]
            common = torch.result_type(*kinds) if len(kinds) == 2 else kinds[0].dtype  # type: ignore[arg-type,union-attr]
            texts = [o.cast(register_dtype(common)) for o in operands]
            return self._result(node, COMPARISONS[target](*texts), *operands)
        texts = [o.cast(register_dtype(value.dtype)) for o in operands]
        return self._result(node, self._expression(node, texts, operands), *operands)

    unit = "[1, 1]"  # shape of a tile-sized constant before it meets a tile

    def _expression(self, node: fx.Node, texts: list[str], operands: list[Value]) -> str:
        target: Any = node.target
        if target in SUMS:
            alpha = node.kwargs.get("alpha", 1)
            right = texts[1] if alpha == 1 else f"{literal(alpha)} * {texts[1]}"
            return f"{texts[0]} {SUMS[target]} {right}"
        if target in DIVISIONS:
            return self._division(node, texts, operands)
        if target is aten.pow.Tensor_Scalar:
            found = power(texts[0], float(node.args[1]))  # type: ignore[arg-type]
            return found or f"libdevice.pow({texts[0]}, tl.full({self.unit}, {texts[1]}, {NAMES[torch.float32]}))"
        if target in ARITHMETIC:
            return ARITHMETIC[target](*texts)
        raise UnsupportedError(f"{node.name}: {target} has no Triton form")

    def _division(self, node: fx.Node, texts: list[str], operands: list[Value]) -> str:
        """Eager's: by a number, multiply by its reciprocal; float32 by float32, correctly rounded."""
        divisor, dtype = node.args[1], register_dtype(node.meta["val"].dtype)
        if not dtype.is_floating_point:
            raise UnsupportedError(f"{node.name} divides integers")
        if not isinstance(divisor, fx.Node):
            return f"{texts[0]} * {1.0 / divisor!r}" if divisor else f'{texts[0]} * float("inf")'  # type: ignore[operator]
        if dtype != torch.float32 or operands[0].is_literal:
            return f"{texts[0]} / {texts[1]}"
        return f"tl.div_rn({texts[0]}, {texts[1]})"

    def _plain(self, node: fx.Node, text: str, *operands: Value) -> Value:
        """A result that needs no rounding, as its elements are those of its operands."""
        self.note(node)
        rows, columns = any(o.rows for o in operands), any(o.columns for o in operands)
        return self.define(node.name, text, register_dtype(node.meta["val"].dtype), rows, columns)


def _times(factor: int, text: str) -> str:
    return text if factor == 1 else f"{factor} * {text}"

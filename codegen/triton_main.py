"""The main kernel of a region: tile axes, walks over long rows, row reductions in one pass or online, and each
program's part of the column reductions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from memplan.codegen.region import Region
from memplan.codegen.triton_choices import Writer
from memplan.codegen.triton_kernel import Tile, cdiv
from memplan.codegen.triton_ops import NAMES, register_dtype
from memplan.codegen.triton_reductions import (
    FILL,
    accumulator,
    column_expression,
    dependents,
    larger,
    online_pairs,
    reduction_reaches,
    row_expression,
)
from memplan.codegen.triton_schedule import Space
from memplan.codegen.triton_values import Value
from memplan.codegen.triton_views import REDUCTIONS
from memplan.errors import UnsupportedError


class MainKernel:
    """Writes everything but what waits for a column reduction to be complete."""

    def __init__(self, region: Region, space: Space, tile: Tile) -> None:
        self.region, self.space, self.tile = region, space, tile
        self.rows, self.columns = space.extent(space.x), space.extent(space.r)
        self.flat = not space.r and not space.columns
        self.lines: list[str] = []
        self.loop: list[str] = []  # statements of the walk over a row that is being written
        mask_r = bool(self.columns % tile.r)
        self.writer = Writer(space, bool(self.rows % (tile.x * tile.steps)), mask_r, self._say)
        self.writer.unit = "[1]" if self.flat else "[1, 1]"
        self.writer.scalar_offset = f"tl.zeros({self.writer.unit}, tl.int32)"
        self.writer.reduce = None if tile.looped else self._reduce_now
        self.pairs = online_pairs(space) if tile.looped else {}
        self.accumulators: list[str] = []
        self.parts: list[tuple[fx.Node, bool, torch.dtype]] = []  # column reduction, varies along columns, dtype

    def write(self) -> list[str]:
        """The body's lines, without the head."""
        late = dependents(self.space.columns)
        outputs = [(at, n) for at, n in enumerate(self.space.outputs) if n not in late]
        if self.tile.looped:
            self._walks()
        self.writer.scan += 1
        for at, node in outputs:
            self.writer.store(at, node, self.space.index[node])
        sums = [line for node in self.space.columns for line in self._column(node)]
        self._end_walk()
        self.lines += sums
        return self._assemble()

    @property
    def programs(self) -> tuple[int, int]:
        along_r = 1 if self.space.rows or not self.space.r else cdiv(self.columns, self.tile.r)
        return cdiv(self.rows, self.tile.x * self.tile.steps), along_r

    def _say(self, text: str, wide: bool) -> None:
        (self.loop if self.tile.looped and wide else self.lines).append(text)

    def _end_walk(self) -> None:
        if self.loop:
            self.lines.append(f"for start in range(0, {self.columns}, {self.tile.r}):")
            self.lines += [f"    {text}" for text in [*self._r_axis("start"), *self.loop]]
            self.loop = []
            self.writer.forget_wide()

    def _r_axis(self, start: str) -> list[str]:
        lanes = f"tl.arange(0, {self.tile.r})[None, :]" + (".to(tl.int64)" if _needs_int64(self.region) else "")
        lines = [f"r = {start} + {lanes}" if start else f"r = {lanes}"]
        return [*lines, f"r_in = r < {self.columns}"] if self.writer.mask_r else lines

    def _x_axis(self, program: str) -> list[str]:
        shape = "" if self.flat else "[:, None]"
        wide = ".to(tl.int64)" if _needs_int64(self.region) else ""
        lines = [f"x = {program}{wide} * {self.tile.x} + tl.arange(0, {self.tile.x}){shape}"]
        return [*lines, f"x_in = x < {self.rows}"] if self.writer.mask_x else lines

    def _assemble(self) -> list[str]:
        stepped = bool(self.space.columns)
        head = []
        if self.space.r and not self.tile.looped:
            head += self._r_axis("" if self.space.rows else f"tl.program_id(1) * {self.tile.r}")
        if not stepped:
            return [*self._x_axis("tl.program_id(0)"), *head, *self.lines]
        lines = [*head, *self.accumulators, f"for step in range({self.tile.steps}):"]
        body = [*self._x_axis(f"(tl.program_id(0) * {self.tile.steps} + step)"), *self.lines]
        lines += [f"    {text}" for text in body]
        return [*lines, *self._store_parts()]

    # Row reductions

    def _operand(self, node: fx.Node) -> Value:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return self.writer.value(source, self.space.index[source], self.writer.root)

    def _tile_of(self, value: Value, fill: str, dtype: torch.dtype) -> str:
        """The value over the whole tile, lanes beyond the row filled."""
        text = value.cast(dtype)
        if self.writer.mask_r:
            return f"tl.where(r_in, {text}, {fill})"
        return text if value.columns else f"tl.broadcast_to({text}, [{self.tile.x}, {self.tile.r}])"

    def _reduce_now(self, node: fx.Node) -> None:
        """A row that fits in the tile: one pass."""
        kind = REDUCTIONS[node.target]
        if node in self.space.columns:
            raise UnsupportedError(f"{node.name} is read before all rows are done")
        value = self._operand(node)
        self.writer.note(node)
        if kind in ("var", "var_mean"):
            self._variance(node, value)
            return
        dtype = accumulator(node)
        tile = self._tile_of(value, FILL[kind], dtype)
        wish = node.name
        self._finish_row(node, row_expression(kind, tile, dtype), wish, dtype)

    def _finish_row(self, node: fx.Node, text: str, wish: str, dtype: torch.dtype) -> None:
        kind, out = REDUCTIONS[node.target], node.meta["val"].dtype
        if kind == "mean":
            text = f"{text} * {1.0 / self.columns!r}"
        if kind == "any":
            text = f"({text}) != 0"
        elif register_dtype(out) != out:
            text = f"({text}).to({NAMES[out]}).to(tl.float32)"
        elif register_dtype(out) != dtype:
            text = f"({text}).to({NAMES[out]})"
        name = self.writer.name(wish)
        self.lines.append(f"{name} = {text}")
        self.writer.finished[node] = (Value(name, register_dtype(out), rows=True),)

    def _variance(self, node: fx.Node, value: Value) -> None:
        """Two passes over registers: no cancellation, and no second read."""
        dtype = register_dtype(value.dtype)
        mean, squares = self.writer.name("mean"), self.writer.name("squares")
        self.lines.append(
            f"{mean} = tl.sum({self._tile_of(value, '0', dtype)}, axis=1, keep_dims=True) * {1.0 / self.columns!r}"
        )
        apart = self._tile_of(Value(f"{value.cast(dtype)} - {mean}", dtype, True, True), "0", dtype)
        self.lines.append(f"{squares} = {apart}")
        self._finish_variance(node, f"tl.sum({squares} * {squares}, axis=1, keep_dims=True)", mean)

    def _finish_variance(self, node: fx.Node, squares: str, mean: str) -> None:
        correction = node.kwargs.get("correction", 1)
        name = self.writer.name("variance")
        degrees = self.columns - float(1 if correction is None else correction)  # type: ignore[arg-type]
        factor = repr(1.0 / degrees) if degrees > 0 else 'float("nan")'
        self.lines.append(f"{name} = {squares} * {factor}")
        values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
        dtype = register_dtype(values[0].dtype)
        self.writer.finished[node] = (Value(name, dtype, rows=True), Value(mean, dtype, rows=True))

    def _walks(self) -> None:
        """One walk over the row for each level of reductions that depend on one another."""
        level: dict[fx.Node, int] = {}
        for node in self.space.graph.graph.nodes:
            above = max((level[a] for a in node.all_input_nodes), default=0)
            if node in self.pairs:
                level[node] = level[self.pairs[node][1]]
            else:
                level[node] = above + (node in self.space.rows)
        for at in range(1, max(level.values()) + 1):
            self.writer.scan += 1
            ends = [end for n in self.space.rows if level[n] == at and n not in self._paired for end in self._walk(n)]
            self._end_walk()
            self.lines += ends

    @property
    def _paired(self) -> set[fx.Node]:
        return {largest for _, largest in self.pairs.values()}

    def _walk(self, node: fx.Node) -> list[str]:
        """Accumulate lane by lane in the walk; returns what follows it."""
        if node in self.pairs:
            return self._online(node, *self.pairs[node])
        kind = REDUCTIONS[node.target]
        value = self._operand(node)
        if kind in ("var", "var_mean"):
            return self._welford(node, value)
        dtype = accumulator(node)
        total = self.writer.name(f"{node.name}_lanes")
        self._lanes(total, FILL[kind], dtype)
        tile = self._tile_of(value, FILL[kind], dtype)
        joined = f"{total} + {tile}" if kind in ("sum", "mean") else f"{larger(kind, dtype)}({total}, {tile})"
        self.loop.append(f"{total} = {joined}")
        return self._after(lambda: self._finish_row(node, row_expression(kind, total, dtype), node.name, dtype))

    def _lanes(self, name: str, fill: str, dtype: torch.dtype) -> None:
        self.lines.append(f"{name} = tl.full([{self.tile.x}, {self.tile.r}], {fill}, {NAMES[dtype]})")

    def _after(self, write: Callable[[], None]) -> list[str]:
        """Lines that ``write`` would add now, kept for after the walk."""
        held, self.lines = self.lines, []
        write()
        written, self.lines = self.lines, held
        return written

    def _online(self, node: fx.Node, source: fx.Node, largest: fx.Node) -> list[str]:
        """max and sum(exp(v - max)) in one walk (Milakov & Gimelshein, Online normalizer calculation for softmax, 2018)."""
        value = self.writer.value(source, self.space.index[source], self.writer.root)
        top, total, new = (self.writer.name(w) for w in ("top", "total", "new_top"))
        self._lanes(top, FILL["max"], torch.float32)
        self._lanes(total, "0", torch.float32)
        tile = self._tile_of(value, FILL["max"], torch.float32)
        lane = self.writer.name("lane")
        self.loop += [
            f"{lane} = {tile}",
            f"{new} = maximum({top}, {lane})",
            f'{total} = {total} * exp_step({top}, {new}) + tl.where({lane} == float("-inf"), 0.0, tl.exp({lane} - {new}))',
            f"{top} = {new}",
        ]

        def finish() -> None:
            self._finish_row(largest, f"row_max({top})", largest.name, torch.float32)
            most = self.writer.finished[largest][0].text
            text = f"tl.sum({total} * exp_step({top}, {most}), axis=1, keep_dims=True)"
            self._finish_row(node, text, node.name, torch.float32)

        return self._after(finish)

    def _welford(self, node: fx.Node, value: Value) -> list[str]:
        """Mean and squared distance lane by lane, lanes joined at the end (Chan, Golub & LeVeque, 1979)."""
        dtype = register_dtype(value.dtype)
        mean, squares, seen = (self.writer.name(w) for w in ("lane_mean", "lane_squares", "lane_count"))
        for name in (mean, squares, seen):
            self._lanes(name, "0", dtype)
        here, step = self.writer.name("here"), self.writer.name("away")
        one = "tl.where(r_in, 1.0, 0.0)" if self.writer.mask_r else "1.0"
        self.loop += [
            f"{seen} += {one}",
            f"{here} = {self._tile_of(value, mean, dtype)}",
            f"{step} = {here} - {mean}",
            f"{mean} += {step} / tl.where({seen} > 0, {seen}, 1.0)",
            f"{squares} += {step} * ({here} - {mean})",
        ]

        def finish() -> None:
            whole = self.writer.name("mean")
            self.lines.append(f"{whole} = tl.sum({mean} * {seen}, axis=1, keep_dims=True) * {1.0 / self.columns!r}")
            joined = f"tl.sum({squares} + {seen} * ({mean} - {whole}) * ({mean} - {whole}), axis=1, keep_dims=True)"
            self._finish_variance(node, joined, whole)

        return self._after(finish)

    # Column reductions

    def _column(self, node: fx.Node) -> list[str]:
        """Add this tile's rows to the program's part."""
        kind, dtype = REDUCTIONS[node.target], accumulator(node)
        value = self._operand(node)
        if value.columns and self.tile.looped:
            raise UnsupportedError(f"{node.name} sums over rows that do not fit in one tile")
        kept = not (reduction_reaches(node, self.space) & set(self.space.r))
        at = len(self.parts)
        part = f"sum{at}"
        self.parts.append((node, kept and value.columns, dtype))
        wide = f"[1, {self.tile.r}]" if kept and value.columns else "[1, 1]"
        self.accumulators.append(f"{part} = tl.full({wide}, {FILL[kind]}, {NAMES[dtype]})")
        text = value.cast(dtype)
        if not (kept and value.columns) and value.columns:
            text = row_expression(kind, self._tile_of(value, FILL[kind], dtype), dtype)
        elif not kept and self.space.r and not value.columns and kind in ("sum", "mean"):
            text = f"{text} * {self.columns}"
        if not value.rows:
            text = f"tl.broadcast_to({text}, [{self.tile.x}, {self.tile.r if kept and value.columns else 1}])"
        if self.writer.mask_x:
            text = f"tl.where(x_in, {text}, {FILL[kind]})"
        if kind in ("sum", "mean"):
            return [f"{part} += tl.sum({text}, axis=0, keep_dims=True)"]
        column = column_expression(kind, text, dtype)
        return [f"{part} = {larger(kind, dtype)}({part}, {column})"]

    def _store_parts(self) -> list[str]:
        lines = []
        blocks = self.programs[1]
        for at, (_, wide, _) in enumerate(self.parts):
            if wide:
                mask = ", r_in" if self.writer.mask_r else ""
                lines.append(f"tl.store(part{at} + tl.program_id(0) * {self.columns} + r, sum{at}{mask})")
            else:
                row = "tl.program_id(0)" if blocks == 1 else f"tl.program_id(0) * {blocks} + tl.program_id(1)"
                lines.append(f"tl.store(part{at} + {row} + tl.zeros([1, 1], tl.int32), sum{at})")
        return lines


def _needs_int64(region: Region) -> bool:
    spans = (sum((n - 1) * s for n, s in zip(t.shape, t.stride)) for t in (*region.inputs, *region.outputs))
    return max(spans, default=0) >= 2**31

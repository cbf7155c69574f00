"""The second kernel of a region with column reductions: the parts added up in a fixed order, and what depends on them."""

from __future__ import annotations

import torch
from torch import fx

from memplan.codegen.triton_choices import Writer
from memplan.codegen.triton_kernel import cdiv
from memplan.codegen.triton_main import MainKernel
from memplan.codegen.triton_ops import NAMES, register_dtype
from memplan.codegen.triton_reductions import FILL, column_expression, dependents, larger
from memplan.codegen.triton_values import Value
from memplan.codegen.triton_views import REDUCTIONS, reduced_count
from memplan.errors import UnsupportedError

_ROWS = 64  # partial results that one step of a finishing kernel adds up


class FinishKernel:
    """Adds up the partial results in a fixed order and writes what depends on them."""

    def __init__(self, main: MainKernel) -> None:
        self.main, self.space = main, main.space
        self.columns = main.columns if any(wide for _, wide, _ in main.parts) else 1
        self.block = min(128, max(1, 1 << (self.columns - 1).bit_length()))
        self.lines: list[str] = []
        self.writer = Writer(
            self.space, False, bool(self.columns % self.block), lambda text, wide: self.lines.append(text)
        )

    @property
    def programs(self) -> tuple[int, int]:
        return cdiv(self.columns, self.block), 1

    def write(self) -> list[str]:
        if self.columns > 1:
            self.lines.append(f"r = tl.program_id(0) * {self.block} + tl.arange(0, {self.block})[None, :]")
        if self.writer.mask_r:
            self.lines.append(f"r_in = r < {self.columns}")
        for at, (node, wide, dtype) in enumerate(self.main.parts):
            self._add_up(at, node, wide, dtype)
        late = dependents(self.space.columns)
        for at, node in enumerate(self.space.outputs):
            if node in late:
                if any(a in self.space.x for form in self.space.index[node] for a in form.atoms):
                    raise UnsupportedError(f"{node.name} needs a finished column reduction in every row")
                self.writer.store(at, node, self.space.index[node])
        return self.lines

    def _add_up(self, at: int, node: fx.Node, wide: bool, dtype: torch.dtype) -> None:
        kind = REDUCTIONS[node.target]
        g0, g1 = self.main.programs
        count = g0 if wide else g0 * g1
        rows = min(_ROWS, 1 << (count - 1).bit_length())
        place = f"p * {self.columns} + r" if wide else "p"
        total = f"total{at}"
        tests = ([f"(p < {count})"] if count % rows else []) + (["r_in"] if wide and self.writer.mask_r else [])
        mask = f", {' & '.join(tests)}, other={FILL[kind]}" if tests else ""
        shape = f"[1, {self.block}]" if wide else "[1, 1]"
        self.lines += [
            f"{total} = tl.full({shape}, {FILL[kind]}, {NAMES[dtype]})",
            f"for start in range(0, {count}, {rows}):",
            f"    p = start + tl.arange(0, {rows})[:, None]",
            f"    part = tl.load(part{at} + {place}{mask})",
        ]
        if kind in ("sum", "mean"):
            self.lines.append(f"    {total} += tl.sum(part, axis=0, keep_dims=True)")
        else:
            self.lines.append(f"    {total} = {larger(kind, dtype)}({total}, {column_expression(kind, 'part', dtype)})")
        out = node.meta["val"].dtype
        text = (
            f"{total} * {1.0 / reduced_count(node)!r}"
            if kind == "mean"
            else f"{total} != 0"
            if kind == "any"
            else total
        )
        if register_dtype(out) != out:
            text = f"({text}).to({NAMES[out]}).to(tl.float32)"
        elif kind != "any" and dtype != out:
            text = f"({text}).to({NAMES[out]})"
        name = self.writer.name(node.name)
        self.lines.append(f"{name} = {text}")
        self.writer.finished[node] = (Value(name, register_dtype(out), columns=wide),)

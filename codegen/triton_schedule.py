"""Where every value of a region lives in one kernel's iteration space, and which axis each reduction runs along.

The space is that of the region's *hero*: the operand of its reductions, or its largest output. Its dimensions split into
atoms (:mod:`memplan.codegen.index`); each atom belongs to the tile's x axis (rows, outer) or its r axis (reduced by the
row reductions, or the contiguous one). A reduction runs along r inside one program (*row*) or along x across programs
(*column*: partial results, then a second small kernel, so that the order of additions never depends on timing).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from memplan import torch_compat
from memplan.codegen.index import Bounds, Index, Linear, SplitAtom, broadcast, offset
from memplan.codegen.region import Region, output_nodes, placeholders
from memplan.codegen.triton_views import (
    REDUCTIONS,
    TABLES,
    aten,
    operand_index,
    prims,
    reduced_count,
    reduced_dims,
    result_index,
    shape_of,
)
from memplan.errors import UnsupportedError


def decompose(region: Region) -> fx.GraphModule:
    """The region in elementwise ops, views and plain reductions. ``meta["custom"]["from"]``: the region's own node."""
    inputs = [n.meta["val"] for n in placeholders(region.graph_module)]
    graph_module = torch_compat.trace_region(region.graph_module, inputs, torch_compat.kernel_decompositions())
    graph_module.graph.eliminate_dead_code()
    return graph_module


@dataclass
class Space:
    """The iteration space of one kernel and the index at which each output and reduction is taken."""

    graph: fx.GraphModule
    sizes: tuple[int, ...]  # extent of each atom
    index: dict[fx.Node, Index]
    x: tuple[int, ...] = ()  # atoms of each axis, outermost first
    r: tuple[int, ...] = ()
    rows: dict[fx.Node, int] = field(default_factory=dict)  # row reductions -> level, 1 for those that depend on none
    columns: tuple[fx.Node, ...] = ()

    @cached_property
    def bounds(self) -> dict[int, tuple[int, int]]:
        return {a: (0, size - 1) for a, size in enumerate(self.sizes)}

    def extent(self, atoms: tuple[int, ...]) -> int:
        total = 1
        for a in atoms:
            total *= self.sizes[a]
        return total

    @property
    def outputs(self) -> list[fx.Node]:
        return output_nodes(self.graph)


def build_space(graph: fx.GraphModule) -> Space:
    """Raises UnsupportedError for a region that one iteration space cannot hold."""
    reasons = []
    for hero in _heroes(graph):
        factors = [[extent] if extent != 1 else [] for extent in shape_of(hero)]
        for _ in range(32):  # each round refines one atom; no region of the zoo needs more than 6
            try:
                return _place(graph, hero, factors)
            except SplitAtom as split:
                _refine(factors, split)
            except UnsupportedError as error:
                reasons.append(str(error))
                break
    raise UnsupportedError(reasons[0] if reasons else "the region computes nothing")


def _heroes(graph: fx.GraphModule) -> list[fx.Node]:
    """Candidates for the space's shape, likeliest first."""
    operands = [n.args[0] for n in graph.graph.nodes if n.target in REDUCTIONS]
    results = sorted(output_nodes(graph), key=lambda n: -n.meta["val"].numel())
    operands.sort(key=lambda n: -n.meta["val"].numel())  # type: ignore[union-attr]
    return list(dict.fromkeys([*operands[:2], *results[:2]]))  # type: ignore[list-item]


def _refine(factors: list[list[int]], split: SplitAtom) -> None:
    at = 0
    for dims in factors:
        if split.atom < at + len(dims):
            place = split.atom - at
            dims[place : place + 1] = [dims[place] // split.inner, split.inner]
            return
        at += len(dims)
    raise UnsupportedError("an index from a table would have to be split")


def _place(graph: fx.GraphModule, hero: fx.Node, factors: list[list[int]]) -> Space:
    sizes = tuple(size for dims in factors for size in dims)
    forms, at = [], 0
    for dims in factors:
        form = Linear()
        for k, size in enumerate(dims):
            inner = 1
            for later in dims[k + 1 :]:
                inner *= later
            form = form + Linear.atom(at, inner) if size > 1 else form
            at += 1
        forms.append(form)
    space = Space(graph, sizes, {})
    _propagate(space, hero, tuple(forms))
    for node in (*space.outputs, *(n for n in graph.graph.nodes if n.target in REDUCTIONS)):
        if node not in space.index:
            raise UnsupportedError(f"{node.name} has no place in the loop nest of {hero.name}")
    _choose_axes(space, hero)
    return space


def _propagate(space: Space, hero: fx.Node, index: Index) -> None:
    """Give every reachable node the index at which the hero's element meets it; the first one found counts."""
    space.index[hero] = index
    queue = [hero]
    while queue:
        node = queue.pop(0)
        for other, found in _neighbours(node, space.index[node], space.bounds):
            if other not in space.index:
                space.index[other] = found
                queue.append(other)


def _neighbours(node: fx.Node, index: Index, bounds: Bounds) -> Iterator[tuple[fx.Node, Index]]:
    for user in node.users:
        if user.op != "call_function":
            continue
        if user.target in REDUCTIONS:
            yield user, _reduced(user, index)
        elif user.target is operator.getitem and isinstance(node.meta["val"], (tuple, list)):
            continue
        elif (found := result_index(user, index, bounds)) is not None:
            yield user, found
        elif user.target in TABLES:
            yield from _around_table(user, node, index)
        elif _is_elementwise(user) and shape_of(user) == shape_of(node):
            yield user, index
    if node.op != "call_function" or node.target in REDUCTIONS:
        if node.target in REDUCTIONS and isinstance(node.meta["val"], (tuple, list)):
            yield from ((u, index) for u in node.users)
        return
    if (found := operand_index(node, index, bounds)) is not None:
        source = node.args[0]
        yield source, found  # type: ignore[misc]
    elif node.target is operator.getitem:
        yield node.args[0], index  # type: ignore[misc]
    elif node.target in TABLES:
        yield from _around_table(node, node, index)
    elif _is_elementwise(node):
        for operand in node.all_input_nodes:
            yield operand, broadcast(index, shape_of(operand))


def _around_table(node: fx.Node, known: fx.Node, index: Index) -> Iterator[tuple[fx.Node, Index]]:
    """A gather or scatter of one element a row: what meets where, from the index of one of its tensors."""
    source, dim, table = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(table, fx.Node) and isinstance(dim, int)
    dim = dim % len(index)
    if shape_of(table)[dim] != 1:
        return
    short = (*index[:dim], Linear(), *index[dim + 1 :])
    yield table, short
    if node.target is aten.gather.default:
        yield node, short
    elif known in (source, node):
        yield source, index
        yield node, index


def _is_elementwise(node: fx.Node) -> bool:
    target = node.target
    return target in _ELEMENTWISE_PRIMS or (
        isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    )


_ELEMENTWISE_PRIMS = {prims.mul.default, prims.div.default, prims.sub.default}  # prims carry no tags


def _reduced(node: fx.Node, index: Index) -> Index:
    dims = reduced_dims(node)
    value = node.meta["val"]
    kept = tuple(form for d, form in enumerate(index) if d not in dims)
    first = value[0] if isinstance(value, (tuple, list)) else value
    if first.dim() == len(index):
        return tuple(Linear() if d in dims else form for d, form in enumerate(index))
    return kept


def reduction_atoms(node: fx.Node, space: Space) -> frozenset[int]:
    """The atoms a reduction sums over. Raises UnsupportedError unless they are whole dimensions of the space."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    if operand not in space.index:
        raise UnsupportedError(f"the operand of {node.name} has no place in the loop nest")
    gone: set[int] = set()
    for d in reduced_dims(node):
        form = space.index[operand][d]
        extent = 1
        for atom, coefficient in sorted(form.terms, key=lambda t: t[1]):
            if coefficient != extent:
                raise UnsupportedError(f"{node.name} reduces part of a dimension")
            extent *= space.sizes[atom]
        if extent != shape_of(operand)[d] or form.const:
            raise UnsupportedError(f"{node.name} reduces part of a dimension, or a repeated one")
        gone |= form.atoms
    return frozenset(gone)


def _choose_axes(space: Space, hero: fx.Node) -> None:
    reductions = [n for n in space.graph.graph.nodes if n.target in REDUCTIONS and reduced_count(n) > 1]
    memory = _memory_order(space, hero)
    everything = tuple(a for a in memory if space.sizes[a] > 1)
    gone = {n: reduction_atoms(n, space) for n in reductions}
    fed = {n: _feeds_its_own_space(n, gone[n], space) for n in reductions}
    innermost = everything[-1:] if everything else ()
    along_rows = [
        n for n in reductions if gone[n] and (fed[n] or (set(innermost) & gone[n] and len(gone[n]) < len(everything)))
    ]
    sets = {gone[n] for n in along_rows}
    if len(sets) > 1:
        raise UnsupportedError("reductions over different dimensions feed each other")
    columns = [n for n in reductions if n not in along_rows]
    if sets:
        r = next(iter(sets))
    elif columns:
        kept = [frozenset(everything) - gone[n] for n in columns]
        r = max(kept, key=len)
    else:
        r = frozenset()
    space.r = tuple(a for a in everything if a in r)
    space.x = tuple(a for a in everything if a not in r)
    _check_columns(space, columns, gone)
    space.columns = tuple(columns)
    space.rows = _levels(space, along_rows)


def _check_columns(space: Space, columns: list[fx.Node], gone: dict[fx.Node, frozenset[int]]) -> None:
    for node in columns:
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        present = frozenset(a for form in space.index[operand] for a in form.atoms)
        if REDUCTIONS.get(node.target) not in ("sum", "mean", "max", "min", "any"):
            raise UnsupportedError(f"{node.name} runs along the outer axis")
        if not gone[node] >= frozenset(space.x) & (present | gone[node]) or not frozenset(space.x) <= gone[node]:
            raise UnsupportedError(f"{node.name} reduces some rows and keeps others")
        if gone[node] & frozenset(space.r) and not gone[node] >= frozenset(space.r):
            raise UnsupportedError(f"{node.name} reduces part of a row")


def _memory_order(space: Space, hero: fx.Node) -> list[int]:
    """Atoms by their stride in the hero's memory, largest first: neighbours in a tile are neighbours in memory."""
    root = hero
    where = offset(space.index[root], root.meta["val"].stride())
    return sorted(range(len(space.sizes)), key=lambda a: (-where.coefficient(a), a))


def _feeds_its_own_space(node: fx.Node, gone: frozenset[int], space: Space) -> bool:
    """Whether a value that still has the reduced atoms depends on the reduction's result."""
    seen = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user in seen:
            continue
        seen.add(user)
        index = space.index.get(user)
        is_reduction = user.target in REDUCTIONS
        if is_reduction and isinstance(user.args[0], fx.Node):
            index = space.index.get(user.args[0])
        if index is not None and any(form.atoms & gone for form in index):
            return True
        stack.extend(user.users)
    return False


def _levels(space: Space, rows: list[fx.Node]) -> dict[fx.Node, int]:
    level: dict[fx.Node, int] = {}
    for node in space.graph.graph.nodes:
        above = max((level[a] for a in node.all_input_nodes if a in level), default=0)
        level[node] = above + (node in rows)
    return {n: level[n] for n in rows}

"""How large a tile and how many warps: an analytic model of registers, occupancy and the memory bus.

The kernels move bytes and compute little, so a good launch (1) keeps enough bytes in flight to fill the bus, which takes
about 2 k threads an SM with 16 bytes each, (2) does not spill, and (3) gives every SM work. A value of a tile takes one
register a thread for each 4 bytes of its element; the values alive at once are counted from the statements.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from memplan.codegen.region import Region
from memplan.codegen.triton_emit import emit
from memplan.codegen.triton_kernel import KernelPlan, Tile, cdiv
from memplan.codegen.triton_schedule import Space, build_space, decompose
from memplan.errors import UnsupportedError


@dataclass(frozen=True)
class Gpu:
    """What the model needs to know (CUDA C++ Programming Guide, compute capabilities)."""

    sms: int
    registers: int = 65536  # 32-bit, an SM
    threads: int = 2048  # resident, an SM
    shared: int = 101376  # bytes a block may take on every sm_80 and later


A100 = Gpu(108)
H100 = Gpu(132)
_SPARE_REGISTERS = 24  # addresses, masks, loop counters
_SPILL = (
    168  # estimated registers above which another tile is tried; the estimate is a bound: ptxas needs about half of it
)
_BUS_BYTES = 16  # one vector load of a thread
_MAX_PERSISTENT = 16384  # elements of a row kept in registers; beyond, even 16 warps hold 32 a thread


def choose(region: Region, gpu: Gpu = H100) -> KernelPlan:
    """The kernels with the tile the model likes best. Raises UnsupportedError when no tile can hold the region."""
    return plans(region, gpu)[0]


def plans(region: Region, gpu: Gpu = H100) -> list[KernelPlan]:
    """The kernels for each tile of the short list, best first by the model; those that may spill come last."""
    space = build_space(decompose(region))
    if not space.r and not space.columns:
        space = _square(region, space)
    found: list[KernelPlan] = []
    reason: UnsupportedError | None = None
    for tile in candidates(region, space, gpu):
        try:
            found.append(emit(region, tile, space))
        except UnsupportedError as error:
            reason = reason or error
    if not found:
        assert reason is not None
        raise reason
    return sorted(found, key=lambda plan: max(0, registers(plan) - _SPILL))  # stable: the model's order among the rest


def _square(region: Region, space: Space) -> Space:
    """Where a tensor is read along another dimension than the output is written, both get an axis of the tile, so that
    each is walked along its own contiguous dimension."""
    accesses = emit(region, Tile(128), space).accesses
    numel = space.extent(space.x)
    large = [a for a in accesses if 2 * a.bytes >= numel * _smallest(region)]
    written = {a for access in large if access.store for a, step in access.where.terms if step == 1}
    read = {a for access in large if not access.store for a, step in access.where.terms if step == 1} - written
    if len(written) != 1 or not read or space.sizes[min(written)] < 8:
        return space
    column, row = min(written), max(read, key=lambda a: space.sizes[a])
    return replace(space, x=(*(a for a in space.x if a not in (column, row)), row), r=(column,))


def _smallest(region: Region) -> int:
    return min(t.dtype.itemsize for t in (*region.inputs, *region.outputs))


def candidates(region: Region, space: Space, gpu: Gpu = H100) -> list[Tile]:
    """A short list to try or to tune over, best first by the model."""
    rows, columns = space.extent(space.x), space.extent(space.r)
    itemsize = max(
        (t.dtype.itemsize for t in (*region.inputs, *region.outputs) if t.numel >= rows * columns), default=4
    )
    if space.rows:
        tiles = _row_tiles(rows, columns, itemsize, bool(space.columns), gpu)
    elif space.columns:
        tiles = _column_tiles(rows, columns, gpu)
    elif space.r:
        width = min(64, power_of_two(columns))
        tiles = [
            Tile(2048 // width, width, warps=4),
            Tile(4096 // width, width, warps=8),
            Tile(1024 // width, width, warps=4),
        ]
    else:
        tiles = _flat_tiles(rows, itemsize, gpu)
    return tiles


def _flat_tiles(elements: int, itemsize: int, gpu: Gpu) -> list[Tile]:
    """One vector load a thread, two where there is work enough; smaller where SMs would stand idle."""
    found = []
    for vectors, warps in ((2, 4), (1, 4), (4, 4), (1, 8)):
        block = 32 * warps * vectors * max(1, _BUS_BYTES // itemsize)
        while block > 128 and cdiv(elements, block) < gpu.sms:
            block //= 2
        found.append(Tile(block, warps=max(1, min(warps, block // 32))))
    return list(dict.fromkeys(found))


def _row_tiles(rows: int, columns: int, itemsize: int, sums: bool, gpu: Gpu) -> list[Tile]:
    """Rows whole in registers where they fit, else walked in chunks; several short rows share a program."""
    width = power_of_two(columns)
    found = []
    if width <= _MAX_PERSISTENT:
        for budget in (2048, 1024, 4096):  # elements a program
            height = max(1, budget // width)
            while height > 1 and cdiv(rows, height) < 2 * gpu.sms:
                height //= 2
            warps = min(16, max(1, power_of_two(height * width) // (32 * 16)))
            found.append(Tile(height, width, _steps(rows, height, sums, gpu), max(warps, 2 if width >= 256 else 1)))
        found.append(replace(found[0], warps=min(16, 2 * found[0].warps)))
    if not sums:
        chunk = min(width, 4096 if itemsize <= 2 else 2048)
        found.append(Tile(1, chunk, warps=8, looped=True))
    return list(dict.fromkeys(found))


def _column_tiles(rows: int, columns: int, gpu: Gpu) -> list[Tile]:
    """Wide enough for whole cache lines, as many row groups as fill the SMs twice."""
    width = min(128, power_of_two(columns))
    found = []
    for height in (32, 16, 8, 4):
        height = min(power_of_two(rows), max(height, 1024 // width if columns == 1 else height))
        groups = _groups(rows, cdiv(columns, width), gpu)
        found.append(Tile(height, width, max(1, cdiv(rows, height * groups)), 4))
    return list(dict.fromkeys(found))


def _steps(rows: int, height: int, sums: bool, gpu: Gpu) -> int:
    """Row tiles a program takes in turn: with column sums, as many as its group of rows has."""
    return max(1, cdiv(rows, height * _groups(rows, 1, gpu))) if sums else 1


def _groups(rows: int, beside: int, gpu: Gpu) -> int:
    """Groups of rows that are summed apart: two programs an SM, but no group below 64 rows, as each group's partial
    result is written and read once more (two bytes moved for 64 read at least: 3 %)."""
    return max(1, min(2 * gpu.sms // beside, rows // 64))


def power_of_two(n: int) -> int:
    """The least power of two that is not less than n."""
    return 1 << max(0, n - 1).bit_length()


_ASSIGNED = re.compile(r"^\s*(\w+) (?:\+)?= (.*)$")
_WORD = re.compile(r"[A-Za-z_]\w*")


def registers(plan: KernelPlan) -> int:
    """Registers a thread of the main kernel, estimated: tile-sized values alive at once times elements a thread, and some
    to spare. A value is tile-sized when it is made from one, or from an axis of more than one element, and not reduced."""
    statements = plan.kernels[0].source.splitlines()
    last: dict[str, int] = {}
    for at, line in enumerate(statements):
        last.update(dict.fromkeys(_WORD.findall(line), at))
    wide = {"r"} if plan.tile.r > 1 else {"x"}
    ends: dict[str, int] = {}
    most = 0
    for at, line in enumerate(statements):
        made = _ASSIGNED.match(line)
        if (
            made
            and made[1] not in ("x", "r", "x_in", "r_in")
            and wide & set(_WORD.findall(made[2]))
            and "axis=" not in made[2]
        ):
            wide.add(made[1])
            ends[made[1]] = last[made[1]]
        most = max(most, len(ends))
        ends = {name: end for name, end in ends.items() if end > at}
    each = cdiv(plan.tile.x * plan.tile.r, 32 * plan.tile.warps)
    return _SPARE_REGISTERS + most * each


def occupancy(plan: KernelPlan, gpu: Gpu = H100) -> float:
    """Share of an SM's threads that the estimated registers leave room for."""
    threads = 32 * plan.tile.warps
    blocks = min(gpu.threads // threads, gpu.registers // (registers(plan) * threads))
    return blocks * threads / gpu.threads

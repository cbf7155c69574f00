"""A region and a launch shape → the source of its kernels."""

from __future__ import annotations

from memplan.codegen.region import Region
from memplan.codegen.triton_finish import FinishKernel
from memplan.codegen.triton_kernel import Kernel, KernelPlan, Tile
from memplan.codegen.triton_main import MainKernel
from memplan.codegen.triton_schedule import Space, build_space, decompose


def emit(region: Region, tile: Tile, space: Space | None = None) -> KernelPlan:
    """The region's kernels for one launch shape. Raises UnsupportedError where a tile of this kind cannot hold it."""
    space = space or build_space(decompose(region))
    main = MainKernel(region, space, tile)
    kernels = [_kernel(region.name, region, main.write(), main.programs, tile.warps, main.parts)]
    accesses = list(main.writer.accesses)
    parts = []
    if main.parts:
        finish = FinishKernel(main)
        kernels.append(_kernel(f"{region.name}_finish", region, finish.write(), finish.programs, 4, main.parts))
        accesses += finish.writer.accesses
        g0, g1 = main.programs
        parts = [(g0 * main.columns if wide else g0 * g1, dtype) for _, wide, dtype in main.parts]
    return KernelPlan(tuple(kernels), tuple(parts), tuple(accesses), tile)


def _kernel(
    name: str,
    region: Region,
    lines: list[str],
    programs: tuple[int, int],
    warps: int,
    parts: list[object] | list[tuple],
) -> Kernel:
    name = f"region_{name}"
    body = "\n".join(f"    {line}" for line in lines)
    names = [
        *(f"in{k}" for k in range(len(region.inputs))),
        *(f"out{k}" for k in range(len(region.outputs))),
        *(f"part{k}" for k in range(len(parts))),
    ]
    used = tuple(n for n in names if _mentions(body, n))
    notes = [f"{n}: {t}" for n, t in zip(names, (*region.inputs, *region.outputs)) if n in used]
    head = "\n".join(f"    # {note}" for note in notes)
    return Kernel(name, f"@triton.jit\ndef {name}({', '.join(used)}):\n{head}\n{body}\n", programs, used, warps)


def _mentions(body: str, name: str) -> bool:
    return any(f"{before}{name}{after}" in body for before in "(" for after in " ),")

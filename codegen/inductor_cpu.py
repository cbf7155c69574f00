"""A region through Inductor's C++ on the CPU: compiled once per content key, kept in the process and on disk.

Inductor fuses the region's loops itself, so a region here wants to be large: everything between two matrix products.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import fx

from memplan import torch_compat
from memplan.codegen.compiled import CompiledRegion
from memplan.codegen.decompositions import cpu_decompositions, paired
from memplan.codegen.eager import compile_eager
from memplan.codegen.region import Region, placeholders

log = logging.getLogger("memplan.codegen")


_compiled: dict[str, CompiledRegion] = {}  # by key: repeated layers compile once


def compile_inductor(region: Region) -> CompiledRegion:
    """The region's compiled function; the eager one, with a debug line, where Inductor gives up."""
    if region.key not in _compiled:
        _compiled[region.key] = _compile(region)
    return _compiled[region.key]


def _compile(region: Region) -> CompiledRegion:
    inputs = [n.meta["val"] for n in placeholders(region.graph_module)]
    try:
        body = fx.GraphModule(region.graph_module, paired(region.graph_module.graph))
        graph = torch_compat.trace_fake(body, inputs, cpu_decompositions())
        run, source = torch_compat.inductor_compile(graph, inputs)
    except RuntimeError as error:
        log.debug("region %s runs eagerly: %s", region.name, error)
        return compile_eager(region)

    return CompiledRegion(run, wrapper_workspace(source, region), "inductor", source)


_ALLOCATE = re.compile(r"^(\w+) = empty_strided_\w+\(\(([^)]*)\), \(([^)]*)\), (torch\.\w+)\)")
_RENAME = re.compile(r"^(\w+) = (?:reinterpret_tensor\()?(\w+)(?:[,;)]|$)")
_DELETE = re.compile(r"\bdel (\w+)")
_ALIGNMENT = 64  # bytes; what PyTorch's CPU allocator rounds to


def wrapper_workspace(source: str, region: Region) -> int:
    """Bytes that Inductor's wrapper holds beyond inputs and outputs, read from its allocations and deletions."""
    storage: dict[str, int] = {}  # name in the wrapper -> storage
    size: dict[int, int] = {}
    peak = 0
    for line in map(str.strip, source.splitlines()):
        if made := _ALLOCATE.match(line):
            storage[made[1]] = len(size)
            size[len(size)] = _dense_bytes(made[2], made[3], made[4])
        elif (renamed := _RENAME.match(line)) and renamed[2] in storage:
            storage[renamed[1]] = storage[renamed[2]]
        for name in _DELETE.findall(line):
            storage.pop(name, None)
        peak = max(peak, sum(size[s] for s in set(storage.values())))
    results = sum(-(-t.numel * t.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for t in region.outputs)
    return max(0, peak - results)


def _dense_bytes(shape: str, stride: str, dtype: str) -> int:
    extents, steps = ([int(v) for v in text.split(",") if v.strip()] for text in (shape, stride))
    last = sum((extent - 1) * step for extent, step in zip(extents, steps)) + 1
    kind: Any = getattr(torch, dtype.removeprefix("torch."))
    return -(-(0 if 0 in extents else last) * kind.itemsize // _ALIGNMENT) * _ALIGNMENT

"""Tensors whose memory is a mapped file: the bytes lie on the disk, and a step brings in what it needs.

A mapped tensor is an ordinary CPU tensor to everyone else; its pages come and go through the page cache.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from bisect import bisect_right, insort
from collections.abc import Sequence
from typing import NamedTuple

import torch

from memplan.runtime.disk import File, SpillFile
from memplan.runtime.space import aligned

DISK = "disk"


class Home(NamedTuple):
    """Where a tensor's bytes lie."""

    file: File
    start: int  # bytes


class _Mapping:
    """A mapped file. ``versions``: by offset, how often each tensor on it had been changed in place when it was made:
    what is changed through a private mapping later is in memory alone."""

    def __init__(self, memory: mmap.mmap, file: File, private: bool) -> None:
        with memoryview(memory) as view:
            self.base = ctypes.addressof(ctypes.c_ubyte.from_buffer(view))
        self.size, self.file, self.private = len(memory), file, private
        self.versions: dict[int, int] = {}


_mappings: dict[int, _Mapping] = {}  # by base address
_bases: list[int] = []  # sorted


def map_file(path: str | os.PathLike[str]) -> mmap.mmap:
    """A private mapping of a file, known to :func:`home_of`. Raises OSError, and ValueError for an empty file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    _know(memory, File(descriptor), private=True)
    return memory


def mapped(memory: mmap.mmap, start: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor over the bytes of a mapping from ``start`` on, with a storage of its own."""
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(tuple(shape))
    mapping = _around(tensor.data_ptr())
    assert mapping is not None
    mapping.versions[start] = tensor._version
    return tensor


def on_disk(tensor: torch.Tensor, directory: str | None = None) -> torch.Tensor:
    """A CPU tensor with the same values whose memory is an unnamed file; changes to it are changes to the file.

    Raises TierError where no such file can be made.
    """
    source = tensor.detach().cpu().contiguous()
    size = source.untyped_storage().nbytes() if source.numel() else 0
    if size == 0:
        return source.clone()
    return mapped(unnamed_file(size, directory), 0, source.shape, source.dtype).copy_(source)


def unnamed_file(size: int, directory: str | None = None) -> mmap.mmap:
    """A shared mapping of an unnamed file of ``size`` bytes, known to :func:`home_of`. Raises TierError."""
    file = SpillFile(directory)
    file.reserve(aligned(size))
    memory = mmap.mmap(file.descriptor, aligned(size))
    _know(memory, file, private=False)
    return memory


def tier_of(value: object) -> str:
    """The tier on which a parameter lies between steps; '' for one in memory, and for what is no real tensor."""
    if not isinstance(value, torch.Tensor) or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return ""
    return DISK if home_of(value) is not None else ""


def home_of(tensor: torch.Tensor) -> Home | None:
    """Where the bytes of a tensor's storage lie; None for one in memory, or changed there since it was mapped."""
    if tensor.device.type != "cpu" or tensor.is_inference():
        return None
    address = tensor.untyped_storage().data_ptr()
    mapping = _around(address)
    if mapping is None:
        return None
    start = address - mapping.base
    if mapping.private and mapping.versions.get(start) != tensor._version:
        return None
    return Home(mapping.file, start)


def _know(memory: mmap.mmap, file: File, private: bool) -> None:
    mapping = _Mapping(memory, file, private)
    _mappings[mapping.base] = mapping
    insort(_bases, mapping.base)
    weakref.finalize(memory, _forget, mapping.base)


def _forget(base: int) -> None:
    del _mappings[base]
    _bases.remove(base)


def _around(address: int) -> _Mapping | None:
    at = bisect_right(_bases, address) - 1
    mapping = _mappings.get(_bases[at]) if at >= 0 else None
    return mapping if mapping is not None and address < mapping.base + mapping.size else None

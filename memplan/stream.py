"""Weights that stay in their file: a model larger than memory runs inference with what each step needs brought in.

The parameters become tensors over a mapping of the safetensors file, without a second copy. Compiled under a budget,
they are read from the file in the order of their use, ahead of it, and dropped after it ("LLM in a flash", TPI-LLM).
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import struct
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memplan.errors import InputError
from memplan.runtime import homes

log = logging.getLogger("memplan")

_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
# Names of the format (github.com/huggingface/safetensors, "Format").
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Streamed:
    """What :func:`stream_weights` did."""

    parameters: int  # now in the file
    bytes: int
    left: tuple[str, ...]  # parameters of the model that the file does not hold, unchanged


def stream_weights(model: torch.nn.Module, path: str | os.PathLike[str]) -> Streamed:
    """Freeze ``model`` and let its parameters lie in the safetensors file ``path`` (or the files of its index,
    ``model.safetensors.index.json``); parameters on the meta device are filled that way.

    ``torch.compile(model, backend="memplan", options={"memory_budget": …})`` then keeps no more of them in memory than
    the budget allows. Raises InputError where the file is damaged or does not fit the model.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    entries = {name: entry for file in _files(Path(path)) for name, entry in _read(file).items()}
    names = _names(model)
    count = total = 0
    left = []
    for parameter, aliases in names.items():
        name = next((n for n in aliases if n in entries), None)
        if name is None:
            if parameter.device.type == "meta":
                raise InputError(f"{path}: no tensor {aliases[0]!r}, which the model has on the meta device")
            left.append(aliases[0])
            parameter.requires_grad_(False)
            continue
        tensor = entries[name].tensor()
        if tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(parameter.shape)} in the model"
            raise InputError(f"{path}: {name} has the shape {shapes}")
        frozen = torch.nn.Parameter(tensor, requires_grad=False)
        for alias in aliases:
            owner, _, own = alias.rpartition(".")
            setattr(model.get_submodule(owner), own, frozen)
        count, total = count + 1, total + tensor.nbytes
    log.info("%d parameters of %d bytes stay in %s; %d are in memory", count, total, path, len(left))
    return Streamed(count, total, tuple(left))


@dataclass(frozen=True)
class _Entry:
    """A tensor of a mapped file."""

    memory: mmap.mmap
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> torch.Tensor:
        return homes.mapped(self.memory, self.start, self.shape, self.dtype)


def _names(model: torch.nn.Module) -> dict[torch.nn.Parameter, list[str]]:
    """Every name of every parameter: tied ones have several."""
    found: dict[torch.nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[parameter].append(name)
    return found


def _files(path: Path) -> list[Path]:
    if path.suffix != ".json":
        return [path]
    try:
        shards = json.loads(path.read_text())["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not an index of safetensors files: {error}") from error
    return [path.parent / shard for shard in dict.fromkeys(shards)]


def _read(path: Path) -> dict[str, _Entry]:
    """The tensors of a safetensors file: eight bytes with the header's length, a JSON header, then the values."""
    try:
        memory = homes.map_file(path)
        (length,) = struct.unpack("<Q", memory[:8])
        if length > min(_LONGEST_HEADER, len(memory) - 8):
            raise ValueError("its header is longer than the file")
        header = json.loads(memory[8 : 8 + length])
        header.pop("__metadata__", None)
        return {name: _entry(memory, 8 + length, about) for name, about in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{path}: not a safetensors file: {error}") from error


def _entry(memory: mmap.mmap, base: int, about: dict[str, Any]) -> _Entry:
    start, end = about["data_offsets"]
    dtype, shape = _DTYPES[about["dtype"]], tuple(about["shape"])
    if not 0 <= start <= end <= len(memory) - base or end - start != torch.Size(shape).numel() * dtype.itemsize:
        raise ValueError("a tensor's bytes do not fit its shape, or lie outside the file")
    return _Entry(memory, base + start, shape, dtype)

"""Run regions through Triton's interpreter; a process of its own, as TRITON_INTERPRET=1 holds for all kernels in one.

    TRITON_INTERPRET=1 python tests/codegen/interpret.py FOLDER NAME...

A name is one of the zoo's (with a "!" behind it: NaN and infinities strewn in), or "random:SEED". Prints one JSON line a
region: its largest error against float64 over the outputs, eager's own, and whether what is not finite stands where
eager has it (which kind it is differs between eager's own kernels: its vectorised gelu makes NaN of infinity).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import triton.language as tl
from random_regions import random_case
from reference import error, in_float64, same_kinds
from regions import ZOO, build
from triton.language.extra import libdevice
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from memplan.codegen.eager import compile_eager
from memplan.codegen.region import Region
from memplan.codegen.triton_launch import launch, load_module, module_source, write_module
from memplan.codegen.triton_model import choose
from memplan.errors import UnsupportedError


def round_to_bfloat16(self: InterpreterBuilder, source: TensorHandle, kind: tl.dtype) -> TensorHandle:
    """The interpreter truncates where the hardware rounds to nearest even."""
    if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16).view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), kind.scalar)
    return cast(self, source, kind)


cast = InterpreterBuilder.cast_impl
InterpreterBuilder.cast_impl = round_to_bfloat16


def stand_in(function: object) -> object:
    """The interpreter has no libdevice: NumPy in its place."""

    def call(*arguments: tl.tensor) -> tl.tensor:
        first = next(a for a in arguments if isinstance(a, tl.tensor))
        values = [a.handle.data if isinstance(a, tl.tensor) else a for a in arguments]
        result = np.asarray(function(*values), dtype=first.handle.data.dtype)  # type: ignore[operator]
        return tl.tensor(TensorHandle(result, first.handle.dtype), first.type)

    return call


for name, function in {
    "tanh": np.tanh, "expm1": np.expm1, "log1p": np.log1p, "pow": np.power, "trunc": np.trunc, "nearbyint": np.rint,
    "fmod": np.fmod,
}.items():  # fmt: skip
    setattr(libdevice, name, stand_in(function))


def run(region: Region, inputs: Sequence[torch.Tensor], folder: Path) -> tuple[torch.Tensor, ...]:
    plan = choose(region)
    module = load_module(write_module(module_source(region, plan), region.name, folder))
    return launch(region, plan, module, inputs)


def main(folder: Path, names: Sequence[str]) -> None:
    np.seterr(all="ignore")
    for name in names:
        seed = name.removeprefix("random:")
        region, inputs = build(random_case(int(seed)) if seed != name else ZOO[name.removesuffix("!")])
        if name.endswith("!"):  # with NaN and infinities strewn in
            for t in inputs:
                if t.is_floating_point() and t.numel() > 8 and t.is_contiguous():
                    flat = t.view(-1)
                    flat[1], flat[t.numel() // 2], flat[-2] = float("nan"), float("inf"), float("-inf")
        try:
            found = run(region, inputs, folder)
        except UnsupportedError as unsupported:
            print(json.dumps({"name": name, "unsupported": str(unsupported)}), flush=True)
            continue
        eager = compile_eager(region).run(inputs)
        exact = in_float64(region, inputs)
        row = {
            "name": name,
            "error": max(error(f, e) for f, e in zip(found, exact)),
            "eager": max(error(f, e) for f, e in zip(eager, exact)),
            "types": [str(t.dtype) for t in region.outputs],
            "strides": all(f.stride() == e.stride() and f.dtype == e.dtype for f, e in zip(found, eager)),
            "special": all(same_kinds(f, e) for f, e in zip(found, eager)),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

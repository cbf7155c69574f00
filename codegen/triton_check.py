"""What can be known of a generated kernel without a GPU: it compiles for a target, what it takes there, what it moves."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from memplan.codegen.region import Region
from memplan.codegen.triton_kernel import Kernel, KernelPlan
from memplan.codegen.triton_launch import load_module, module_source, write_module

# Bytes of shared memory one block may ask for, by compute capability (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
REGISTER_LIMIT = 255

_POINTER = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int8: "i8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What the assembler gave one kernel. Bytes, but ``registers``, which are 32-bit and of one thread."""

    kernel: str
    registers: int
    shared: int
    spilled: int

    def fits(self, capability: int) -> bool:
        return self.spilled == 0 and self.registers <= REGISTER_LIMIT and self.shared <= SHARED_LIMIT[capability]


def moved_bytes(region: Region, plan: KernelPlan) -> int:
    """Bytes that the launches read and write, counted from every load and store that was emitted.

    Within one walk over the row a tensor is read at most once whole (its repeated elements come from cache); every
    further walk reads again. Partial results count twice: written, then read.
    """
    total = 2 * plan.workspace
    seen: dict[tuple[int, int, bool], int] = {}
    for access in plan.accesses:
        key = (access.tensor, access.scan, access.store)
        seen[key] = seen.get(key, 0) + access.bytes
    whole = {(k, False): t.touched_bytes for k, t in enumerate(region.inputs)}
    whole |= {(k, True): t.touched_bytes for k, t in enumerate(region.outputs)}
    return total + sum(min(count, whole[tensor, store]) for (tensor, _, store), count in seen.items())


def compile_for(region: Region, plan: KernelPlan, capability: int, folder: Path | None = None) -> list[Resources]:
    """Compile every kernel of the plan for sm_``capability`` and read what it takes. No GPU is needed.

    Raises RuntimeError (from Triton or its assembler) for source that does not compile.
    """
    module = load_module(write_module(module_source(region, plan), region.name, folder))
    return [_compile(getattr(module, kernel.name), kernel, region, plan, capability) for kernel in plan.kernels]


def _compile(function: object, kernel: Kernel, region: Region, plan: KernelPlan, capability: int) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {f"in{k}": t.dtype for k, t in enumerate(region.inputs)}
    kinds |= {f"out{k}": t.dtype for k, t in enumerate(region.outputs)}
    kinds |= {f"part{k}": dtype for k, (_, dtype) in enumerate(plan.parts)}
    signature = {name: f"*{_POINTER[kinds[name]]}" for name in kernel.tensors}
    aligned = {(k,): [["tt.divisibility", 16]] for k in range(len(signature))}  # what PyTorch's allocators give
    source = ASTSource(function, signature, constexprs={}, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernel.warps})
    return _read(kernel.name, made.asm["cubin"], made.metadata.shared)


def _read(name: str, cubin: bytes, dynamic_shared: int) -> Resources:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return Resources(name, found["REG"], found["SHARED"] + dynamic_shared, found["STACK"] + found["LOCAL"])

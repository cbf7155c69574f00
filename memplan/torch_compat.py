"""Every private torch name memplan uses, for torch 2.11 to 2.13. Nothing else imports from torch's private modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext, detect_fake_mode
from torch._higher_order_ops.effects import with_effects
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.symbolic_shapes import find_symbol_binding_fx_nodes, free_symbols, is_symbol_binding_fx_node
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "TracingContext",
    "aot_backend",
    "detect_fake_mode",
    "disable_current_modes",
    "find_symbol_binding_fx_nodes",
    "free_symbols",
    "is_symbol_binding_fx_node",
    "saved_for_backward_descriptor",
    "size_hint",
    "storage_key",
    "with_effects",
]


def size_hint(value: Any) -> int:
    """The hint of a SymInt (the size seen at compile time), or the int itself."""
    if isinstance(value, int):
        return value
    renamed = "optimization_hint" if hasattr(symbolic_shapes, "optimization_hint") else "size_hint"  # in torch 2.12
    return int(getattr(symbolic_shapes, renamed)(value))


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of a (fake) tensor's storage; views share it while any of them is alive."""
    return tensor.untyped_storage()._cdata


def saved_for_backward_descriptor(index: int) -> Any:
    """The descriptor AOTAutograd gives to the index-th value that the forward saves."""
    from torch._functorch._aot_autograd.descriptors import SavedForBackwardsAOTOutput

    return SavedForBackwardsAOTOutput(index)


def aot_backend(
    *,
    forward: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    backward: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    inference: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    partition: Callable[..., tuple[fx.GraphModule, fx.GraphModule]],
    decompositions: dict[Any, Callable[..., Any]] | None = None,
) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """A dynamo backend around AOTAutograd whose mutations stay in the graph as trailing ``copy_``."""
    return aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        inference_compiler=inference,
        partition_fn=partition,
        decompositions=decompositions or {},
        keep_inference_input_mutations=True,
    )


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """The table that brings aten to the few ops a kernel generator knows; Inductor's own."""
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


def trace_fake(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], decompositions: Any = None
) -> fx.GraphModule:
    """``function`` over fake ``inputs`` as a graph of functional aten ops, decomposed by the table given."""
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = detect_fake_mode(inputs) or FakeTensorMode()
    with disable_current_modes(), mode:
        return make_fx(function, decomposition_table=decompositions or {})(*inputs)


def inductor_compile(graph_module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
    """Inductor's code for a decomposed graph over fake inputs: a callable that takes a list and clears it.

    The outputs keep the strides of the graph's fake tensors. ``source_code`` of the result is the generated wrapper.
    Raises RuntimeError where Inductor or the C++ compiler gives up.
    """
    from torch._guards import tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.exc import CppCompileError, InductorError

    output = next(reversed(graph_module.graph.nodes))
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))  # type: ignore[arg-type]
    mode = detect_fake_mode(inputs) or FakeTensorMode()
    try:
        with disable_current_modes(), tracing(TracingContext(mode)):
            return compile_fx_inner(graph_module, list(inputs))
    except (InductorError, CppCompileError) as error:
        raise RuntimeError(f"Inductor cannot compile the region: {error}") from error


def allocation_events(function: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What ``function`` returns, and every event of torch's allocators while it ran in this thread, in order.

    An event is signed bytes, positive where memory is taken. The legacy profiler gives them in order, at a tenth of
    kineto's cost for a single op, and prints nothing.
    """
    from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
    from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

    record_shapes, memory, stack, flops, modules = False, True, False, False, False
    _enable_profiler_legacy(
        ProfilerConfig(ProfilerState.CPU, record_shapes, memory, stack, flops, modules, _ExperimentalConfig())
    )
    try:
        result = function()
    finally:
        threads = _disable_profiler_legacy()
    events = (event for thread in threads for event in thread if event.kind() == "memory_alloc")
    return result, [event.cpu_memory_usage() + event.cuda_memory_usage() for event in events]

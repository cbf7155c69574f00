"""Every private torch name memplan uses, for torch 2.11 to 2.13. Nothing else imports from torch's private modules."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._dynamo import trace_rules
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported
from torch._dynamo.external_utils import wrap_inline
from torch._guards import TracingContext, detect_fake_mode
from torch._higher_order_ops.effects import with_effects
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.symbolic_shapes import find_symbol_binding_fx_nodes, free_symbols, is_symbol_binding_fx_node
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes

__all__ = [
    "BackendCompilerFailed",
    "DataDependentOutputException",
    "FailOnRecompileLimitHit",
    "FakeTensor",
    "FakeTensorMode",
    "TracingContext",
    "Unsupported",
    "aot_backend",
    "default_partition",
    "detect_fake_mode",
    "disable_current_modes",
    "fake_inputs",
    "find_symbol_binding_fx_nodes",
    "free_symbols",
    "is_symbol_binding_fx_node",
    "rng_state_bytes",
    "saved_for_backward_descriptor",
    "size_hint",
    "storage_key",
    "suggest_memory_format",
    "unplanned",
    "with_effects",
]


# (tensor, sizes, strides, offset) → a tensor over the same memory, ``offset`` elements behind the first: what any view
# comes to, in a third of its time, as neither dispatcher nor autograd is asked.
reinterpret: Callable[..., torch.Tensor] = torch._C._dynamo.guards._reinterpret_tensor  # type: ignore[attr-defined]
# (tensor, sizes, strides): AssertionError where it has others. Strides of dimensions of size 1 may be any.
assert_size_stride: Callable[..., None] = torch._C._dynamo.guards.assert_size_stride


def size_hint(value: Any) -> int:
    """The hint of a SymInt (the size seen at compile time), or the int itself."""
    if isinstance(value, int):
        return value
    renamed = "optimization_hint" if hasattr(symbolic_shapes, "optimization_hint") else "size_hint"  # in torch 2.12
    return int(getattr(symbolic_shapes, renamed)(value))


def direct(target: Any) -> Callable[..., Any]:
    """What a call of an op's overload comes to, without the Python frame between; torch's own binding takes the arguments
    apart faster than the one that knows ops by their schemas."""
    if target in _BOUND:
        return _BOUND[target]
    return target._op if isinstance(target, torch._ops.OpOverload) else target


_BOUND: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.addmm.default: torch.addmm,
    torch.ops.aten.bmm.default: torch.bmm,
}


def unplanned(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Run a graph of AOTAutograd's as it stands; arguments are given up as they are used."""
    from torch._dynamo.backends.debugging import boxed_nop

    return boxed_nop(graph_module, list(inputs))


def default_partition(joint: fx.GraphModule, inputs: Any, **keywords: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """torch's own cut between forward and backward: everything the backward reads is saved."""
    from torch._functorch.partitioners import default_partition as partition

    return partition(joint, inputs, **keywords)


def fake_mode_of(tensors: Sequence[torch.Tensor]) -> FakeTensorMode:
    """The mode that fake tensors among these belong to, or a new one."""
    return detect_fake_mode(tensors) or FakeTensorMode(allow_non_fake_inputs=True)


def to_fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor of the same shape, strides, dtype and device; one on the meta device becomes one on the CPU."""
    if isinstance(tensor, FakeTensor):
        return tensor
    if tensor.device.type != "meta":
        return mode.from_tensor(tensor, static_shapes=True)
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)


def fake_inputs(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """What dynamo traced with in place of the tensors among ``inputs``: their shapes without their memory."""
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    traced = [node.meta.get("example_value") for node in placeholders]
    traced += [None] * (len(inputs) - len(traced))
    return [t if isinstance(t, FakeTensor) else given for t, given in zip(traced, inputs, strict=False)]


def breaks(graph_module: fx.GraphModule) -> bool:
    """Whether dynamo ended this graph before its frame returned, so that others follow."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    return reason is None or bool(reason.graph_break)


def fake_results(graph_module: fx.GraphModule) -> Any:
    """New tensors shaped as the results of one of dynamo's graphs, in the ambient fake mode; nothing is computed."""

    def shaped(node: fx.Node) -> Any:
        value = node.meta["example_value"]
        if not isinstance(value, torch.Tensor):
            return value
        shape, strides = ([size_hint(n) for n in part] for part in (value.shape, value.stride()))
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)

    return fx.node.map_arg(graph_module.graph.output_node().args[0], shaped)


def many_recompiles() -> Any:
    """Tracing is not bounded by dynamo's limit on recompilations of one function."""
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    return torch._dynamo.config.patch({name: 1_000_000})


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in a code object of its own: dynamo counts recompilations by code, and skips for good the code that
    it once found no graph in."""
    assert isinstance(function, types.FunctionType)
    code, names, name = function.__code__.replace(), function.__globals__, function.__name__
    own = types.FunctionType(code, names, name, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    own.__dict__.update(function.__dict__)
    return own


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The model that ``torch.compile(model)`` wraps; any other one as it is."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def unmet(model: torch.nn.Module) -> Callable[..., Any]:
    """What to give torch.compile so that nothing it met before counts, such as another model of the same class. The model
    becomes a part of it: its forward changes."""
    forward = model.forward
    if isinstance(forward, types.MethodType) and trace_rules.check(forward):
        return with_own_code(wrap_inline(model))  # torch's own classes: torch.compile wraps all in one code object
    if isinstance(forward, types.MethodType) and isinstance(forward.__func__, types.FunctionType):
        model.forward = types.MethodType(with_own_code(forward.__func__), model)
    return model


def frame_id() -> int | None:
    """Number of the Python frame that dynamo compiles now: the same when it compiles it again for other shapes."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    return None if compile_id is None else compile_id.frame_id


def tracing(context: TracingContext | None) -> Any:
    """Compile a graph again in the context in which dynamo first captured it."""
    return torch._guards.tracing(context)


def never_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep dynamo out of a function that compiled code calls."""
    return torch._dynamo.disable(function)


def rng_state_bytes(device_type: str) -> int:
    """Size of a default generator's state: the Mersenne twister's on the CPU, Philox seed and offset elsewhere."""
    return torch.get_rng_state().numel() if device_type == "cpu" else 16


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
    decompositions: dict[Any, Callable[..., Any]],
) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """A dynamo backend around AOTAutograd whose mutations stay in the graph as trailing ``copy_``."""
    return aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        inference_compiler=inference,
        partition_fn=partition,
        decompositions=decompositions,
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


def fakes_like(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fake tensors of the mode of the compile under way, laid out as (fake) ``tensors`` of any other mode are."""
    with detect_fake_mode() or FakeTensorMode():
        return [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).requires_grad_(t.requires_grad)
            for t in tensors
        ]


def inductor_compile(
    graph_module: fx.GraphModule, inputs: Sequence[torch.Tensor]
) -> tuple[Callable[[list[torch.Tensor]], tuple[torch.Tensor, ...]], str]:
    """Inductor's code for a decomposed graph over fake inputs: a callable that takes a list and clears it, and its text.

    The outputs keep the strides of the graph's fake tensors. What Inductor wraps around the callable is for its own
    caches and profiles. It does not check how its arguments lie in memory. Raises RuntimeError where Inductor or the C++
    compiler gives up.
    """
    from torch._guards import tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.exc import CppCompileError, InductorError

    output = graph_module.graph.output_node()
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))  # type: ignore[arg-type]
    mode = detect_fake_mode(inputs) or FakeTensorMode()
    try:
        with disable_current_modes(), tracing(TracingContext(mode)), config.patch(size_asserts=False):
            made: Any = compile_fx_inner(graph_module, list(inputs))
            return getattr(made, "current_callable", made), str(getattr(made, "source_code", ""))
    except (InductorError, CppCompileError) as error:
        raise RuntimeError(f"Inductor cannot compile the region: {error}") from error


def onednn_linear() -> Any:
    """oneDNN's product of float matrices, ``(input, weight, bias, "none", [], "")``; None where torch is built without."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return None
    found = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if found is None else found.default


def record_allocations() -> None:
    """Begin to record what torch's allocators give to this thread, by the events of the legacy profiler: it has them in
    order, at a tenth of kineto's cost for a single op, and prints nothing. RuntimeError while another profiler is at work.
    """
    from torch._C._autograd import _enable_profiler_legacy
    from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

    record_shapes, memory, stack, flops, modules = False, True, False, False, False
    _enable_profiler_legacy(
        ProfilerConfig(ProfilerState.CPU, record_shapes, memory, stack, flops, modules, _ExperimentalConfig())
    )


def recorded_allocations() -> list[int]:
    """Ends that: signed bytes in order, positive where memory was taken."""
    from torch._C._autograd import _disable_profiler_legacy

    found = (event for thread in _disable_profiler_legacy() for event in thread if event.kind() == "memory_alloc")
    return [event.cpu_memory_usage() + event.cuda_memory_usage() for event in found]


def kernel_decompositions() -> dict[Any, Callable[..., Any]]:
    """Brings what a region may hold to elementwise ops, views and plain reductions, with eager's dtype promotion."""
    from torch._decomp import core_aten_decompositions, get_decompositions

    aten = torch.ops.aten
    composite = [
        aten._softmax, aten._softmax_backward_data, aten._log_softmax, aten._log_softmax_backward_data,
        aten.native_layer_norm, aten.native_layer_norm_backward, aten._fused_rms_norm, aten._fused_rms_norm_backward,
        aten.native_group_norm, aten.native_group_norm_backward, aten.native_batch_norm, aten.native_batch_norm_backward,
        aten._native_batch_norm_legit, aten._native_batch_norm_legit_functional, aten.batch_norm_backward,
        aten._native_batch_norm_legit_no_training, aten.nll_loss_forward, aten.nll_loss_backward,
        aten.gelu, aten.gelu_backward, aten.silu, aten.silu_backward, aten.addcmul, aten.addcdiv, aten.lerp,
        aten.threshold_backward, aten.tanh_backward, aten.sigmoid_backward, aten.leaky_relu, aten.leaky_relu_backward,
        aten.hardtanh, aten.hardtanh_backward, aten.hardswish, aten.hardswish_backward, aten.elu, aten.elu_backward,
        aten.softplus, aten.softplus_backward, aten.mse_loss, aten.mse_loss_backward, aten.native_dropout_backward,
        aten.masked_fill, aten.glu, aten.clamp, aten.logsumexp, aten.linalg_vector_norm, aten.std, aten.stack,
        aten.slice_backward, aten.select_backward, aten.hardsigmoid, aten.rsub,
    ]  # fmt: skip
    return {**core_aten_decompositions(), **get_decompositions(composite)}


def trace_region(graph_module: fx.GraphModule, inputs: Sequence[torch.Tensor], decompositions: Any) -> fx.GraphModule:
    """As :func:`trace_fake`, and each new node's ``meta["custom"]["from"]`` is the node of ``graph_module`` it is from."""
    from torch.fx.traceback import preserve_node_meta

    class Named(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            with torch.fx.traceback.set_current_meta(n):
                return super().run_node(n)

    for node in graph_module.graph.nodes:
        node.meta["custom"] = {"from": node}
    with preserve_node_meta():
        return trace_fake(Named(graph_module).run, inputs, decompositions)


def dynamo_source(node: fx.Node) -> str:
    """Where dynamo found a placeholder's value, as Python text (``L['self']._parameters['weight']``); '' if unknown."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")  # a method until 2.11, a property since
    return str(name() if callable(name) else name)


def clear_blas_workspaces() -> None:
    """Give back what cuBLAS holds for each thread and stream; it takes it again when it next runs."""
    torch._C._cuda_clearCublasWorkspaces()


def around_backward(value: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Have both called around the compiled backward that leads to the tensors in ``value``, if there is one."""
    waiting = [t.grad_fn for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CompiledFunction" in node.name():
            node.register_prehook(lambda _: before())
            node.register_hook(lambda *_: after())
            return
        waiting.extend(parent for parent, _ in node.next_functions)


def intercept_inductor(substitute: Callable[..., Callable[..., Any]] | None) -> None:
    """Wherever torch.compile hands a graph to Inductor, call ``substitute(door, compile, graph_module, inputs)`` instead.

    ``door`` is one object for all the graphs of one torch.compile call, ``compile(graph_module, inputs)`` is Inductor.
    None ends it.
    """
    through = _INDUCTOR if substitute is None else _through(substitute)
    setattr(torch._TorchCompileInductorWrapper, "__call__", through)  # noqa: B010


_INDUCTOR = torch._TorchCompileInductorWrapper.__call__


def _through(substitute: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
    def compile_graph(self: Any, graph_module: Any, inputs: Any, **keywords: Any) -> Any:
        def inductor(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            return _INDUCTOR(self, graph_module, inputs, **keywords)

        return substitute(self, inductor, graph_module, inputs)

    return compile_graph


class _Partitioner(CustomPartitionerFn):
    """What Inductor's caches see of a partition is its uuid, in pickles as well."""

    def __init__(self, partition: Callable[..., tuple[fx.GraphModule, fx.GraphModule]], uuid: str) -> None:
        self._partition, self._uuid = partition, uuid

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **keywords: Any) -> Any:
        return self._partition(gm, joint_inputs, **keywords)

    def uuid(self) -> str:
        return self._uuid

    def __getstate__(self) -> dict[str, str]:
        return {"_uuid": self._uuid}


@contextmanager
def partition_by(partition: Callable[..., tuple[fx.GraphModule, fx.GraphModule]], uuid: str) -> Iterator[None]:
    """While it lasts, Inductor cuts joint graphs by ``partition``. ``uuid``: all that its answer depends on besides the
    graph; Inductor's caches have it in their keys. AOTAutograd's own cache would keep ``partition`` from being asked.
    """
    from torch._functorch import config as aot_config
    from torch._inductor import config

    cut = config.patch(custom_partitioner_fn=_Partitioner(partition, uuid))
    with cut, aot_config.patch(enable_autograd_cache=False):
        yield


def min_cut_partition(joint: fx.GraphModule, inputs: Any, **keywords: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Inductor's own cut between forward and backward."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    return min_cut_rematerialization_partition(joint, inputs, **keywords)


class _Traced(Exception):
    """Carries the joint graph out of AOTAutograd, which would go on to compile it."""

    def __init__(self, joint: fx.GraphModule, forward_outputs: int) -> None:
        self.joint, self.forward_outputs = joint, forward_outputs


def joint_graph(
    graph_module: fx.GraphModule, inputs: Sequence[Any], decompositions: dict[Any, Callable[..., Any]]
) -> tuple[fx.GraphModule, int] | None:
    """Forward and backward of one of dynamo's graphs, and how many results the forward has; None where nothing in it
    needs a gradient."""

    def partition(joint: fx.GraphModule, _: Any, *, num_fwd_outputs: int, **__: Any) -> Any:
        raise _Traced(joint, num_fwd_outputs)

    backend = aot_backend(
        forward=unplanned,
        backward=unplanned,
        inference=unplanned,
        partition=partition,
        decompositions=decompositions,
    )
    try:
        backend(graph_module, inputs)
    except _Traced as traced:
        return traced.joint, traced.forward_outputs
    return None


def without_autocast() -> Any:
    """A captured graph holds autocast's casts already."""
    return torch._C._DisableAutocast()


def count_step(optimizer: torch.optim.Optimizer) -> None:
    """Tell learning-rate schedulers, which warn otherwise, that the optimizer made a step."""
    optimizer._opt_called = True  # type: ignore[attr-defined]

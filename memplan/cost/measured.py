"""Cost by measurement: each op once per signature, with made-up operands of exactly its layouts.

The op runs in a thread of its own. Torch's dispatch modes, profilers, grad mode and autocast belong to a thread, so
nothing of the compile under way (fake tensors, functionalization, tracing) can reach the measured op, and the profiler
that a user may have running sees nothing of it. The random number generators are put back as they were.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import fx

from memplan.cost import Cost
from memplan.cost.analytic import AnalyticCost, is_view, round_up
from memplan.cost.cache import Cache
from memplan.cost.pages import faults, seconds_per_fault, unavoidable
from memplan.cost.signature import Layout, Signature, describe, layouts, results, signature
from memplan.cost.workspace import BLOCKED_LOSS, EXPERT_PRODUCTS, EXPERT_SUMS, OWN_RULES, masked_positions, unseen
from memplan.devices import profile_for
from memplan.meters import allocation_events
from memplan.torch_compat import clear_blas_workspaces

log = logging.getLogger("memplan")
aten = torch.ops.aten

# Three repetitions tell an outlier from the median; small ops repeat up to 10 ms for a steadier one, large ones twice, and
# what takes over 40 ms once, after the run that is not timed.
_MAX_REPETITIONS, _BUDGET_S = 11, 0.01
# A GPU's op shorter than this is timed in bursts: waiting for the device costs as much as the op.
_SHORT_S = 1e-3
# Elements of the block of random numbers that operands repeat: drawing every element anew costs more than most ops.
_BLOCK = 1 << 16
# What an aten op that dislikes its made-up operands, or finds no memory, raises.
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, MemoryError)
# Two compiles at once would disturb each other's times, and restore each other's generators.
_ALONE = threading.Lock()
_Seen = TypeVar("_Seen")
_UNMEASURABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class MeasuredCost:
    """Measures on the device at hand; asks the analytic model where an op cannot be measured.

    Not measured: ops outside aten and oneDNN (they may have effects), ops whose result depends on data, assertions, ops of another
    device than the profile's, and ops that refuse made-up operands. The debug log names each.
    """

    def __init__(self, fallback: AnalyticCost, cache: Cache | None = None) -> None:
        self.fallback = fallback
        self.profile = fallback.profile
        self.available = is_present(fallback)
        self.cache = cache or Cache(environment(self.profile.kind) if self.available else "none")
        self._seen: dict[Signature, Cost] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="memplan-cost")

    def cost(self, node: fx.Node) -> Cost:
        """Microseconds and bytes of one run; nothing for placeholders, getitems and views."""
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or is_view(target):
            return self.fallback.cost(node)
        described = signature(node)
        found = self._seen.get(described)
        if found is None:
            found = self._seen[described] = self._look_up(described, node)
        return found

    def _look_up(self, described: Signature, node: fx.Node) -> Cost:
        made = results(node)
        if not self._is_measurable(described, made):
            log.debug("cost of %s: estimated, it is not measurable here", node.target)
            return self.fallback.estimate(described, made)
        text = repr(tuple(described))
        known = self.cache.get(text)
        if known is not None:
            return _whole(described, Cost(known[0], int(known[1])), self.profile.granularity)
        try:
            measured = self._worker.submit(measure, described, self.profile.granularity).result()
        except _REFUSALS as error:
            log.debug("cost of %s: estimated, it cannot run on made-up operands: %s", node.target, error)
            return self.fallback.estimate(described, made)
        self.cache.put(text, (measured.time, measured.workspace))
        return _whole(described, measured, self.profile.granularity)

    def observe(self, node: fx.Node, watch: Callable[[Callable[[], Any]], _Seen]) -> _Seen | None:
        """What ``watch`` sees of a call of the node's op on made-up operands, in this model's thread; None for an op that
        is not measured."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return None
        described = signature(node)
        if not self._is_measurable(described, results(node)):
            return None

        def observed() -> _Seen:
            with _on_made_up_operands(described) as (run, *_):
                return watch(run)

        try:
            return self._worker.submit(observed).result()
        except _REFUSALS as error:
            log.debug("allocations of %s: not seen, it cannot run on made-up operands: %s", node.target, error)
            return None

    def _is_measurable(self, described: Signature, made: list[Layout]) -> bool:
        target = described.target
        touched = [*described.operands(), *made]
        return (
            self.available
            and (target.namespace in ("aten", "prims", "mkldnn") or target.name() in OWN_RULES)
            and not _UNMEASURABLE.intersection(target.tags)
            and not masked_positions(described)
            and "_assert" not in target._opname
            and all(layout.device == self.profile.kind or not layout.shape for layout in touched)  # scalars mix
        )


def measure_whole(described: Signature, granularity: int) -> Cost:
    """What ``measure`` finds, and what the kernel is known to take past the allocator."""
    return _whole(described, measure(described, granularity), granularity)


def _whole(described: Signature, measured: Cost, granularity: int) -> Cost:
    beyond = unseen(described, torch.get_num_threads())
    return Cost(measured.time, round_up(measured.workspace + beyond, granularity))


def measure(described: Signature, granularity: int) -> Cost:
    """Run the op on made-up operands: its median time in microseconds and its workspace in bytes.

    Workspace is the peak of the allocator's events over the results, every result rounded up to ``granularity`` as its
    buffer is.
    """
    with _on_made_up_operands(described) as (run, own, on_gpu):
        made, events = allocation_events(run)  # the first run also pays for code generation and page faults
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in _tensors(made))}
        returned = layouts(describe(made))
        del made
        kept = sum(round_up(size, granularity) for pointer, size in storages.items() if pointer not in own)
        held = max(0, max(accumulate(events), default=0) - kept)
        if described.target.name() in (EXPERT_PRODUCTS, EXPERT_SUMS):  # a real step's rows may all have one expert
            held = max(held, OWN_RULES[described.target.name()](described, returned))
        fresh = unavoidable(size for size in events if size > 0)
        return Cost(_median_time(run, on_gpu, fresh), round_up(held, granularity))


@contextmanager
def _on_made_up_operands(described: Signature) -> Iterator[tuple[Callable[[], Any], set[int], bool]]:
    """(the op's call, where its operands lie, whether it runs on a GPU); generators are put back as they were."""
    touched = {layout.device for layout in described.operands()}
    touched |= {value.type for _, value in described.kwargs if isinstance(value, torch.device)}  # factories name theirs
    gpus = [torch.cuda.current_device()] if "cuda" in touched else []
    is_random = torch.Tag.nondeterministic_seeded in described.target.tags
    with _ALONE, torch.no_grad(), torch.random.fork_rng(devices=gpus, enabled=is_random):
        bound = index_bound(described)
        args = _materialize(described.args, bound)
        kwargs = {name: _materialize(value, bound) for name, value in described.kwargs}
        own = {t.untyped_storage().data_ptr() for t in _tensors((args, tuple(kwargs.values())))}

        def run() -> Any:
            return described.target(*args, **kwargs)

        if gpus:
            run()  # cuBLAS takes a workspace for every new thread and keeps it
        yield run, own, bool(gpus)
        if gpus:
            clear_blas_workspaces()


def _median_time(run: Callable[[], Any], on_gpu: bool, fresh: int) -> float:
    """Microseconds of one run, freeing its results included, on memory that was touched before but for ``fresh`` pages."""
    # Alone on its core, an op's processor time is its time, whatever else the machine is doing.
    clock = time.thread_time if not on_gpu and torch.get_num_threads() == 1 else time.perf_counter
    times: list[float] = []
    burst = 1
    while not _is_enough(times):
        if on_gpu:
            burst = 10 if times and times[-1] < _SHORT_S else 1
            torch.cuda.synchronize()
        touched, start = faults(), clock()
        for _ in range(burst):
            run()
        if on_gpu:
            torch.cuda.synchronize()
        spent = (clock() - start) / burst
        by_chance = max(0, faults() - touched - fresh) * (not on_gpu)
        # An op does no less than nothing: what faults cost is a mean, and theirs may have cost less.
        times.append(max(spent - by_chance * seconds_per_fault(), spent / 10))
    return statistics.median(times) * 1e6


def _is_enough(times: list[float]) -> bool:
    spent = sum(times)
    if spent < _BUDGET_S:
        return len(times) >= _MAX_REPETITIONS
    return len(times) >= (1 if spent > 4 * _BUDGET_S else 2 if spent > 2 * _BUDGET_S else 3)


def index_bound(described: Signature) -> int:
    """What every integer operand must stay below: the rows an op may look up, 1 for ops that look nothing up."""
    packet, args = described.target.overloadpacket, described.args
    if packet is aten.embedding:
        return args[0].shape[0]
    if described.target.name() in (BLOCKED_LOSS, EXPERT_PRODUCTS):
        return args[1].shape[0]
    if described.target.name() == EXPERT_SUMS:
        return args[3]
    if packet is aten.embedding_dense_backward:
        return args[2]
    if packet in (aten._embedding_bag_backward, aten._embedding_bag_dense_backward):
        rows = args[6 if packet is aten._embedding_bag_backward else 5]
        return min(rows, args[0].shape[0])  # rows are looked up, and bags
    if packet is aten.nll_loss_forward or packet is aten.nll_loss_backward:
        return args[0 if packet is aten.nll_loss_forward else 1].shape[-1]
    if packet in (aten.index, aten._unsafe_index, aten.index_put, aten._unsafe_index_put):
        indexed = [size for size, index in zip(args[0].shape, args[1], strict=False) if index is not None]
        return min(indexed, default=1)
    if packet in (aten.gather, aten.index_select, aten.scatter, aten.scatter_add, aten.index_add) and args[0].shape:
        return args[0].shape[args[1]]
    return 1


def _materialize(described: Any, bound: int) -> Any:
    """An argument again: a tensor for every Layout, a list for every tuple."""
    if isinstance(described, Layout):
        return synthetic(described, bound)
    if type(described) is tuple:
        return [_materialize(part, bound) for part in described]
    return described


def synthetic(layout: Layout, bound: int = 1) -> torch.Tensor:
    """A tensor of a layout: floats in (0, 1], where every function is defined, integers in [1, bound): a zero may be the
    size of something empty, which needs less. Where none is below ``bound``, zeros."""
    extent = layout.extent
    storage = torch.zeros(extent, dtype=layout.dtype, device=layout.device)
    block = _block(layout, min(extent, _BLOCK), bound)
    if block is not None:
        whole = extent - extent % _BLOCK
        if whole:
            storage[:whole].view(-1, _BLOCK).copy_(block.expand(whole // _BLOCK, -1))
        storage[whole:].copy_(block[: extent - whole])
    return storage.as_strided(layout.shape, layout.stride)


def _block(layout: Layout, size: int, bound: int) -> torch.Tensor | None:
    """Random elements of a dtype, the same each time; None where zeros are all there is to say."""
    generator = torch.Generator(layout.device).manual_seed(0)  # the user's own is left alone
    draw: dict[str, Any] = {"generator": generator, "device": layout.device}
    if layout.dtype.is_floating_point:
        return (1 - torch.rand(size, **draw)).to(layout.dtype)
    if layout.dtype == torch.bool:
        return torch.rand(size, **draw) > 0.5
    if layout.dtype in (torch.int64, torch.int32) and bound > 1:
        return torch.randint(1, bound, (size,), dtype=layout.dtype, **draw)
    return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def is_present(model: AnalyticCost) -> bool:
    """Whether the device of the model's profile is the one at hand."""
    profile = model.profile
    if profile.kind == "cpu":
        return True
    return torch.cuda.is_available() and profile_for("cuda").name == profile.name


def environment(kind: str) -> str:
    """What measured costs depend on besides the op: torch, the device, threads and the switches that choose kernels."""
    if kind == "cuda":
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        device = f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    switches = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
        torch.get_float32_matmul_precision(),
    )
    return f"torch {torch.__version__}; {device}; {switches}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")

"""Everything a user would pick instead of memplan, and memplan, each prepared by one short name.

A name is ``engine[+checkpoint][@budget]``: ``eager``, ``eager+blocks``, ``inductor+sac``, ``aot_eager@0.5``,
``memplan@75%``, ``memplan@120000000``. For PyTorch's engines the budget is ``activation_memory_budget`` (a share of the
bytes saved for backward); for memplan it is ``memory_budget`` (bytes held at any instant, or a share of its unplanned peak).
memplan has three ways to make kernels: ``memplan`` calls PyTorch's own, ``memplan-fused`` its fused regions,
``memplan-inductor`` is ``torch.compile`` under ``memplan.enable_inductor``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from zoo import Workload

import memplan

OURS = ("memplan", "memplan-fused", "memplan-inductor")
ENGINES = ("eager", "inductor", "aot_eager", "aot_eager_decomp_partition", *OURS)
CHECKPOINTS = ("blocks", "pairs", "sac")
STOCK_BUDGETS = ("1", "0.75", "0.5", "0.25", "0.1", "0.05", "0")

_aten = torch.ops.aten
_MATMULS = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
)


@dataclass(frozen=True)
class Contender:
    """One way to run a training step."""

    engine: str
    checkpoint: str = ""
    budget: str = ""

    @staticmethod
    def parse(name: str) -> Contender:
        rest, _, budget = name.partition("@")
        engine, _, kind = rest.partition("+")
        if engine not in ENGINES or (kind and kind not in CHECKPOINTS):
            raise ValueError(
                f"no contender {name!r}; engines: {', '.join(ENGINES)}; checkpoints: {', '.join(CHECKPOINTS)}"
            )
        return Contender(engine, kind, budget)

    def __str__(self) -> str:
        return (
            self.engine
            + (f"+{self.checkpoint}" if self.checkpoint else "")
            + (f"@{self.budget}" if self.budget else "")
        )


def hand_made() -> list[Contender]:
    """Checkpointing by hand, eager and under Inductor, and the two without it."""
    return [Contender(engine, kind) for engine in ("eager", "inductor") for kind in ("", *CHECKPOINTS)]


def stock_budgets(engines: Sequence[str] = ("inductor", "aot_eager", "aot_eager_decomp_partition")) -> list[Contender]:
    """PyTorch's own budget at every value of ``STOCK_BUDGETS`` under every engine."""
    return [Contender(engine, budget=budget) for engine in engines for budget in STOCK_BUDGETS]


def prepare(contender: Contender, workload: Workload, dropout: bool) -> Callable[..., Tensor]:
    """The step of ``workload`` as ``contender`` runs it: call it with the inputs, get the loss. Changes the model's blocks."""
    if contender.checkpoint:
        _checkpoint_chains(workload, contender.checkpoint)
    if contender.engine == "eager":
        return workload.model
    # Inductor's own random numbers differ from eager's; with them no gradient could be compared.
    torch._inductor.config.fallback_random = dropout
    if contender.engine in OURS:
        return _planned(contender, workload.model)
    if contender.budget:
        torch._functorch.config.activation_memory_budget = float(contender.budget)
    return torch.compile(workload.model, backend=contender.engine)


def _planned(contender: Contender, model: nn.Module) -> Callable[..., Tensor]:
    options: dict[str, Any] = {"memory_budget": _memory_budget(contender.budget)} if contender.budget else {}
    if contender.engine == "memplan-inductor":
        memplan.enable_inductor(**options)
        return torch.compile(model)
    if contender.engine == "memplan-fused":
        options["fusion.enabled"] = True
    return torch.compile(model, backend="memplan", options=options or None)


def _memory_budget(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _save_matmuls(context: object, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _MATMULS else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpoint_chains(workload: Workload, kind: str) -> None:
    """Checkpoint every block (``blocks``), every two neighbours as one (``pairs``), or all but matmuls of a block (``sac``)."""
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "sac":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _save_matmuls)
    group = 2 if kind == "pairs" else 1
    for chain in workload.chains:
        for start in range(0, len(chain), group):
            _checkpoint_together(chain[start : start + group], options)


def _checkpoint_together(blocks: Sequence[nn.Module], options: dict[str, Any]) -> None:
    """The first block's forward becomes a checkpoint around all of them; the others hand their input through."""
    forwards = [block.forward for block in blocks]

    def run(*args: Any, **kwargs: Any) -> Any:
        result = forwards[0](*args, **kwargs)
        for forward in forwards[1:]:
            result = forward(result, *args[1:], **kwargs)
        return result

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(run, *args, **options, **kwargs)

    def hand_through(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    for block, forward in zip(blocks, [checkpointed] + [hand_through] * (len(blocks) - 1), strict=True):
        block.forward = forward  # type: ignore[method-assign, assignment]

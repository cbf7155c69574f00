"""Random ops that can run again with the same result: the generator's state is kept, and replayed.

Saving and restoring the state around a second run follows torch.utils.checkpoint's ``preserve_rng_state``; here it is
one small buffer an op, so that each draw is its own decision.
"""

from __future__ import annotations

from typing import Any

import torch

_library = torch.library.Library("memplan", "DEF")
_library.define(
    "dropout_mask(SymInt[] size, SymInt[] stride, float keep, Device device) -> Tensor",
    tags=[torch.Tag.nondeterministic_seeded],
)


@torch.library.impl(_library, "dropout_mask", "CompositeExplicitAutograd")
def _dropout_mask(size: list[int], stride: list[int], keep: float, device: torch.device) -> torch.Tensor:
    """A boolean mask, True with probability ``keep``, drawn as aten's CPU dropout draws it."""
    return torch.empty_strided(size, stride, dtype=torch.bool, device=device).bernoulli_(keep)


dropout_mask = torch.ops.memplan.dropout_mask.default


def rng_state(device: str) -> torch.Tensor:
    """The default generator's state, a uint8 tensor on the CPU (5,056 bytes for the CPU's, 16 for CUDA's)."""
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state(device)


def draw(state: torch.Tensor, device: str, op: Any, /, *args: Any, **kwargs: Any) -> Any:
    """The first run of a random op: advances the generator. ``state`` is what it was just before."""
    return op(*args, **kwargs)


def replay(state: torch.Tensor, device: str, op: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run a random op again from ``state``; the generator is left as it was found."""
    now = rng_state(device)
    try:
        _set_state(state, device)
        return op(*args, **kwargs)
    finally:
        _set_state(now, device)


def _set_state(state: torch.Tensor, device: str) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)

"""What every model of the zoo is turned into: a module whose forward is the scalar loss, and the inputs of one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Size = Literal["small", "bench"]  # small: tests and quick looks; bench: activations are at least 70 % of the peak
Chain = tuple[
    nn.Module, ...
]  # blocks that run one after the other; the first result of one is the first input of the next


@dataclass(frozen=True)
class Workload:
    """One training step: ``model(**inputs)`` is a scalar loss; ``chains`` are the blocks a user would checkpoint."""

    model: nn.Module
    inputs: dict[str, Tensor]
    chains: tuple[Chain, ...] = ()

    def resident_bytes(self) -> int:
        """Bytes of parameters, buffers and inputs: what is held before the step begins; shared storages count once."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.inputs.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
        return sum(storages.values())


@dataclass(frozen=True)
class Entry:
    """A named model: how to build it at a size, with dropout or without, and whether dropout exists in it."""

    make: Callable[[Size, bool], Workload]
    has_dropout: bool = True


class LossOf(nn.Module):
    """A transformers model with labels among its inputs, reduced to the loss it computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).loss


class Autocast(nn.Module):
    """The same step under bf16 autocast; parameters and gradients stay float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(**inputs)


def hugging_face(model: nn.Module, inputs: dict[str, Tensor], *chains: Any) -> Workload:
    """Workload of a transformers model; each chain is an iterable of its blocks in running order."""
    for part in model.modules():
        config: Any = getattr(part, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # an encoder and a decoder have configs of their own
    return Workload(LossOf(model), inputs, tuple(tuple(chain) for chain in chains))

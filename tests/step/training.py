"""A small network, its data, and the loop of torch.optim that a compiled step replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import memplan
from memplan.step import Step

Optimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]
Batch = tuple[Tensor, Tensor]

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True, foreach=False),
    "dampened": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3, maximize=True, foreach=False),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, foreach=False),
}


def network(width: int = 32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(0.3), nn.Linear(width, width), nn.Tanh(),
        nn.Linear(width, 3),
    )  # fmt: skip


def batches(count: int, size: int = 24) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 16, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def eager(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterable[Batch], max_norm: float | None = None
) -> Iterator[Tensor]:
    for x, y in data:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def compiled(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Step:
    return memplan.compile_step(model, nn.functional.cross_entropy, optimizer, **options)

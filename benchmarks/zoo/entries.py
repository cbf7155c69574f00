"""The zoo as entries of ``memplan analyze``: ``zoo.entries:gpt2_bench``, ``zoo.entries:gpt2_small_dropout``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import zoo


def __getattr__(name: str) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    model, _, variant = name.partition("_")
    size, _, dropout = variant.partition("_")
    if model not in zoo.MODELS or size not in ("small", "bench") or dropout not in ("", "dropout"):
        raise AttributeError(f"no entry {name!r}; an entry is MODEL_SIZE or MODEL_SIZE_dropout")

    def entry() -> tuple[nn.Module, dict[str, Any]]:
        workload = zoo.build(model, size, bool(dropout))
        return workload.model, workload.inputs

    return entry

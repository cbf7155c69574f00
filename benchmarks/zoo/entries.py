"""The zoo as entries of ``memplan analyze``: ``zoo.entries:gpt2_bench``, ``zoo.entries:gpt2_small_dropout``, and for the
forward alone ``zoo.entries:gpt2_bench_inference``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import zoo


def __getattr__(name: str) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    model, _, variant = name.partition("_")
    size, _, mode = variant.partition("_")
    if model not in zoo.MODELS or size not in ("small", "bench") or mode not in ("", "dropout", "inference"):
        raise AttributeError(f"no entry {name!r}; an entry is MODEL_SIZE, MODEL_SIZE_dropout or MODEL_SIZE_inference")

    def entry() -> tuple[nn.Module, dict[str, Any]]:
        workload = zoo.build(model, size, mode == "dropout")
        return workload.model.train(mode != "inference"), workload.inputs

    return entry

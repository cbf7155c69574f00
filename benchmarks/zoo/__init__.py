"""Real models for the benchmarks, by name: built from configs, seeded, at two sizes, with dropout or without."""

from __future__ import annotations

import torch

from zoo import own, text, vision
from zoo.workload import Autocast, Entry, Size, Workload

MODELS: dict[str, Entry] = {
    "gpt": Entry(own.gpt),
    "resnet": Entry(own.resnet, has_dropout=False),
    "gpt2": Entry(text.gpt2),
    "bert": Entry(text.bert),
    "llama": Entry(text.llama),
    "t5": Entry(text.t5),
    "vit": Entry(vision.vit),
    "resnet50": Entry(vision.resnet50, has_dropout=False),
    "convnext": Entry(vision.convnext),
    "efficientnet": Entry(vision.efficientnet),
    "unet": Entry(vision.unet),
    "mixtral": Entry(text.mixtral),
    "whisper": Entry(text.whisper),
    "mamba": Entry(text.mamba, has_dropout=False),
    "gnn": Entry(own.gnn),
    "dlrm": Entry(own.dlrm),
}
FIRST = tuple(MODELS)[:11]  # the models that the table of budgets covers; the frontier covers all


def build(name: str, size: Size = "bench", dropout: bool = False, bf16: bool = False, seed: int = 0) -> Workload:
    """The training step of ``name``, in training mode; the same arguments give the same weights and inputs."""
    if name not in MODELS:
        raise KeyError(f"no model {name!r} in the zoo; it has {', '.join(MODELS)}")
    torch.manual_seed(seed)
    workload = MODELS[name].make(size, dropout)
    workload.model.train()
    if bf16:
        return Workload(Autocast(workload.model), workload.inputs, workload.chains)
    return workload


__all__ = ["FIRST", "MODELS", "Entry", "Size", "Workload", "build"]

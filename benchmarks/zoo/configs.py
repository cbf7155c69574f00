"""Published configurations at their real size, as entries of ``memplan analyze``: their tensors have no memory there.

``zoo.configs:llama3_8b`` is one training step, ``zoo.configs:llama3_8b_inference`` one forward of the same batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from zoo.workload import LossOf

Example = tuple[nn.Module, dict[str, Any]]


def _causal(model: nn.Module, vocabulary: int, batch: int, length: int, train: bool) -> Example:
    tokens = torch.randint(vocabulary, (batch, length))
    model.loss_type = "ForCausalLM"  # else transformers warns, which breaks the graph
    return (
        (LossOf(model).train(), {"input_ids": tokens, "labels": tokens})
        if train
        else (model.eval(), {"input_ids": tokens})
    )


def _gpt2(train: bool) -> Example:
    return _causal(hf.GPT2LMHeadModel(hf.GPT2Config(use_cache=False)), 50257, 4, 1024, train)


def _gpt2_short(train: bool) -> Example:
    """Weights, gradients and the optimizer's state are the peak. Without dropout, whose masks eager keeps otherwise."""
    config = hf.GPT2Config(use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return _causal(hf.GPT2LMHeadModel(config), 50257, 1, 512, train)


def _llama3(width: int, inner: int, layers: int, heads: int, train: bool) -> Example:
    config = hf.LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        use_cache=False,
        dtype="bfloat16",
    )
    return _causal(hf.LlamaForCausalLM(config).to(torch.bfloat16), 128256, 1, 4096, train)


def _t5(train: bool) -> Example:
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0, use_cache=False)
    )
    tokens = torch.randint(32128, (8, 512))
    inputs = {"input_ids": tokens, "labels": tokens}
    return (LossOf(model).train(), inputs) if train else (model.eval(), inputs)


def _resnet50(train: bool) -> Example:
    model = hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000))
    pixels, labels = torch.randn(64, 3, 224, 224), torch.randint(1000, (64,))
    if train:
        return LossOf(model).train(), {"pixel_values": pixels, "labels": labels}
    return model.eval(), {"pixel_values": pixels}


CONFIGS: dict[str, Callable[[bool], Example]] = {
    "gpt2": _gpt2,
    "gpt2_short": _gpt2_short,
    "llama3_8b": lambda train: _llama3(4096, 14336, 32, 32, train),
    "llama3_70b": lambda train: _llama3(8192, 28672, 80, 64, train),
    "resnet50": _resnet50,
    "t5_base": _t5,
}


def __getattr__(name: str) -> Callable[[], Example]:
    config = name.removesuffix("_inference")
    if config not in CONFIGS:
        raise AttributeError(f"no configuration {config!r}; there are {', '.join(CONFIGS)}")
    return lambda: CONFIGS[config](config == name)

"""Language and speech models of transformers, built from configs: no download, random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from zoo.workload import Size, Workload, hugging_face

hf: Any = transformers  # its configs take keyword arguments that its annotations do not name
_VOCABULARY = 2048  # small, so that activations and not embedding tables decide the peak


def _tokens(vocabulary: int, batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(4, vocabulary, (2, batch, length))
    return {"input_ids": ids[0].contiguous(), "labels": ids[1].contiguous()}


def gpt2(size: Size, dropout: bool) -> Workload:
    layers, width, batch, length = (12, 256, 8, 256) if size == "bench" else (3, 64, 4, 64)
    p = 0.1 if dropout else 0.0
    config = hf.GPT2Config(
        vocab_size=_VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=p,
    )
    model = hf.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # its default, but unnamed it logs a warning, which breaks the graph in two
    return hugging_face(model, _tokens(_VOCABULARY, batch, length), model.transformer.h)


def bert(size: Size, dropout: bool) -> Workload:
    layers, width, batch, length = (12, 256, 8, 256) if size == "bench" else (3, 64, 4, 64)
    p = 0.1 if dropout else 0.0
    config = hf.BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        max_position_embeddings=length,
    )
    model = hf.BertForMaskedLM(config)
    return hugging_face(model, _tokens(_VOCABULARY, batch, length), model.bert.encoder.layer)


def llama(size: Size, dropout: bool) -> Workload:
    layers, width, batch, length = (8, 256, 8, 256) if size == "bench" else (3, 64, 4, 64)
    config = hf.LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=length,
        attention_dropout=0.1 if dropout else 0.0,
    )
    model = hf.LlamaForCausalLM(config)
    return hugging_face(model, _tokens(_VOCABULARY, batch, length), model.model.layers)


def t5(size: Size, dropout: bool) -> Workload:
    layers, width, batch, length = (4, 256, 8, 192) if size == "bench" else (2, 64, 4, 64)
    config = hf.T5Config(
        vocab_size=_VOCABULARY,
        d_model=width,
        d_kv=32,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=8,
        dropout_rate=0.1 if dropout else 0.0,
        decoder_start_token_id=0,
    )
    model = hf.T5ForConditionalGeneration(config)
    # Each block is a chain of its own: the first computes the position bias of all others, so two cannot be joined.
    chains = [(block,) for stack in (model.encoder, model.decoder) for block in stack.block]
    return hugging_face(model, _tokens(_VOCABULARY, batch, length), *chains)


def mixtral(size: Size, dropout: bool) -> Workload:
    layers, width, batch, length = (4, 128, 2, 128) if size == "bench" else (2, 32, 2, 32)
    config = hf.MixtralConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        num_local_experts=4,
        attention_dropout=0.1 if dropout else 0.0,
        # The default walks the experts that were hit, which depends on the data and breaks the graph.
        experts_implementation="batched_mm",
    )
    model = hf.MixtralForCausalLM(config)
    return hugging_face(model, _tokens(_VOCABULARY, batch, length), model.model.layers)


def whisper(size: Size, dropout: bool) -> Workload:
    layers, width, batch, frames, length = (4, 192, 8, 300, 96) if size == "bench" else (2, 64, 4, 60, 16)
    config = hf.WhisperConfig(
        vocab_size=_VOCABULARY,
        num_mel_bins=80,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        dropout=0.1 if dropout else 0.0,
        max_source_positions=frames,
        max_target_positions=length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = hf.WhisperForConditionalGeneration(config)
    inputs = {
        "input_features": torch.randn(batch, 80, 2 * frames),
        "labels": torch.randint(4, _VOCABULARY, (batch, length)),
    }
    return hugging_face(model, inputs, model.model.encoder.layers, model.model.decoder.layers)


def mamba(size: Size, dropout: bool) -> Workload:
    layers, width, batch, length = (4, 192, 8, 48) if size == "bench" else (2, 32, 2, 8)
    config = hf.MambaConfig(vocab_size=1024, hidden_size=width, num_hidden_layers=layers, use_associative_scan=False)
    model = hf.MambaForCausalLM(config)
    return hugging_face(model, _tokens(1024, batch, length), model.backbone.layers)

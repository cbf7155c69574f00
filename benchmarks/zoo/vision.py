"""Image models of transformers and the diffusion U-Net of diffusers, built from configs: no download, random weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from zoo.workload import Size, Workload, hugging_face

hf: Any = transformers  # its configs take keyword arguments that its annotations do not name


def _images(batch: int, side: int, classes: int = 10) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, side, side), "labels": torch.randint(classes, (batch,))}


def vit(size: Size, dropout: bool) -> Workload:
    layers, width, batch, side = (12, 192, 16, 192) if size == "bench" else (3, 64, 8, 64)
    p = 0.1 if dropout else 0.0
    config = hf.ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=3 if size == "bench" else 2,
        intermediate_size=4 * width,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        image_size=side,
        patch_size=16 if size == "bench" else 8,
        num_labels=10,
        problem_type="single_label_classification",
    )
    model = hf.ViTForImageClassification(config)
    return hugging_face(model, _images(batch, side), model.vit.layers)


def resnet50(size: Size, dropout: bool) -> Workload:
    batch, side, narrow = (24, 128, 1) if size == "bench" else (8, 64, 8)
    config = hf.ResNetConfig(
        embedding_size=64 // narrow,
        hidden_sizes=[256 // narrow, 512 // narrow, 1024 // narrow, 2048 // narrow],
        num_labels=10,
        problem_type="single_label_classification",
    )
    model = hf.ResNetForImageClassification(config)
    blocks = [block for stage in model.resnet.encoder.stages for block in stage.layers]
    return hugging_face(model, _images(batch, side), blocks)


def convnext(size: Size, dropout: bool) -> Workload:
    batch, side, width = (24, 96, 64) if size == "bench" else (2, 64, 16)
    config = hf.ConvNextConfig(
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        depths=[3, 3, 9, 3] if size == "bench" else [1, 1, 2, 1],
        drop_path_rate=0.1 if dropout else 0.0,
        image_size=side,
        num_labels=10,
        problem_type="single_label_classification",
    )
    model = hf.ConvNextForImageClassification(config)
    # A chain ends with its stage: the image is made smaller between stages.
    return hugging_face(model, _images(batch, side), *(stage.layers for stage in model.convnext.encoder.stages))


def efficientnet(size: Size, dropout: bool) -> Workload:
    batch, side = (16, 128) if size == "bench" else (4, 64)
    config = hf.EfficientNetConfig(
        image_size=side,
        width_coefficient=1.0 if size == "bench" else 0.5,
        depth_coefficient=1.0 if size == "bench" else 0.4,
        hidden_dim=1280 if size == "bench" else 640,
        dropout_rate=0.2 if dropout else 0.0,
        drop_connect_rate=0.2 if dropout else 0.0,
        num_labels=10,
        problem_type="single_label_classification",
    )
    model = hf.EfficientNetForImageClassification(config)
    return hugging_face(model, _images(batch, side), model.efficientnet.encoder.blocks)


class Denoiser(nn.Module):
    """The denoising loss of latent diffusion: the U-Net predicts the noise from a noisy latent and a text encoding."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, timestep: Tensor, text: Tensor, noise: Tensor) -> Tensor:
        return F.mse_loss(self.unet(noisy, timestep, encoder_hidden_states=text, return_dict=False)[0], noise)


def unet(size: Size, dropout: bool) -> Workload:
    from diffusers import UNet2DConditionModel

    batch, side, widths = (4, 32, (32, 64, 128)) if size == "bench" else (2, 16, (32, 32))
    attention = len(widths) - 1
    unet_class: Any = UNet2DConditionModel
    model = unet_class(
        sample_size=side,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * attention + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attention,
        layers_per_block=2 if size == "bench" else 1,
        cross_attention_dim=64,
        attention_head_dim=8,
        dropout=0.1 if dropout else 0.0,
    )
    inputs = {
        "noisy": torch.randn(batch, 4, side, side),
        "timestep": torch.randint(1000, (batch,)),
        "text": torch.randn(batch, 16, 64),
        "noise": torch.randn(batch, 4, side, side),
    }
    blocks = [*model.down_blocks, model.mid_block, *model.up_blocks]
    # Each block is a chain of its own: skip connections run between them, so two cannot be joined into one.
    return Workload(Denoiser(model), inputs, tuple((block,) for block in blocks))

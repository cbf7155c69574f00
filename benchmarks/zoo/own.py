"""Two small models in plain PyTorch whose peaks are known to the byte, and two of the kinds that no library here ships."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.workload import Size, Workload


class Attention(nn.Module):
    """Causal attention written out: scores, mask, softmax and dropout are tensors of their own."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5
        visible = torch.tril(torch.ones(length, length, dtype=torch.bool, device=x.device))
        weights = self.dropout(F.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1))
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Decoder-only language model with explicit attention and untied embeddings."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def gpt(size: Size, dropout: bool) -> Workload:
    batch, length, width, layers, vocabulary = (8, 256, 256, 6, 1024) if size == "bench" else (4, 64, 64, 3, 256)
    model = GPT(vocabulary, length, width, 4, layers, 0.1 if dropout else 0.0)
    ids = torch.randint(vocabulary, (2, batch, length))
    return Workload(model, {"ids": ids[0], "labels": ids[1]}, (tuple(model.blocks),))


class Residual(nn.Module):
    """Basic residual block with batch normalization."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Six residual blocks in three widths for small images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        widths = [(32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        self.blocks = nn.Sequential(*(Residual(*w) for w in widths))
        self.head = nn.Linear(128, classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.blocks(self.stem(images))
        return F.cross_entropy(self.head(x.mean((2, 3))), labels)


def resnet(size: Size, dropout: bool) -> Workload:
    batch, side = (32, 64) if size == "bench" else (8, 32)
    model = ResNet()
    inputs = {"images": torch.randn(batch, 3, side, side), "labels": torch.randint(10, (batch,))}
    return Workload(model, inputs, (tuple(model.blocks),))


class MessagePassing(nn.Module):
    """One round on a graph: a message per edge from both ends, their sum at the target, a gated update."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.update = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, nodes: Tensor, source: Tensor, target: Tensor) -> Tensor:
        messages = self.message(torch.cat([nodes[source], nodes[target]], dim=-1))
        gathered = torch.zeros_like(nodes).index_add(0, target, messages)
        return self.norm(nodes + self.dropout(self.update(torch.cat([nodes, gathered], dim=-1))))


class GNN(nn.Module):
    """Node classification by message passing."""

    def __init__(self, features: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.blocks = nn.ModuleList(MessagePassing(width, dropout) for _ in range(layers))
        self.head = nn.Linear(width, 16)

    def forward(self, features: Tensor, source: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        nodes = self.embed(features)
        for block in self.blocks:
            nodes = block(nodes, source, target)
        return F.cross_entropy(self.head(nodes), labels)


def gnn(size: Size, dropout: bool) -> Workload:
    nodes, edges, layers = (4000, 40_000, 6) if size == "bench" else (200, 1_000, 3)
    model = GNN(32, 96, layers, 0.1 if dropout else 0.0)
    ends = torch.randint(nodes, (2, edges))
    inputs = {
        "features": torch.randn(nodes, 32),
        "source": ends[0].contiguous(),
        "target": ends[1].contiguous(),
        "labels": torch.randint(16, (nodes,)),
    }
    return Workload(model, inputs, (tuple(model.blocks),))


class Deep(nn.Module):
    """Residual layer of the top MLP."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class DLRM(nn.Module):
    """Click prediction: dense features through an MLP, embedding tables, all pairwise products, a deep top MLP."""

    def __init__(self, tables: int, rows: int, deep: int, depth: int, dropout: float, width: int = 32) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, width, mode="sum") for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(13, 256), nn.ReLU(), nn.Linear(256, width), nn.ReLU())
        pairs = (tables + 1) * tables // 2
        self.widen = nn.Linear(width + pairs, deep)
        self.blocks = nn.Sequential(*(Deep(deep, dropout) for _ in range(depth)))
        self.head = nn.Linear(deep, 1)

    def forward(self, dense: Tensor, sparse: Tensor, labels: Tensor) -> Tensor:
        first = self.bottom(dense)
        rows = torch.stack([first, *(table(ids) for table, ids in zip(self.tables, sparse, strict=True))], dim=1)
        products = rows @ rows.transpose(1, 2)
        i, j = torch.tril_indices(rows.shape[1], rows.shape[1], -1, device=rows.device)
        x = self.blocks(self.widen(torch.cat([first, products[:, i, j]], dim=1)))
        return F.binary_cross_entropy_with_logits(self.head(x).squeeze(1), labels)


def dlrm(size: Size, dropout: bool) -> Workload:
    batch, tables, rows, width, depth = (4096, 16, 2000, 384, 8) if size == "bench" else (512, 4, 50, 96, 3)
    model = DLRM(tables, rows, width, depth, 0.1 if dropout else 0.0)
    inputs = {
        "dense": torch.randn(batch, 13),
        "sparse": torch.randint(rows, (tables, batch, 4)),
        "labels": torch.randint(2, (batch,)).float(),
    }
    return Workload(model, inputs, (tuple(model.blocks),))

"""Weights that stay in their file: right results, no more than the budget in memory, and clear errors."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memplan
from memplan.backend import recent_plans
from memplan.errors import InputError, TierError
from memplan.runtime import homes
from tests.peak import peak_above

WIDTH, LAYERS = 96, 8
OPTIONS = {"runtime_estimator": "analytic", "solver_work": 0.3}


class Model(nn.Module):
    """A stack of gated blocks; the first layer's table is also the last layer's matrix."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.table = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(WIDTH, 4 * WIDTH), "down": nn.Linear(4 * WIDTH, WIDTH)})
            for _ in range(layers)
        )
        self.head = nn.Linear(WIDTH, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = x + block["down"](nn.functional.silu(block["up"](x)))
        return self.head(x)


def save(model: nn.Module, path: Path, offset: int = 0) -> Path:
    """The model's tensors in the format of safetensors; ``offset``: of the first one, to align it badly."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    values = b"\0" * offset
    for name, tensor in model.state_dict().items():
        if name == "head.weight":
            continue  # tied: stored once
        data = tensor.contiguous().numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(values), len(values) + len(data)],
        }
        values += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)
    return path


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


IDS = torch.arange(32).view(2, 16)


def compiled(model: nn.Module, budget: int) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="memplan", options=OPTIONS | {"memory_budget": budget})


@torch.no_grad()
def test_streams_within_a_quarter_of_the_weights(model: Model, tmp_path: Path) -> None:
    wanted = model(IDS)
    total = sum(p.nbytes for p in model.parameters())
    done = memplan.stream_weights(model, save(model, tmp_path / "model.safetensors", offset=4))
    assert done.bytes == total and done.parameters == 1 + 4 * LAYERS and done.left == ()
    assert model.head.weight is model.table.weight
    assert torch.equal(model(IDS), wanted)  # eager: through the mapping
    run = compiled(model, total // 4)
    assert torch.equal(run(IDS), wanted)
    planned = recent_plans()[-1]
    store = planned.stores["disk"]
    assert planned.timeline.peak <= total // 4
    assert store.traffic.bytes_in >= total and store.traffic.bytes_out == 0
    assert 0 <= store.traffic.hidden <= 1
    measured = peak_above(lambda: run(IDS))
    assert measured <= planned.timeline.peak - planned.problem.resident_bytes
    assert torch.equal(run(IDS), wanted)


@torch.no_grad()
def test_a_model_that_was_never_in_memory(model: Model, tmp_path: Path) -> None:
    wanted = model(IDS)
    file = save(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = Model().eval()
    memplan.stream_weights(empty, file)
    assert torch.equal(empty(IDS), wanted)
    total = sum(p.nbytes for p in empty.parameters())
    assert torch.equal(compiled(empty, total // 2)(IDS), wanted)


@torch.no_grad()
def test_weights_changed_in_memory_are_not_read_from_the_file(model: Model, tmp_path: Path) -> None:
    memplan.stream_weights(model, save(model, tmp_path / "model.safetensors"))
    run = compiled(model, sum(p.nbytes for p in model.parameters()) // 3)
    run(IDS)
    model.blocks[2]["up"].weight.mul_(3)
    assert torch.equal(run(IDS), model(IDS))


def test_gradients_flow_through_streamed_weights(model: Model, tmp_path: Path) -> None:
    """Frozen weights under a trained part, as adapters have them."""
    memplan.stream_weights(model, save(model, tmp_path / "model.safetensors"))
    whole = nn.Sequential(model, nn.Linear(64, 3))
    total = sum(p.nbytes for p in whole.parameters())
    run = torch.compile(whole, backend="memplan", options=OPTIONS | {"memory_budget": total // 2})
    run(IDS).sum().backward()
    found = [p.grad.clone() for p in whole[1].parameters() if p.grad is not None]
    whole.zero_grad(set_to_none=True)
    whole(IDS).sum().backward()
    for grad, p in zip(found, whole[1].parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)


@torch.no_grad()
def test_a_file_truncated_under_us(model: Model, tmp_path: Path) -> None:
    wanted = model(IDS)
    file = save(model, tmp_path / "model.safetensors")
    content = file.read_bytes()
    memplan.stream_weights(model, file)
    run = compiled(model, sum(p.nbytes for p in model.parameters()) // 3)
    run(IDS)
    os.truncate(file, 4096)
    with pytest.raises(TierError, match="truncated"):
        run(IDS)
    with open(file, "r+b") as same:
        same.write(content)
    assert torch.equal(run(IDS), wanted)


@torch.no_grad()
def test_a_file_deleted_under_us(model: Model, tmp_path: Path) -> None:
    wanted = model(IDS)
    file = save(model, tmp_path / "model.safetensors")
    memplan.stream_weights(model, file)
    run = compiled(model, sum(p.nbytes for p in model.parameters()) // 3)
    file.unlink()  # its bytes live on as long as they are mapped
    for _ in range(2):
        assert torch.equal(run(IDS), wanted)


def test_sharded(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(model.state_dict(), "one.safetensors")}))
    assert memplan.stream_weights(model, index).left == ()
    index.write_text("{}")
    with pytest.raises(InputError, match="index"):
        memplan.stream_weights(model, index)


@pytest.mark.parametrize(
    "content",
    [b"", b"short", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"{{{{"],
)
def test_damaged_files(content: bytes, model: Model, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match="not a safetensors file"):
        memplan.stream_weights(model, file)


def test_what_does_not_fit_is_named(model: Model, tmp_path: Path) -> None:
    file = save(model, tmp_path / "model.safetensors")
    assert memplan.stream_weights(Model(LAYERS + 1), file).left == tuple(
        f"blocks.{LAYERS}.{part}.{name}" for part in ("up", "down") for name in ("weight", "bias")
    )
    with torch.device("meta"):
        larger = Model(LAYERS + 1)
    with pytest.raises(InputError, match=f"blocks.{LAYERS}.up.weight"):
        memplan.stream_weights(larger, file)
    other = Model()
    other.blocks[0]["up"] = nn.Linear(WIDTH, 3)
    with pytest.raises(InputError, match="shape"):
        memplan.stream_weights(other, file)


def test_mappings_are_forgotten_with_their_tensors(model: Model, tmp_path: Path) -> None:
    before = len(homes._mappings)
    memplan.stream_weights(model, save(model, tmp_path / "model.safetensors"))
    assert len(homes._mappings) == before + 1
    on_disk = homes.on_disk(torch.arange(5.0), str(tmp_path))
    assert homes.tier_of(on_disk) == "disk" and len(homes._mappings) == before + 2
    on_disk.mul_(2)
    assert torch.equal(on_disk, torch.arange(5.0) * 2) and homes.tier_of(on_disk) == "disk"
    del on_disk
    for p in list(model.parameters()):
        p.data = p.data.clone()
    del p
    assert len(homes._mappings) == before

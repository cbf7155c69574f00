"""Entries: how a model and its inputs are found, built without memory, and refused."""

from __future__ import annotations

import pytest

from memplan.cli.entry import load_entry
from memplan.errors import InputError, OptionError

torch = pytest.importorskip("torch")

CODE = """
import torch
from torch import nn

HUGE = 1 << 20
linear = nn.Linear(4, 8)
pair = linear, (torch.zeros(2, 4),)

def both(): return nn.Linear(4, 8), (torch.zeros(2, 4),)
def single(): return nn.Linear(4, 8), torch.zeros(2, 4)
def keywords(): return nn.Linear(4, 8), {"input": torch.zeros(2, 4)}
def shape(): return nn.Linear(4, 8), (2, 4)
def shapes(): return nn.Bilinear(4, 4, 8), ((2, 4), "2x4:float32")
def typed(): return nn.Embedding(10, 4), (((2, 4), torch.int64),)
def alone(): return nn.Linear(4, 8)
def huge(): return nn.Linear(HUGE, HUGE).to(torch.bfloat16), (torch.zeros(1, HUGE),)
def tied():
    model = nn.Sequential(nn.Embedding(16, 4), nn.Linear(4, 16))
    model[1].weight = model[0].weight
    return model.to(torch.bfloat16), ((3,), )
def moved(): return nn.Linear(4, 8).to("cpu"), torch.zeros(2, 4, device="cpu")
def elsewhere():
    return nn.Linear(4, 8, device="cuda:1").cuda(), torch.zeros(2, 4, device=torch.device("cuda"))
def valued():
    return nn.Dropout(torch.linspace(0, 1, 3)[1].item()), torch.zeros(2, 4)
def wrong(): return 3
def broken(): raise KeyError("weights")
class Space:
    @staticmethod
    def build(): return both()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("entry") / "train.py"
    path.write_text(CODE)
    return str(path)


@pytest.mark.parametrize(
    "name",
    [
        "both",
        "single",
        "keywords",
        "shape",
        "shapes",
        "typed",
        "pair",
        "moved",
        "tied",
        "elsewhere",
        "valued",
        "Space.build",
    ],
)
def test_every_form_gives_a_model_with_inputs(place, name):
    loaded = load_entry(f"{place}:{name}")
    tensors = [*loaded.args, *loaded.kwargs.values()]
    assert isinstance(loaded.model, torch.nn.Module) and tensors
    assert all(isinstance(t, torch.Tensor) for t in tensors)


def test_a_model_larger_than_memory_takes_none(place):
    loaded = load_entry(f"{place}:huge")
    assert sum(p.numel() * p.element_size() for p in loaded.model.parameters()) > 2e12


def test_inputs_as_shapes_on_the_command_line(place):
    loaded = load_entry(f"{place}:alone", ["2x4"])
    assert loaded.args[0].shape == (2, 4)
    assert load_entry(f"{place}:linear", ["input=7x4:float64"]).kwargs["input"].dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "said"),
    [("alone", "without inputs"), ("wrong", "gives int"), ("broken", "KeyError"), ("missing", "has no 'missing'")],
)
def test_what_cannot_be_used_says_why(place, name, said):
    with pytest.raises((InputError, OptionError), match=said):
        load_entry(f"{place}:{name}")


def test_a_module_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "some_module_of_mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    assert load_entry("some_module_of_mine:both").args


@pytest.mark.parametrize("shape", ["(2, -1)", "((2, -1), torch.int64)"])
def test_a_negative_size(tmp_path, shape):
    file = tmp_path / "negative.py"
    file.write_text(f"import torch\ndef build():\n    return torch.nn.Linear(4, 4), ({shape},)\n")
    with pytest.raises(InputError, match="a size is negative"):
        load_entry(f"{file}:build")


def test_an_unknown_dtype(place):
    with pytest.raises(OptionError, match="no dtype 'int5000'"):
        load_entry(f"{place}:alone", ["2x4:int5000"])

"""Generated kernels without a GPU: goldens, what they take on each target, what they move, and what they compute."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from memplan.codegen.region import Region
from memplan.codegen.triton_check import SHARED_LIMIT, compile_for, moved_bytes
from memplan.codegen.triton_kernel import KernelPlan
from memplan.codegen.triton_launch import module_source, tuned
from memplan.codegen.triton_model import H100, choose, occupancy, plans, registers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from regions import LARGE, ZOO, Arg, region_of

GOLDENS = HERE / "goldens"
NAMES = list(ZOO)


@cache
def planned(name: str) -> tuple[Region, KernelPlan]:
    region = region_of(*ZOO[name])
    return region, choose(region)


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str, request: pytest.FixtureRequest) -> None:
    source = module_source(*planned(name))
    path = GOLDENS / f"{name}.py"
    if request.config.getoption("--update-goldens"):
        path.write_text(source)
    ast.parse(source)
    assert path.read_text() == source, f"run pytest {__file__} --update-goldens and read the difference"


def test_no_golden_is_left_over() -> None:
    assert {p.stem for p in GOLDENS.glob("*.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_within_the_limits(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """sm_80, sm_90 and sm_100 in turn over the zoo; every kernel for every one of them with --all-targets."""
    region, plan = planned(name)
    turn = sorted(SHARED_LIMIT)[NAMES.index(name) % 3]
    for capability in SHARED_LIMIT if request.config.getoption("--all-targets") else (turn,):
        for found in compile_for(region, plan, capability, tmp_path):
            if "sin" in region.name:  # their argument reduction keeps a table of 28 bytes in local memory
                found = type(found)(found.kernel, found.registers, found.shared, 0)
            assert found.fits(capability), found
    assert registers(plan) <= 255
    assert 0 < occupancy(plan, H100) <= 1


@pytest.mark.parametrize("name", LARGE)
def test_moves_what_it_must(name: str) -> None:
    region = region_of(ZOO[name][0], LARGE[name])
    assert moved_bytes(region, choose(region)) <= 1.05 * region.compulsory_bytes


def interpret(names: list[str], folder: Path) -> list[dict[str, object]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "interpret.py"), str(folder), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(row: dict[str, object]) -> None:
    """Error against float64 within 1.5 times eager's own, or within four roundings of the outputs' type: on the CPU eager
    adds up in float64 here and there, which no GPU kernel does."""
    rounding = {"torch.float16": 2**-10, "torch.bfloat16": 2**-7, "torch.float64": 2**-50}
    floor = 4 * max(rounding.get(kind, 2**-23) for kind in row["types"])  # type: ignore[attr-defined]
    assert row["error"] <= max(1.5 * row["eager"], floor), row  # type: ignore[operator]
    assert row["strides"] and row["special"], row


def test_computes_what_eager_does(tmp_path: Path) -> None:
    for row in interpret(NAMES, tmp_path):
        check(row)


def test_random_regions_compute_what_eager_does(tmp_path: Path) -> None:
    for row in interpret([f"random:{seed}" for seed in range(28)], tmp_path):
        check(row)


def test_keeps_nan_and_infinities(tmp_path: Path) -> None:
    names = [
        "bias_gelu",
        "clamp",
        "maximum_minimum",
        "relu_residual",
        "softmax",
        "softmax_long",
        "row_max_min",
        "layer_norm",
    ]
    for row in interpret([f"{name}!" for name in names], tmp_path):
        assert row["special"], row


def test_the_fastest_tile_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path))
    region, _ = planned("layer_norm_backward")
    found = plans(region)
    assert len(found) > 1
    last = found[-1].tile
    assert tuned(region, lambda plan: 0.0 if plan.tile == last else 1.0).tile == last
    assert tuned(region, lambda plan: pytest.fail("measured again")).tile == last


def test_offsets_past_32_bits_are_wide_on_both_axes() -> None:
    region = region_of(lambda x: x.t().contiguous(), (Arg((50_000, 60_000)),))
    axes = [line.strip() for line in choose(region).source.splitlines() if line.strip().startswith(("x = ", "r = "))]
    assert {line[0] for line in axes} == {"x", "r"}
    assert all("tl.int64" in line for line in axes)

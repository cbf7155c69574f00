"""Inductor follows memplan's plans: same values, less memory, and the caches never mix plans up."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest
import torch
from torch import nn

import memplan
from memplan.errors import OptionError
from memplan.inductor import Partition
from memplan.options import Options
from memplan.planner import NOTHING, Elsewhere
from tests.peak import peak_above

FAST = {"runtime_estimator": "analytic", "solver_work": 0.05}


class Deep(nn.Module):
    """Layers whose activations are most of the peak, with dropout in each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.dropout(nn.functional.gelu(layer(x)))
        return x.square().mean()


def _steps(model: nn.Module, run, x: torch.Tensor, count: int = 3) -> list[list[torch.Tensor]]:
    seen = []
    for k in range(count):
        torch.manual_seed(k)
        model.zero_grad(set_to_none=True)
        loss = run(x)
        loss.backward()
        seen.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    model.zero_grad(set_to_none=True)
    return seen


@pytest.fixture(scope="module")
def unplanned():
    """A model's steps under Inductor alone, and their peak."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(2048, 32)
    run = torch.compile(model)
    seen = _steps(model, run, x)
    return model, x, seen, peak_above(lambda: _steps(model, run, x, 1))


def test_a_budget_changes_memory_and_nothing_else(unplanned, caplog):
    model, x, want, peak = unplanned
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO, "memplan"), memplan.enable_inductor("65%", **FAST):
        run = torch.compile(model)
        got = _steps(model, run, x)
    for step, (a, b) in enumerate(zip(want, got, strict=True)):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)), f"step {step} differs"
    plan = memplan.recent_plans()[-1].plan
    assert plan.recomputed > 0 and plan.peak <= 0.65 * plan.unplanned_peak
    assert peak_above(lambda: _steps(model, run, x, 1)) < peak
    assert sum("a step holds" in record.message for record in caplog.records) >= 1


def test_what_is_compiled_afterwards_is_inductors_alone():
    compile_alone = torch._TorchCompileInductorWrapper.__call__
    before = len(memplan.recent_plans())
    outer = memplan.enable_inductor("1GiB")
    with memplan.enable_inductor("1GiB"):
        assert torch._TorchCompileInductorWrapper.__call__ is not compile_alone
    assert torch._TorchCompileInductorWrapper.__call__ is not compile_alone
    outer.disable()
    outer.disable()
    assert torch._TorchCompileInductorWrapper.__call__ is compile_alone
    assert len(memplan.recent_plans()) == before


def test_the_uuid_names_all_that_a_plan_depends_on(monkeypatch):
    def uuid(elsewhere: Elsewhere = NOTHING, **options: object) -> str:
        return Partition(Options.resolve(options), [], elsewhere).uuid

    given = [uuid(memory_budget="1GiB"), uuid(memory_budget="2GiB"), uuid(memory_budget="1GiB", solver_seed=1)]
    given.append(uuid(Elsewhere(5), memory_budget="1GiB"))
    monkeypatch.setattr(memplan, "__version__", "0.0.0")
    given.append(uuid(memory_budget="1GiB"))
    assert len(set(given)) == len(given)
    assert uuid(memory_budget="1GiB") == given[-1]


def test_it_wants_a_budget():
    with pytest.raises(OptionError, match="memory_budget"):
        memplan.enable_inductor()
    with pytest.raises(OptionError, match="unknown option"):
        memplan.enable_inductor("1GiB", swop=True)


def test_an_impossible_budget_is_told():
    torch._dynamo.reset()
    model = Deep()
    with (
        memplan.enable_inductor("1KiB", **FAST),
        pytest.raises(memplan.BudgetInfeasibleError, match="smallest feasible"),
    ):
        torch.compile(model)(torch.randn(64, 32))


def test_trainer_with_plain_torch_compile(tmp_path):
    """Dropout included: with ``fallback_random`` Inductor draws as eager does, so the losses are eager's."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def losses(**compiled: bool) -> list[float]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            n_layer=1,
            n_embd=16,
            n_head=1,
            vocab_size=64,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        )
        model = transformers.GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"  # unnamed, it logs a warning, which breaks the graph in two
        tokens = torch.randint(0, 64, (8, 32))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, seed=3, **compiled,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    with torch._inductor.config.patch(fallback_random=True):
        want = losses()
        with memplan.enable_inductor("70%", **FAST):
            got = losses(torch_compile=True)
    assert got == pytest.approx(want, abs=2e-4) and len(want) == 3
    assert all(a != b for a, b in pairwise(want))
    plan = memplan.recent_plans()[-1].plan
    assert plan.recomputed > 0 and plan.peak <= 0.7 * plan.unplanned_peak

"""``memplan demo``: a GPT-2 trained as ever and under a budget, both measured. Needs two minutes and 1 GB."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memplan.cli.common import emit, tell
from memplan.errors import InputError

if TYPE_CHECKING:
    import torch

STEPS = 4
LAYERS, WIDTH, HEADS, VOCABULARY, TOKENS, BATCH = 6, 256, 8, 2048, 256, 8


@dataclass(frozen=True)
class Training:
    """What a few steps of training showed."""

    losses: list[float]
    peak: int  # bytes: parameters, gradients, inputs and everything the allocator handed out in the last step
    seconds: float  # of the fastest step after the first


def demo(
    memory_budget: Annotated[str, typer.Option(help="Bytes, '64MiB', or a share of the unplanned peak.")] = "40%",
) -> int:
    """Train a GPT-2 inside a budget, and without one beside it."""
    import torch

    from memplan.backend import recent_plans
    from memplan.units import format_bytes

    tell(f"memplan: {STEPS} steps of a GPT-2 with {LAYERS} layers, as ever")
    torch.manual_seed(0)
    model = _gpt2()
    tokens = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    plain = _train(copy.deepcopy(model), lambda m: m, tokens)
    tell(f"memplan: planning for {memory_budget} of its peak, then the same steps")
    # The arena outlives a step, and the allocator's events of one step would not show it: off, so that all is counted.
    options: dict[str, Any] = {"memory_budget": memory_budget, "placement.enabled": False}
    planned = _train(model, lambda m: torch.compile(m, backend="memplan", options=options), tokens)
    followed = recent_plans()[-1]
    plan = followed.plan
    emit(f"{'':<10}{'peak':>12}{'step':>11}   loss after each step")
    for name, run in (("eager", plain), ("memplan", planned)):
        losses = "  ".join(f"{loss:.5f}" for loss in run.losses)
        emit(f"{name:<10}{format_bytes(run.peak):>12}{1e3 * run.seconds:>8.0f} ms   {losses}")
    budget = format_bytes(plan.budget if plan.budget is not None else plan.peak)
    emit(
        f"predicted {format_bytes(followed.held):>12} of a budget of {budget}, {plan.recomputed} ops run again, "
        f"{100 * plan.gap:.1f} % from the bound at most"
    )
    return 0


def _gpt2() -> torch.nn.Module:
    import torch

    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise InputError('the demo trains a GPT-2 of transformers; run pip install "memplan[demo]"') from error

    class Loss(torch.nn.Module):
        """The loss inside the compiled region, so that logits need not outlive the forward."""

        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = self.model(input_ids=tokens, labels=tokens).loss
            return loss

    network = GPT2LMHeadModel(
        GPT2Config(
            n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCABULARY, n_positions=TOKENS,
            bos_token_id=0, eos_token_id=0, use_cache=False,
        )
    )  # fmt: skip
    network.loss_type = "ForCausalLM"  # else transformers warns, which breaks the graph
    return Loss(network)


def _train(
    model: torch.nn.Module, compiler: Callable[[torch.nn.Module], Callable[..., torch.Tensor]], tokens: torch.Tensor
) -> Training:
    import torch

    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), tokens))
    run = compiler(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, seconds, peak = [], [], 0

    def step() -> float:
        loss = run(tokens)
        loss.backward()
        return float(loss.detach())

    for k in range(STEPS):
        torch.manual_seed(k)  # the same dropout masks for both
        began = time.perf_counter()
        if k < STEPS - 1:
            losses.append(step())
            seconds.append(time.perf_counter() - began)
        else:
            loss, taken = allocated(step)
            losses.append(loss)
            peak = held + taken
        optimizer.step()
        optimizer.zero_grad()
    return Training(losses, peak, min(seconds[1:]))


def allocated(call: Callable[[], float]) -> tuple[float, int]:
    """(what ``call`` returns, the most bytes it holds of torch's allocator at once), by the allocator's own events."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    live = peak = 0
    results = recorded.profiler.kineto_results if recorded.profiler else None
    events = [e for e in results.events() if e.name() == "[memory]"] if results else []
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return result, peak


def register(app: typer.Typer) -> None:
    app.command()(demo)

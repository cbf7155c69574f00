"""``memplan demo``: one training step, unplanned and under a budget, both measured. Needs a minute and 200 MB."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from memplan.cli.common import emit, tell

if TYPE_CHECKING:
    import torch

_REPEATS = 3
_WIDTH, _LAYERS, _TOKENS, _BATCH = 128, 4, 128, 8


def demo(
    memory_budget: Annotated[str, typer.Option(help="Bytes, '64MiB', or a share of the unplanned peak.")] = "60%",
) -> int:
    """Train a small transformer inside a budget."""
    import torch

    from memplan.backend import recent_plans
    from memplan.units import format_bytes

    torch.manual_seed(0)
    model, batch = _transformer(), torch.randn(_BATCH, _TOKENS, _WIDTH)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), batch))

    def step(run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        loss = run(batch).square().mean()
        loss.backward()
        return loss.detach()

    tell("memplan: an ordinary step")
    plain_loss, plain_peak, plain_time = _measured(model, lambda: step(model), held)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    tell(f"memplan: planning for {memory_budget}, then the same step")
    compiled = torch.compile(model, backend="memplan", options={"memory_budget": memory_budget})
    step(compiled)
    loss, peak, seconds = _measured(model, lambda: step(compiled), held)
    grown = [p.grad for p in model.parameters() if p.grad is not None]
    apart = max(float((g - h).abs().max() / g.abs().max()) for g, h in zip(gradients, grown, strict=True))
    told = "bit-identical" if apart == 0 else f"within {apart:.0e} of their largest element"
    planned = recent_plans()[-1]
    emit(f"{'':<12}{'peak':>12}{'step':>12}")
    emit(f"{'eager':<12}{format_bytes(plain_peak):>12}{1e3 * plain_time:>9.0f} ms   measured")
    emit(f"{'memplan':<12}{format_bytes(peak):>12}{1e3 * seconds:>9.0f} ms   measured")
    emit(f"{'':<12}{format_bytes(planned.plan.peak):>12}{'':>12}   predicted, {planned.plan.recomputed} ops run again")
    emit(f"loss {loss:.6f} (eager {plain_loss:.6f}), gradients {told}")
    return 0


def _transformer() -> torch.nn.Module:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before_attention, self.before_mlp = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
            self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
            self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(self.before_attention(x)).chunk(3, dim=-1)
            weights = torch.softmax(q @ k.transpose(-1, -2) / _WIDTH**0.5, dim=-1)
            x = x + self.out(weights @ v)
            return x + self.down(nn.functional.gelu(self.up(self.before_mlp(x))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(_LAYERS))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    return Net()


def _measured(model: torch.nn.Module, step: Callable[[], torch.Tensor], held: int) -> tuple[float, int, float]:
    """(loss, peak bytes, best seconds) of a step: the allocator's own events, on top of what was ``held`` before it."""
    from torch.profiler import ProfilerActivity, profile

    step()
    times = []
    for _ in range(_REPEATS):
        model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = step()
    live = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return float(loss), held + peak, min(times)


def register(app: typer.Typer) -> None:
    app.command()(demo)

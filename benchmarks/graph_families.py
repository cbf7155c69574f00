"""Families of training graphs of any size, seeded: random layered graphs, transformers and residual networks."""

from __future__ import annotations

import random

from memplan.problem import Buffer, Op, Phase, Problem


class Tape:
    """Records forward ops with what their backward needs, then writes the joint graph as reverse mode would."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.ops: list[Op] = []
        self.steps: list[tuple[str, tuple[int, ...], int, tuple[int, ...], float, int]] = []

    def buffer(self, name: str, size: int) -> int:
        self.buffers.append(Buffer(name, size))
        return len(self.buffers) - 1

    def run(
        self,
        name: str,
        inputs: tuple[int, ...],
        size: int,
        time: float,
        saves: str = "inputs",
        weight: int = 0,
        once: bool = False,
        extra: int = 0,
    ) -> int:
        """A forward op; backward reads its "inputs", its "output" or "nothing". ``extra``: bytes of a second result."""
        out = self.buffer(name, size)
        made = (out, self.buffer(f"{name}.extra", extra)) if extra else (out,)
        self.ops.append(Op(name, reads=inputs, writes=made, time=time, once=once))
        saved = {"inputs": inputs, "output": (out,), "nothing": ()}[saves] + made[1:]
        self.steps.append((name, inputs, out, saved, time, weight))
        return out

    def problem(self, loss: int) -> Problem:
        """The joint graph of one training step; weight gradients are its outputs."""
        gradient = {loss: self.buffer("seed", 4)}
        self.ops.append(Op("seed", reads=(loss,), writes=(gradient[loss],), phase=Phase.BACKWARD))
        outputs = [loss]
        for name, inputs, out, saved, time, weight in reversed(self.steps):
            wanted = tuple(dict.fromkeys(inputs))
            partial = [self.buffer(f"d.{name}", self.buffers[b].size) for b in wanted]
            if weight:
                outputs.append(self.buffer(f"w.{name}", weight))
            made = (*partial, *outputs[-1:]) if weight else tuple(partial)
            if made:
                reads = (gradient[out], *saved)
                self.ops.append(Op(f"{name}.bwd", reads=reads, writes=made, time=2 * time, phase=Phase.BACKWARD))
            for b, g in zip(wanted, partial, strict=True):
                if b in gradient:
                    total = self.buffer(f"sum.{name}", self.buffers[b].size)
                    reads = (gradient[b], g)
                    self.ops.append(Op(f"{name}.add", reads=reads, writes=(total,), time=1.0, phase=Phase.BACKWARD))
                    g = total
                gradient[b] = g
        return Problem(tuple(self.ops), tuple(self.buffers), tuple(outputs), (loss,), note="synthetic")


def transformer(layers: int, width: int = 64, length: int = 128, dropout: bool = False) -> Problem:
    """A decoder of ``layers`` blocks with attention scores kept for backward; 14 or 17 forward ops a block."""
    tape = Tape()
    row = 4 * width * length
    scores = 4 * length * length * max(1, width // 32)
    x = tape.run("embed", (), row, 10.0, "nothing", 4 * width * 256)
    for k in range(layers):
        n = tape.run(f"{k}.norm1", (x,), row, 5.0, extra=8 * length)
        q, key, v = (tape.run(f"{k}.{part}", (n,), row, 40.0, weight=4 * width * width) for part in "qkv")
        s = tape.run(f"{k}.scores", (q, key), scores, 30.0)
        p = tape.run(f"{k}.softmax", (s,), scores, 12.0, "output")
        if dropout:
            p = tape.run(f"{k}.drop", (p,), scores, 8.0, "nothing", once=True, extra=scores // 4)
        a = tape.run(f"{k}.mix", (p, v), row, 30.0)
        o = tape.run(f"{k}.proj", (a,), row, 40.0, weight=4 * width * width)
        x = tape.run(f"{k}.res1", (x, o), row, 3.0, "nothing")
        n = tape.run(f"{k}.norm2", (x,), row, 5.0, extra=8 * length)
        h = tape.run(f"{k}.up", (n,), 4 * row, 150.0, weight=16 * width * width)
        h = tape.run(f"{k}.gelu", (h,), 4 * row, 16.0)
        o = tape.run(f"{k}.down", (h,), row, 150.0, weight=16 * width * width)
        x = tape.run(f"{k}.res2", (x, o), row, 3.0, "nothing")
    logits = tape.run("head", (x,), 4 * row, 200.0, weight=4 * width * 256)
    return tape.problem(tape.run("loss", (logits,), 4, 20.0))


def residual_network(stages: tuple[int, ...] = (3, 4, 6, 3), size: int = 1 << 20) -> Problem:
    """Residual blocks of convolution, norm and relu; the feature maps halve from stage to stage."""
    tape = Tape()
    x = tape.run("stem", (), size, 60.0, "nothing", 4096)
    for stage, blocks in enumerate(stages):
        for k in range(blocks):
            at = f"{stage}.{k}"
            small = size if stage == 0 or k else size // 2
            skip = x
            if stage and not k:
                skip = tape.run(f"{at}.down", (x,), small, 40.0, weight=8192)
            h = x
            for part in (1, 2):
                h = tape.run(f"{at}.conv{part}", (h,), small, 120.0, weight=16384)
                h = tape.run(f"{at}.norm{part}", (h,), small, 30.0, extra=512)
                if part == 1:
                    h = tape.run(f"{at}.relu{part}", (h,), small, 8.0, "output")
            h = tape.run(f"{at}.add", (h, skip), small, 9.0, "nothing")
            x = tape.run(f"{at}.relu", (h,), small, 8.0, "output")
            size = small
    return tape.problem(tape.run("loss", (x,), 4, 20.0))


def random_layered(n: int, seed: int, width: float = 0.3, density: float = 0.2, skip: float = 0.14) -> Problem:
    """Layers of random width; edges to the layer before with ``density``, longer ones with ``skip`` a node."""
    rng = random.Random(seed)
    layers: list[list[int]] = [[0]]
    made = 1
    mean = max(2, int(width * n**0.5 * 2))
    while made < n:
        count = min(n - made, max(1, round(rng.gauss(mean, 0.75 * mean / 2))))
        layers.append(list(range(made, made + count)))
        made += count
    operands: dict[int, set[int]] = {0: set()}
    for at in range(1, len(layers)):
        for v in layers[at]:
            operands[v] = {u for u in layers[at - 1] if rng.random() < density} or {rng.choice(layers[at - 1])}
            if at > 1 and rng.random() < skip * 3:
                operands[v].add(rng.choice(layers[rng.randrange(at - 1)]))
    sizes = [10 * rng.randint(10, 500) for _ in range(n)]
    ops = tuple(
        Op(str(v), reads=tuple(sorted(operands[v])), writes=(v,), time=float(rng.randint(0, 1000))) for v in range(n)
    )
    return Problem(ops, tuple(Buffer(str(v), sizes[v]) for v in range(n)), note=f"random layered, seed {seed}")

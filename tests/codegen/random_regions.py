"""Random graphs of pointwise ops, views and reductions, as a seed's case of the zoo's kind."""

from __future__ import annotations

import random

import torch
from regions import Arg, Case
from torch.nn import functional as F

UNARY = [torch.tanh, torch.sigmoid, torch.relu, torch.abs, torch.neg, F.silu, torch.sin, lambda v: v * 0.5 + 1]
BINARY = [torch.add, torch.mul, torch.sub, torch.maximum, lambda a, b: torch.where(a > b, a, b * 0.5)]
ROW = [
    lambda v: torch.softmax(v, -1), lambda v: v - v.mean(-1, keepdim=True), lambda v: v - v.amax(-1, keepdim=True),
    lambda v: F.layer_norm(v, v.shape[-1:]),
]  # fmt: skip


def random_case(seed: int) -> Case:
    """A graph of 2 to 7 steps over one to three inputs, some broadcast, some strided; one or two outputs."""
    rng = random.Random(seed)
    rows, columns = rng.choice([1, 3, 17, 40, 64]), rng.choice([1, 2, 31, 64, 100, 129])
    dtype = rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    arguments = [Arg((rows, columns), dtype)]
    for _ in range(rng.randint(0, 2)):
        shape = rng.choice([(rows, columns), (columns,), (rows, 1), (1, columns)])
        transposed = len(shape) == 2 and rng.random() < 0.3
        arguments.append(Arg(shape, rng.choice([dtype, torch.float32]), (1, shape[0]) if transposed else None))
    steps = [
        (rng.choice("ubbr"), rng.randrange(100), rng.randrange(100), rng.randrange(100))
        for _ in range(rng.randint(2, 7))
    ]
    ending = rng.choice(["all", "all", "two", "rows", "columns", "both"])

    def function(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = list(inputs)
        whole = values[0]
        for kind, which, first, second in steps:
            a, b = values[first % len(values)], values[second % len(values)]
            if kind == "u":
                made = UNARY[which % len(UNARY)](a)
            elif kind == "b":
                made = BINARY[which % len(BINARY)](a, b)
            else:
                made = ROW[which % len(ROW)](whole)
            values.append(made)
            whole = made if made.shape == whole.shape else whole + made
        if ending == "two":
            return whole * 2, whole + 1
        if ending == "rows":
            return (whole.float().sum(-1),)
        if ending == "columns":
            return (whole.float().sum(0),)
        if ending == "both":
            return whole.exp().reciprocal(), whole.float().sum(0)
        return (whole + values[0],)

    return function, tuple(arguments)

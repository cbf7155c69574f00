"""Small Programs for the tests of analyses and reports; built from Problems, without torch."""

from __future__ import annotations

from memplan.analysis import Analysis, FrontierPoint
from memplan.decisions import decisions_of
from memplan.plans import Plan
from memplan.problem import Buffer, Category, Op, Phase, Problem
from memplan.program import Program, Step, StepKind, Storage
from memplan.validate import check_sequence

KiB = 1024


def mlp_problem(layers: int = 4, width: int = 64 * KiB, source: str = "model.py") -> Problem:
    """A chain of layers, forward and backward: softmax of each layer is large and is saved for its backward."""
    buffers = [Buffer("x", width, Category.INPUT)]
    ops: list[Op] = []
    saved = []
    for k in range(layers):
        module, line = f"layers.{k}", f"{source}:{10 + k}"
        weight = len(buffers)
        buffers.append(Buffer(f"layers.{k}.weight", 4 * width, Category.PARAMETER, module))
        hidden = len(buffers)
        buffers.append(Buffer(f"mm_{k}", width, Category.ACTIVATION, module, line))
        before = 0 if k == 0 else saved[-1][1]
        ops.append(Op(f"mm_{k}", "aten.mm", (before, weight), (hidden,), time=50.0, module=module, source=line))
        soft = len(buffers)
        buffers.append(Buffer(f"softmax_{k}", 8 * width, Category.ACTIVATION, f"{module}.attn", f"{source}:{30 + k}"))
        ops.append(
            Op(
                f"softmax_{k}",
                "aten.softmax",
                (hidden,),
                (soft,),
                time=5.0,
                workspace=KiB,
                module=f"{module}.attn",
                source=f"{source}:{30 + k}",
            )
        )
        saved.append((hidden, soft))
    loss = len(buffers)
    buffers.append(Buffer("loss", 512, Category.OUTPUT, "", f"{source}:50"))
    ops.append(Op("loss", "aten.sum", (saved[-1][1] if saved else 0,), (loss,), time=2.0, source=f"{source}:50"))
    upstream = loss
    for k in reversed(range(layers)):
        grad = len(buffers)
        buffers.append(Buffer(f"grad_{k}", 4 * width, Category.GRADIENT, f"layers.{k}", f"{source}:{10 + k}"))
        buffers.append(Buffer(f"back_{k}", 8 * width, Category.TEMPORARY, f"layers.{k}", f"{source}:{10 + k}"))
        reads = (upstream, *saved[k])
        ops.append(Op(f"mm_backward_{k}", "aten.mm", reads, (grad, grad + 1), time=100.0, phase=Phase.BACKWARD))
        upstream = grad + 1
    outputs = tuple(b for b, buffer in enumerate(buffers) if buffer.category in (Category.OUTPUT, Category.GRADIENT))
    return Problem(tuple(ops), tuple(buffers), outputs, (loss,))


def program_of(problem: Problem, sequence: tuple[int, ...]) -> Program:
    """The Program that a sequence means: a storage a copy, freed after the last run that reads it."""
    storages = [Storage(b.name, b.size, b.category, b.module, b.source) for b in problem.buffers]
    resident = problem.resident
    newest = {b: b for b in resident}
    last: dict[int, int] = {}
    runs: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    for at, i in enumerate(sequence):
        op = problem.ops[i]
        reads = tuple(newest[b] for b in op.reads)
        makes = []
        for b in op.writes:
            fresh = b if b not in newest else len(storages)
            if fresh == len(storages):
                storages.append(storages[b])
            newest[b] = fresh
            makes.append(fresh)
        last |= dict.fromkeys((*reads, *makes), at)
        runs.append((i, reads, tuple(makes)))
    keep = {*resident, *(newest[b] for b in problem.outputs)}
    steps = []
    seen: set[int] = set()
    for at, (i, reads, makes) in enumerate(runs):
        op = problem.ops[i]
        frees = tuple(s for s in dict.fromkeys((*reads, *makes)) if last[s] == at and s not in keep)
        again = i in seen
        kind = StepKind.RUN
        steps.append(Step(kind, op.name, op.phase, reads, makes, workspace=op.workspace, time=op.time, recompute=again))
        if frees:
            steps.append(Step(StepKind.FREE, "free", op.phase, frees=frees))
        seen.add(i)
    return Program(tuple(storages), resident, tuple(steps))


def recomputing_sequence(problem: Problem) -> tuple[int, ...]:
    """Every softmax but the last runs again right before its layer's backward."""
    index = {op.name: i for i, op in enumerate(problem.ops)}
    sequence: list[int] = []
    for i, op in enumerate(problem.ops):
        layer = op.name.removeprefix("mm_backward_")
        if op.phase == Phase.BACKWARD and f"softmax_{int(layer) + 1}" in index:
            sequence.append(index[f"softmax_{layer}"])
        sequence.append(i)
    return tuple(sequence)


def unplanned_analysis(layers: int = 4, width: int = 64 * KiB, name: str = "mlp") -> Analysis:
    problem = mlp_problem(layers, width)
    return Analysis.of(program_of(problem, tuple(range(len(problem.ops)))), name=name, target="cpu")


def planned_analysis(layers: int = 4, width: int = 64 * KiB, name: str = "mlp") -> Analysis:
    """The same step with a plan, and a frontier of three budgets."""
    problem = mlp_problem(layers, width)
    stored, sequence = tuple(range(len(problem.ops))), recomputing_sequence(problem)
    (peak, time), (base, base_time) = check_sequence(problem, sequence), check_sequence(problem, stored)
    plan = Plan(sequence, peak, peak, time, base_time, unplanned_peak=base, unplanned_time=base_time, solver="test")
    points = (
        FrontierPoint(base, base, base_time, base_time, "optimal"),
        FrontierPoint((base + peak) // 2, peak, time, base_time, "feasible", decisions_of(problem, plan)),
        FrontierPoint(peak, peak, time, base_time, "feasible"),
    )
    planned, unplanned = program_of(problem, sequence), program_of(problem, stored)
    decided = decisions_of(problem, plan)
    return Analysis.of(planned, plan, unplanned, name=name, target="cpu", decisions=decided, frontier=points)

"""Lower bounds: on the peak of any plan, and on the time of a plan under a budget."""

from __future__ import annotations

from memplan.problem import Phase, Problem


def peak_bound(problem: Problem) -> int:
    """Bytes that no plan can go below: what one op alone needs beside the resident buffers and the outputs.

    While an op runs its operands, results and workspace are held; while a backward op runs also every forward output;
    at the end all outputs.
    """
    size = [b.size for b in problem.buffers]
    writer = problem.writer
    outputs = {b for b in problem.outputs if writer[b] >= 0}
    held = {b for b in problem.forward_outputs if writer[b] >= 0}
    least = sum(size[b] for b in outputs)
    for i, op in enumerate(problem.ops):
        needed = {*problem.operands[i], *op.writes}
        if op.phase != Phase.FORWARD:
            needed |= held
        least = max(least, sum(size[b] for b in needed) + op.workspace)
    return problem.resident_bytes + least


def recompute_bound(problem: Problem, budget: int) -> float:
    """Time that no plan under ``budget`` bytes with first runs in stored order can go below; inf: there is none.

    The largest fractional covering knapsack over the positions, in milliseconds; ``presence.refine`` bounds far better,
    in seconds. When an op runs for the first time, every buffer made before and read later is held or its writer runs
    again. Bytes over the budget must be absent; each absent buffer costs its writer's time.
    """
    ops, size, writer = problem.ops, [b.size for b in problem.buffers], problem.writer
    end = len(ops)
    last = [max(r, default=-1) for r in problem.readers]
    for b in problem.outputs:
        last[b] = end
    live: set[int] = set()
    most = 0.0
    held = {b for b in problem.forward_outputs if writer[b] >= 0}
    backward = False
    for t, op in enumerate(ops):
        backward = backward or op.phase != Phase.FORWARD
        used = {*problem.operands[t], *op.writes} | (held if backward else set())
        live |= set(op.writes)
        over = sum(size[b] for b in live | used) + op.workspace + problem.resident_bytes - budget
        if over > 0:
            idle: dict[int, int] = {}
            for b in live - used:
                if not ops[writer[b]].once:
                    idle[writer[b]] = idle.get(writer[b], 0) + size[b]
            price = 0.0
            for i, saved in sorted(idle.items(), key=lambda x: ops[x[0]].time / max(1, x[1])):
                share = min(1.0, over / saved) if saved else 0.0
                price += share * ops[i].time
                over -= saved
                if over <= 0:
                    break
            most = max(most, price if over <= 0 else float("inf"))
        live = {b for b in live if last[b] > t}
    return problem.total_time + most

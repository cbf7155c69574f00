"""The cost model against the truth, op by op: workspace against a malloc interposer, the estimate against measurement.

``python benchmarks/op_costs.py`` prints a table and writes ``benchmarks/results/op_costs.json``; ``--quick`` takes half of
the cases, smaller, and writes nothing. It restarts itself under the interposer.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from meter import Meter, interposed_environment

from memplan.cost.analytic import AnalyticCost
from memplan.cost.measured import measure_whole
from memplan.cost.signature import Signature, describe, layouts
from memplan.devices import profile_for

aten = torch.ops.aten
_RESULTS = Path(__file__).parent / "results" / "op_costs.json"


class Case(NamedTuple):
    name: str
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def cases(scale: int, *, half: bool = False) -> Iterator[Case]:
    """Calls of the ops that training runs; ``scale`` multiplies the batch. Half: each memory format with one dtype."""
    last = torch.channels_last
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        for memory_format in (torch.contiguous_format, last):
            if not half or (dtype == torch.bfloat16) == (memory_format is last):
                suffix = f"{label} {'nhwc' if memory_format is last else 'nchw'}"
                yield from _named(suffix, _images(scale, dtype, memory_format))
        yield from _named(label, _products(scale, dtype))
        yield from _named(label, _rows(scale, dtype))


def _named(suffix: str, found: Iterator[Case]) -> Iterator[Case]:
    for case in found:
        yield case._replace(name=f"{case.name} {suffix}")


def _case(name: str, op: Any, *args: Any, **kwargs: Any) -> Case:
    return Case(name, op, args, kwargs)


def _images(scale: int, dtype: torch.dtype, memory_format: torch.memory_format) -> Iterator[Case]:
    def image(*shape: int) -> torch.Tensor:
        return torch.rand(shape).to(dtype).contiguous(memory_format=memory_format)

    for inside, outside, kernel, step, groups in (
        (32, 32, 3, 1, 1),
        (32, 64, 3, 2, 1),
        (64, 128, 1, 1, 1),
        (64, 128, 1, 2, 1),
        (3, 64, 7, 2, 1),
        (3, 96, 4, 4, 1),
        (64, 64, 7, 1, 64),
    ):
        source, weight = image(2 * scale, inside, 56, 56), image(outside, inside // groups, kernel, kernel)
        rest = ([step] * 2, [kernel // 2 if kernel % 2 else 0] * 2, [1, 1], False, [0, 0], groups)
        gradient = torch.ones_like(aten.convolution.default(source, weight, None, *rest))
        name = f"convolution {inside}>{outside} k{kernel} s{step} g{groups}"
        yield _case(name, aten.convolution.default, source, weight, torch.zeros(outside, dtype=dtype), *rest)
        backward = aten.convolution_backward.default
        for asked in ([True, True, True], [False, True, False]):
            wanted = "" if asked[0] else " weight only"
            yield _case(f"{name} backward{wanted}", backward, gradient, source, weight, [outside], *rest, asked)
    x, channel = image(4 * scale, 64, 28, 28), torch.ones(64)
    yield _case("add", aten.add.Tensor, x, x)
    yield _case("relu", aten.relu.default, x)
    norm = (x, channel, channel, channel.clone(), channel.clone(), True, 0.1, 1e-5)
    yield _case("batch_norm", aten._native_batch_norm_legit_functional.default, *norm)
    stats = (channel, channel, channel, channel, channel)
    backward_norm = aten.native_batch_norm_backward.default
    yield _case("batch_norm backward", backward_norm, x, x, *stats, True, 1e-5, [True] * 3)
    window = ([3, 3], [2, 2], [1, 1])
    pooled, indices = aten.max_pool2d_with_indices.default(x, *window)
    yield _case("max_pool", aten.max_pool2d_with_indices.default, x, *window)
    yield _case(
        "max_pool backward",
        aten.max_pool2d_with_indices_backward.default,
        pooled,
        x,
        *window,
        [1, 1],
        False,
        indices,
    )
    yield _case("avg_pool", aten.avg_pool2d.default, x, [2, 2], [2, 2])
    yield _case("mean over pixels", aten.mean.dim, x, [2, 3])
    grown = image(4 * scale, 64, 56, 56)
    sizes = ([56, 56], [4 * scale, 64, 28, 28])
    yield _case("upsample_nearest", aten.upsample_nearest2d.default, x, [56, 56])
    yield _case("upsample_nearest backward", aten.upsample_nearest2d_backward.default, grown, *sizes)
    yield _case("upsample_bilinear", aten.upsample_bilinear2d.default, x, [56, 56], False)
    yield _case("upsample_bilinear backward", aten.upsample_bilinear2d_backward.default, grown, *sizes, False)


def _products(scale: int, dtype: torch.dtype) -> Iterator[Case]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape).to(dtype)

    rows = 256 * scale
    a, b = draw(rows, 256), draw(256, 1024)
    yield _case("mm", aten.mm.default, a, b)
    yield _case("mm transposed right", aten.mm.default, a, draw(1024, 256).t())
    yield _case("mm transposed left", aten.mm.default, draw(256, rows).t(), b)
    yield _case("addmm", aten.addmm.default, draw(1024), a, b)
    left, right = draw(8 * scale, 256, 64), draw(8 * scale, 64, 256)
    yield _case("bmm", aten.bmm.default, left, right)
    yield _case("bmm transposed", aten.bmm.default, left, left.transpose(1, 2))
    yield _case("baddbmm", aten.baddbmm.default, draw(8 * scale, 256, 256), left, right)
    heads = [draw(scale, 8, 256, 64) for _ in range(3)]
    moved = [draw(scale, 256, 8, 64).transpose(1, 2) for _ in range(3)]
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    for name, (q, k, v) in (("attention", heads), ("attention moved heads", moved)):
        out, sums = attention(q, k, v, 0.0, True)
        yield _case(name, attention, q, k, v, 0.0, True)
        yield _case(f"{name} backward", backward, torch.ones_like(out), q, k, v, out, sums, 0.0, True)
    mask = draw(scale, 1, 256, 256)
    yield _case("attention masked", attention, *heads, 0.0, False, attn_mask=mask)


def _rows(scale: int, dtype: torch.dtype) -> Iterator[Case]:
    rows, width, words = 256 * scale, 256, 5000
    x, scale_row = torch.rand(rows, width).to(dtype), torch.ones(width, dtype=dtype)
    normed, mean, rstd = aten.native_layer_norm.default(x, [width], scale_row, scale_row, 1e-5)
    yield _case("layer_norm", aten.native_layer_norm.default, x, [width], scale_row, scale_row, 1e-5)
    layer_norm = aten.native_layer_norm_backward.default
    yield _case("layer_norm backward", layer_norm, normed, x, [width], mean, rstd, scale_row, scale_row, [True] * 3)
    ids, table = torch.randint(words, (scale, 256)), torch.rand(words, width).to(dtype)
    yield _case("embedding", aten.embedding.default, table, ids)
    gradient = torch.rand(scale, 256, width).to(dtype)
    yield _case("embedding backward", aten.embedding_dense_backward.default, gradient, ids, words, -1, False)
    yield _case("embedding backward by count", aten.embedding_dense_backward.default, gradient, ids, words, -1, True)
    logits, target = torch.rand(rows, words).to(dtype), torch.randint(words, (rows,))
    some = torch.randint(rows, (rows // 2,))
    yield _case("log_softmax", aten._log_softmax.default, logits, 1, False)
    yield _case("log_softmax backward", aten._log_softmax_backward_data.default, logits, logits, 1, dtype)
    yield _case("softmax", aten._softmax.default, logits, 1, False)
    yield _case("softmax over rows", aten._softmax.default, logits, 0, False)
    yield _case("softmax over rows backward", aten._softmax_backward_data.default, logits, logits, 0, dtype)
    yield _case("nll_loss", aten.nll_loss_forward.default, logits, target, None, 1, -100)
    one = torch.ones((), dtype=dtype)
    yield _case("nll_loss backward", aten.nll_loss_backward.default, one, logits, target, None, 1, -100, one)
    for name, op in (("exp", aten.exp), ("tanh", aten.tanh), ("gelu", aten.gelu), ("rsqrt", aten.rsqrt)):
        yield _case(name, op.default, logits)
    yield _case("gelu backward", aten.gelu_backward.default, logits, logits)
    yield _case("add", aten.add.Tensor, logits, logits)
    yield _case("add transposed", aten.add.Tensor, logits, torch.rand(words, rows).to(dtype).t())
    yield _case("add float64", aten.add.Tensor, logits, logits.double())
    yield _case("mul scalar", aten.mul.Tensor, logits, 2.0)
    yield _case("where", aten.where.self, logits > 0.5, logits, logits)
    yield _case("clone of a transpose", aten.clone.default, logits.t(), memory_format=torch.contiguous_format)
    yield _case("to float64", aten._to_copy.default, logits, dtype=torch.float64)
    yield _case("cat", aten.cat.default, [logits, logits], 1)
    yield _case("pad", aten.constant_pad_nd.default, logits, [1, 1])
    yield _case("sum", aten.sum.default, logits)
    yield _case("sum over rows", aten.sum.dim_IntList, logits, [0])
    yield _case("logsumexp", aten.logsumexp.default, logits, [1])
    yield _case("var_mean", aten.var_mean.correction, logits, [1], correction=0)
    yield _case("cumsum", aten.cumsum.default, logits, 1)
    yield _case("sort", aten.sort.default, logits, 1)
    yield _case("topk", aten.topk.default, logits, 50)
    yield _case("index", aten.index.Tensor, logits, [some])
    yield _case("index_put", aten.index_put.default, logits, [some], logits[: rows // 2].clone(), True)
    yield _case("index_add", aten.index_add.default, logits, 0, some, logits[: rows // 2].clone())
    yield _case("gather", aten.gather.default, logits, 1, target[:, None])
    yield _case("scatter", aten.scatter.value, logits, 1, target[:, None], 1.0)
    yield _case("dropout", aten.native_dropout.default, logits, 0.5, True)
    yield _case("mse_loss", aten.mse_loss.default, logits, logits)


def true_workspace(case: Case, meter: Meter) -> tuple[int, int]:
    """(bytes the call held from malloc beyond operands and results, its whole peak with operands)."""
    case.op(*case.args, **case.kwargs)  # code generation and library buffers
    kept: list[Any] = []
    peak = meter.measure(lambda: kept.append(case.op(*case.args, **case.kwargs))).above
    operands, made = _storages([case.args, case.kwargs]), _storages(kept)
    results = sum(size for pointer, size in made.items() if pointer not in operands)
    return max(0, peak - results), peak + sum(operands.values())


def _storages(value: Any) -> dict[int, int]:
    tensors = [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
    return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}


def compare(case: Case, meter: Meter, estimate: AnalyticCost) -> dict[str, Any]:
    """One row: true, measured and estimated workspace in bytes; measured and estimated time in microseconds."""
    signature = Signature(case.op, describe(case.args), tuple((k, describe(v)) for k, v in case.kwargs.items()))
    true, peak = true_workspace(case, meter)
    made = layouts(describe(case.op(*case.args, **case.kwargs)))
    measured = measure_whole(signature, estimate.profile.granularity)
    guessed = estimate.estimate(signature, made)
    return {
        "op": case.name,
        "peak": peak,
        "workspace": true,
        "measured_workspace": measured.workspace,
        "estimated_workspace": guessed.workspace,
        "measured_us": round(measured.time, 1),
        "estimated_us": round(guessed.time, 1),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Worst and typical errors over the rows."""

    def quantile(values: list[float], share: float) -> float:
        return sorted(values)[min(len(values) - 1, int(share * len(values)))]

    short = [row["workspace"] - row["measured_workspace"] for row in rows]
    ratio = [abs(math.log(row["estimated_us"] / row["measured_us"])) for row in rows]
    return {
        "ops": len(rows),
        "worst_unmeasured_bytes": max(short),
        "worst_overmeasured_bytes": -min(short),
        "estimated_time_factor_median": round(math.exp(quantile(ratio, 0.5)), 2),
        "estimated_time_factor_p90": round(math.exp(quantile(ratio, 0.9)), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small cases; JSON to standard output, no file")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], interposed_environment())
    torch.set_num_threads(options.threads)
    gc.freeze()  # the meter collects garbage before every call; torch's own objects are none
    meter, estimate = Meter(), AnalyticCost(profile_for("cpu"))
    rows = []
    with torch.no_grad():
        for case in cases(1, half=True) if options.quick else cases(8):
            row = compare(case, meter, estimate)
            rows.append(row)
            if not options.quick:
                held = "  ".join(f"{row[key] / 1e6:9.3f}" for key in row if "workspace" in key)
                took = f"{row['measured_us']:10.0f} {row['estimated_us']:10.0f}"
                print(f"{case.name:<50} MB true/measured/estimated {held}   us {took}", flush=True)
    machine = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    record = {**machine, "threads": options.threads, "summary": summary(rows), "rows": rows}
    if options.quick:
        print(json.dumps(record))
        return
    print(json.dumps(record["summary"], indent=1))
    _RESULTS.parent.mkdir(exist_ok=True)
    _RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

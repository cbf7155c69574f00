"""The largest batch that fits a fixed number of bytes, and the throughput there.

``python benchmarks/batch.py [--models gpt2 llama vit]``. The budget of a model is eager's measured peak at a batch of its
own, a quarter of the zoo's, so that steps of the largest batches take seconds. For every contender the largest batch
whose step holds no more is searched: rivals are run and measured at each batch that is tried, memplan is asked for its
smallest budget, which a refusal names without a run. At the batch found the peak is measured, and steps are timed in
turns with eager's at its own batch, by the processor's time of one thread. Writes ``results/batch.json`` and
``results/batch.md``; a run resumes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import zoo
from environment import environment
from measure import HERE, Bench, Model, Record, Results, measured_apart, time_ratio
from meter import Meter
from rivals import Contender, prepare
from tables import markdown, megabytes
from worker import Step, failure, memory, promise, time_pairs

CONTENDERS = ("eager", "eager+blocks", "eager+sac", "memplan", "inductor", "inductor@0.5", "inductor@0")
SHARE = 4  # the zoo's batch by eager's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt2", "llama", "vit"], metavar="MODEL")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--pairs", type=int, default=3, help="timed repetitions beside eager")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "batch.json")
    parser.add_argument("--force", action="store_true", help="measure again what the file holds already")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the table from the results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measure(given.models[0], given.contenders[0], given.budget, given.pairs)))
        return
    results = Results(given.json, environment())
    if not given.report:
        with Bench(results, given.pairs, threads=1, force=given.force) as bench:
            for name in given.models:
                compare(bench, Model(name), given.contenders)
    text = table(results.data["rows"])
    given.json.with_suffix(".md").write_text(text)
    print(text)


def compare(bench: Bench, model: Model, contenders: list[str]) -> None:
    """Every contender on one model under the budget that eager's step sets."""

    def keep(contender: str, budget: int | None) -> Record:
        asked = ["--models", model.name, "--contenders", contender, "--pairs", str(bench.pairs)]
        if budget is not None:
            asked += ["--budget", str(budget)]
        return bench.keep(model, contender, lambda: measured_apart(__file__, asked), budget)

    budget = keep("eager", None).get("peak")
    for contender in contenders if budget is not None else ():
        if contender != "eager":
            keep(contender, budget)


def measure(name: str, contender: str, budget: int | None, pairs: int) -> Record:
    """One record, in a process that counts its memory; without a budget at eager's own batch."""
    torch.set_num_threads(1)
    meter = Meter()
    whole = zoo.build(name)
    own = len(next(iter(whole.inputs.values()))) // SHARE
    weights = sum(p.nbytes for p in whole.model.parameters())
    tried: dict[int, int] = {}

    def holds(batch: int) -> int:
        if contender == "memplan":
            tried[batch] = smallest(name, batch)
        else:
            tried[batch] = measured(stepped(name, contender, batch), meter)
        return tried[batch]

    batch = own if budget is None else largest(holds, budget, own, 2 * weights)
    record: Record = {"batch": batch, "tried": tried, "eager_batch": own}
    if not batch:
        return record
    step = stepped(name, f"memplan@{budget}" if contender == "memplan" else contender, batch)
    record["peak"] = measured(step, meter)
    record |= promise()
    twin = stepped(name, "eager", own)
    return record | {"pairs": list(time_pairs(twin, step, pairs))}


def stepped(name: str, contender: str, batch: int) -> Step:
    """The training step of a model of the zoo on so many samples; those that the zoo has are repeated."""
    whole = zoo.build(name)
    inputs = {key: value[torch.arange(batch) % len(value)] for key, value in whole.inputs.items()}
    workload = zoo.Workload(whole.model, inputs, whole.chains)
    return Step(prepare(Contender.parse(contender), workload, dropout=False), workload)


def measured(step: Step, meter: Meter) -> int:
    """Bytes that a warm step holds at most, parameters and inputs included."""
    torch._dynamo.reset()  # another batch is another graph, not a dynamic one
    before = meter.tensors()
    step()
    step.clear()
    return memory(step, meter, before)["peak"]


def smallest(name: str, batch: int) -> int:
    """The least budget that memplan can keep at this batch, found without a run: one byte is refused."""
    torch._dynamo.reset()
    try:
        stepped(name, "memplan@1", batch)()
    except Exception as error:  # dynamo wraps the refusal; failure() finds it
        refused = failure(error)
        if "infeasible" not in refused:
            raise
        return refused["infeasible"]["smallest"]
    raise AssertionError("one byte was enough")


def largest(holds: Callable[[int], int], budget: int, first: int, none: int = 0) -> int:
    """Largest batch with ``holds(batch)`` bytes within the budget, 0 where one sample is too much.

    ``holds`` grows with the batch, nearly as a line; ``none`` is about what it is for no sample, weights and gradients.
    Each guess is where the line through the two points nearest to the budget meets it, kept between the largest batch
    that fits and the smallest that does not, until these are neighbours.
    """
    known = {0: none, first: holds(first)}
    while True:
        low = max(batch for batch, held in known.items() if held <= budget or not batch)
        high = min((batch for batch, held in known.items() if held > budget and batch), default=None)
        if high is not None and high - low <= 1:
            return low
        (a, held), (b, other) = sorted(known.items(), key=lambda point: abs(point[1] - budget))[:2]
        meets = a + (budget - held) * (b - a) / (other - held) if (other - held) * (b - a) > 0 else 2 * low
        guess = max(int(meets), low + 1)
        guess = guess if high is None else min(guess, high - 1)
        known[guess] = holds(guess)


def table(rows: Mapping[str, Mapping[str, Record]]) -> str:
    header = (
        "model",
        "contender",
        "largest batch",
        "by eager's",
        "peak MB",
        "of the budget",
        "samples a CPU s",
        "by eager's",
    )
    lines: list[list[str]] = []
    for model, records in rows.items():
        for name, record in records.items():
            lines.append([model, name, *_cells(record, records["eager"]["peak"])])
    return markdown(header, lines) + "\n"


def _cells(record: Mapping[str, Any], budget: int) -> list[str]:
    if "failure" in record:
        return [record["failure"][:60], *[""] * 5]
    if not record["batch"]:
        return ["0", *[""] * 5]
    more = record["batch"] / record["eager_batch"]
    seconds = statistics.median(pair[3] for pair in record["pairs"])
    slower = time_ratio(record, "cpu")
    assert slower is not None
    return [
        str(record["batch"]),
        f"{more:.1f}",
        megabytes(record["peak"]),
        f"{record['peak'] / budget:.1%}",
        f"{record['batch'] / seconds:.2f}",
        f"{more / slower:.2f}",
    ]


if __name__ == "__main__":
    main()

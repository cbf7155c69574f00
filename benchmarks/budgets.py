"""Is the budget kept? Every model at 75, 50, 35 and 25 % of its unplanned peak and at its smallest feasible budget.

``python benchmarks/budgets.py`` measures what ``results/training.json`` does not hold yet and writes the table beside it;
the frontier's records are in the same file, so that no row is measured twice. ``--quick`` takes two small models, memory
and exactness alone, into ``out/``. Each row is a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import zoo
from environment import environment
from measure import HERE, OUT, Bench, Model, Record, Results, error_against, time_ratio
from rich.console import Console
from tables import markdown, megabytes, percent, ratio

SHARES = (75, 50, 35, 25)
ABOVE_MB = {"gpt": (140, 70), "resnet": (170, 125)}  # budgets above parameters and inputs that the two have on top
SMALLEST = "memplan@smallest"
RIVALS = ("eager", "eager+blocks")
STOCK = ("inductor", "inductor@0.75", "inductor@0.5", "inductor@0.25", "inductor@0.1")


def run(bench: Bench, models: Sequence[Model], stock: Sequence[str]) -> None:
    """Measure every row of every model; ``stock`` names the models that PyTorch's own budget is measured on, too."""
    for model in models:
        for rival in RIVALS + (STOCK if model.name in stock else ()):
            bench.record(model, rival)
        unplanned = bench.record(model, "memplan")
        if "peak" not in unplanned:
            continue
        wanted = {f"memplan@{share}%": unplanned["peak"] * share // 100 for share in SHARES}
        if model.size == "bench":
            above = ABOVE_MB.get(model.name, ())
            wanted |= {f"memplan@+{mb}MB": unplanned["resident"] + mb * 10**6 for mb in above}
        refused = [bench.record(model, key, f"memplan@{budget}", budget) for key, budget in wanted.items()]
        smallest = min((r["infeasible"]["smallest"] for r in refused if "infeasible" in r), default=None)
        if smallest is None:  # nothing was refused: ask for the impossible to be told the least
            asked = bench.record(model, "memplan@1", "memplan@1", 1)
            smallest = asked.get("infeasible", {}).get("smallest")
        if smallest is not None:
            bench.record(model, SMALLEST, f"memplan@{smallest}", smallest)


def keeps_bits(contender: str) -> bool:
    """Whether the contender promises the bits of the run without a budget: regions and Inductor's kernels follow the plan."""
    return contender.split("@")[0] == "memplan"


def verdict(record: Record, unplanned: Record | None, confirmed: bool) -> str:
    """Was the promise of this row kept: the measured peak within the budget, and the bits of the run without one."""
    if "infeasible" in record:
        return "refused, smallest confirmed" if confirmed else "refused"
    if "failure" in record:
        return record["failure"]
    broken = []
    if "budget" in record and record["peak"] > record["budget"]:
        broken.append(f"over by {record['peak'] - record['budget']} bytes")
    if unplanned and any(record[kind] != unplanned[kind] for kind in ("loss", "gradients", "buffers")):
        broken.append("other bits")
    return ", ".join(broken) or "kept"


def table(data: Record) -> str:
    """The table in Markdown: one line per model and contender."""
    header = ("model", "run", "budget MB", "measured MB", "predicted", "time / eager", "error / eager's", "promise")
    lines = [line for model, rows in data["rows"].items() for line in _lines(model, rows)]
    return markdown(header, lines) + "\n"


def _lines(model: str, rows: dict[str, Record]) -> Iterator[tuple[str, ...]]:
    unplanned, smallest = rows.get("memplan", {}), rows.get(SMALLEST, {})
    confirmed = "peak" in smallest and smallest["peak"] <= smallest["budget"]
    for key, record in rows.items():
        if key.startswith("memplan") and key.endswith("@1"):  # asked for the impossible, to be told the least
            continue
        ours = key.startswith("memplan") and "peak" in unplanned
        predicted = record["plan"]["peak"] / record["peak"] - 1 if record.get("plan") else None
        yield (
            model,
            key,
            megabytes(record.get("budget")),
            megabytes(record.get("peak")),
            percent(predicted),
            ratio(time_ratio(record)),
            ratio(error_against(record, rows.get("eager"))),
            verdict(record, unplanned if keeps_bits(key) else None, confirmed) if ours else record.get("failure", ""),
        )


def by_model(data: Record) -> str:
    """The same in short: one line a model. Peaks in MB, times relative to eager's; a budget whose time was not measured
    has its verdict instead."""
    header = (
        "model",
        "eager MB",
        "blocks MB",
        "time",
        "memplan MB",
        "time",
        *(f"at {s} %" for s in SHARES),
        "least MB",
    )
    return markdown(header, [_in_short(model, rows) for model, rows in data["rows"].items()]) + "\n"


def _in_short(model: str, rows: dict[str, Record]) -> tuple[str, ...]:
    eager, blocks, ours = (rows.get(key, {}) for key in (*RIVALS, "memplan"))
    at = (rows.get(f"memplan@{share}%", {}) for share in SHARES)
    return (
        model,
        megabytes(eager.get("peak")),
        megabytes(blocks.get("peak")),
        ratio(time_ratio(blocks)),
        megabytes(ours.get("peak")),
        ratio(time_ratio(ours)),
        *(ratio(time_ratio(record)) or verdict(record, ours, False) if record else "" for record in at),
        megabytes(rows.get(SMALLEST, {}).get("peak")),
    )


def gaps(data: Record) -> str:
    """One line a model: what a plan adds to the time of the step and what any plan must add at least, at each budget;
    the least peak found and its bound."""
    header = ("model", *(f"{s} %" for s in SHARES), "least MB", "bound MB")
    return markdown(header, [_gap(model, rows) for model, rows in data["rows"].items()]) + "\n"


def _gap(model: str, rows: dict[str, Record]) -> tuple[str, ...]:
    plans = [rows.get(f"memplan@{share}%", {}).get("plan") for share in SHARES]
    least = rows.get(SMALLEST, {}).get("plan")
    return (
        model,
        *(_added(plan) if plan else "" for plan in plans),
        megabytes(least and least["peak"]),
        megabytes(least and least["peak_bound"]),
    )


def _added(plan: Record) -> str:
    most, least = (100 * (plan[name] / plan["unplanned_time"] - 1) for name in ("time", "bound"))
    return f"{most:.1f} ({least:.1f})"


def summary(data: Record) -> Iterator[str]:
    """Counts over all rows of memplan: promises kept, predictions within 2 %, exactness."""
    rows = [(key, row, g) for g in data["rows"].values() for key, row in g.items() if key.startswith("memplan")]
    ran = [(key, row, g["memplan"]) for key, row, g in rows if "peak" in row and "peak" in g.get("memplan", {})]
    exact = [(row, base) for key, row, base in ran if keeps_bits(key)]
    limited = [row for _, row, _ in ran if "budget" in row]
    within = [row for row in limited if row["peak"] <= row["budget"]]
    close = [row for _, row, _ in ran if abs(row["plan"]["peak"] / row["peak"] - 1) <= 0.02]
    same = [row for row, base in exact if all(row[kind] == base[kind] for kind in ("loss", "gradients", "buffers"))]
    yield f"budget kept: {len(within)} of {len(limited)} rows; refused: {sum('infeasible' in row for _, row, _ in rows)}"
    yield f"predicted peak within 2 %: {len(close)} of {len(ran)} rows"
    yield f"bits of the run without a budget: {len(same)} of {len(exact)} rows"
    yield f"failed: {sum('failure' in row for _, row, _ in rows)} rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(zoo.FIRST), choices=list(zoo.MODELS), metavar="MODEL")
    parser.add_argument("--size", default="bench", choices=["small", "bench"])
    parser.add_argument("--dropout", default="both", choices=["without", "with", "both"])
    parser.add_argument("--stock", nargs="*", default=["gpt", "resnet"], help="models to run PyTorch's own budget on")
    parser.add_argument("--pairs", type=int, default=9, help="timed repetitions beside eager; 0 measures no time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="measure rows again that the results hold already")
    parser.add_argument("--quick", action="store_true", help="two small models, no timing")
    parser.add_argument(
        "--out", type=Path, help="results file; default results/training.json, or out/training.json for --quick"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing; write the table from the results")
    given = parser.parse_args()
    if given.quick:
        given.models, given.size, given.stock, given.pairs = ["gpt", "resnet"], "small", [], 0
    path: Path = given.out or (OUT if given.quick else HERE / "results") / "training.json"
    results = Results(path, environment())
    if not given.report:
        variants = {"without": (False,), "with": (True,), "both": (False, True)}[given.dropout]
        chosen = [(name, dropout) for name in given.models for dropout in variants]
        models = [Model(n, given.size, dropout) for n, dropout in chosen if not dropout or zoo.MODELS[n].has_dropout]
        with Bench(results, given.pairs, given.threads, given.force) as bench:
            run(bench, models, given.stock)
    counts = "\n".join(f"- {line}" for line in summary(results.data)) + "\n"
    written = table(results.data) + "\n" + counts
    path.with_name("budgets.md").write_text(written)
    path.with_name("gaps.md").write_text(gaps(results.data))
    path.with_name("budgets_by_model.md").write_text(by_model(results.data) + "\n" + counts)
    Console(width=200).print(written, markup=False)


if __name__ == "__main__":
    main()

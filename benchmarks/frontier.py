"""The frontier: peak against step time of memplan and of everything a user would pick instead, on every model.

``python benchmarks/frontier.py --models gpt resnet50 --rivals hand stock --budgets 12`` measures what
``results/training.json`` does not hold yet and writes a Markdown report and SVG pictures beside it. Each point is a
process of its own, timed in turns with eager. ``--quick`` takes two small models and few contenders, into ``out/``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plot
import zoo
from dominance import report
from environment import environment
from measure import HERE, OUT, Bench, Model, Results
from rich.console import Console
from rivals import OURS, hand_made, stock_budgets

SHARES = (75, 50, 35, 25)  # percent of the unplanned peak; the typical cost is stated at these
SMALLEST = "smallest"
RIVALS = {
    "hand": tuple(map(str, hand_made())),
    "stock": tuple(map(str, stock_budgets())),
    "quick": ("eager", "eager+blocks", "eager+pairs", "eager+sac", "aot_eager@0.5", "aot_eager@0.1"),
}


@dataclass(frozen=True)
class Plan:
    """What to measure: models, rivals by name, and at how many budgets memplan stands in which of its ways."""

    models: tuple[Model, ...]
    rivals: tuple[str, ...]
    budgets: int
    lowerings: tuple[str, ...]
    match: bool = False  # at every rival's own peak, too


def run(bench: Bench, plan: Plan) -> None:
    for model in plan.models:
        rivals = [bench.record(model, rival) for rival in plan.rivals]
        if not plan.budgets:
            continue
        unplanned = bench.record(model, "memplan")
        for lowering in plan.lowerings if "peak" in unplanned else ():
            if lowering == "memplan-fused":
                bench.record(model, lowering)
            # Nothing fits into one byte: the refusal tells the least that does.
            asked = f"{lowering}@1"
            smallest = bench.record(model, asked, asked, 1).get("infeasible", {}).get("smallest")
            if smallest is None:
                continue
            points = budgets(unplanned["peak"], smallest, plan.budgets)
            if plan.match:
                peaks = [rival["peak"] for rival in rivals if smallest < rival.get("peak", 0) < unplanned["peak"]]
                points = {f"{100 * peak / unplanned['peak']:.1f}%": peak for peak in peaks} | points
            for name, budget in points.items():
                bench.record(model, f"{lowering}@{name}", f"{lowering}@{budget}", budget)


def budgets(unplanned: int, smallest: int, count: int) -> dict[str, int]:
    """At most ``count`` points with the unplanned one, by name: the smallest, the usual shares, and geometric steps between."""
    found = {f"{share}%": unplanned * share // 100 for share in SHARES}
    found = {name: budget for name, budget in found.items() if budget > smallest}
    steps = count - 2 - len(found)
    for k in range(1, steps + 1):
        budget = round(unplanned * (smallest / unplanned) ** (k / (steps + 1)))
        found[f"{100 * budget / unplanned:.1f}%"] = budget
    return found | {SMALLEST: smallest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(zoo.MODELS), choices=list(zoo.MODELS), metavar="MODEL")
    parser.add_argument(
        "--rivals", nargs="*", default=["hand", "stock"], help="hand, stock, quick, or contenders by name"
    )
    parser.add_argument(
        "--budgets",
        type=int,
        default=12,
        help="points of memplan, unplanned and smallest included; 0 measures rivals alone",
    )
    parser.add_argument("--match", action="store_true", help="points of memplan at each rival's peak, too")
    parser.add_argument("--lowerings", nargs="+", default=list(OURS), choices=OURS, help="of memplan's points")
    parser.add_argument("--sizes", nargs="+", default=["bench"], choices=["small", "bench"])
    parser.add_argument("--dropout", action="store_true", help="the variants with dropout as well")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast as well")
    parser.add_argument("--pairs", type=int, default=9, help="timed repetitions beside eager")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="measure points again that the results hold already")
    parser.add_argument("--quick", action="store_true", help="two small models, few contenders, 3 pairs")
    parser.add_argument(
        "--out", type=Path, help="results file; default results/training.json, or out/training.json for --quick"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing; write the report from the results")
    given = parser.parse_args()
    if given.quick:
        given.models, given.sizes, given.rivals, given.budgets, given.pairs = (
            ["gpt", "resnet"],
            ["small"],
            ["quick"],
            5,
            3,
        )
    path: Path = given.out or (OUT if given.quick else HERE / "results") / "training.json"
    results = Results(path, environment())
    if not given.report:
        with Bench(results, given.pairs, given.threads, given.force) as bench:
            run(bench, Plan(selected(given), chosen(given.rivals), given.budgets, tuple(given.lowerings), given.match))
    text = report(results.data)
    of = "" if path.stem == "training" else f"_{path.stem}"  # other sizes and dtypes: reports of their own
    path.with_name(f"frontier{of}.md").write_text(text)
    plot.frontier(results.data, path.with_name(f"frontier{of}.svg"))
    plot.prediction(results.data, path.with_name(f"prediction{of}.svg"))
    Console(width=160).print(text, markup=False)


def selected(given: argparse.Namespace) -> tuple[Model, ...]:
    """Every variant that was asked for and that exists."""
    dropouts = (False, True) if given.dropout else (False,)
    precisions = (False, True) if given.bf16 else (False,)
    return tuple(
        Model(name, size, dropout, bf16)
        for name in given.models
        for size in given.sizes
        for dropout in dropouts
        for bf16 in precisions
        if zoo.MODELS[name].has_dropout or not dropout
    )


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """Groups of rivals spelled out, each contender once; eager first, because every ratio is against it."""
    listed = [contender for name in names for contender in RIVALS.get(name, (name,))]
    return tuple(dict.fromkeys(["eager", *listed]))


if __name__ == "__main__":
    main()

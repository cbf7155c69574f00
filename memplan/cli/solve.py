"""``memplan solve``: the solvers alone, on instance files. Exit 0 a plan, 1 proven infeasible, 2 no answer."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from memplan.cli.common import Force, Output, check_output, emit, tell
from memplan.errors import OptionError
from memplan.report import put

if TYPE_CHECKING:
    from memplan.graph_files import GraphFile
    from memplan.outcome import Limits, Status
    from memplan.plans import Plan
    from memplan.problem import Tier
    from memplan.solvers.placement import Placement, PlacementProblem

NO_LIMIT = 2**62  # bytes: more than any tier has

solve = typer.Typer(help="Run a solver on an instance file.", no_args_is_help=True)

Seconds = Annotated[float | None, typer.Option("--time-limit", min=0.0, help="Stop after this many seconds.")]
Work = Annotated[float, typer.Option(min=0.0, help="Effort, as a multiple of the default; repeatable, unlike seconds.")]
Seed = Annotated[int, typer.Option(help="Seed of the search; equal seeds give equal plans.")]
Tiers = Annotated[
    list[str] | None,
    typer.Option(
        "--tier",
        metavar="NAME:WRITE:READ:LATENCY[:CAPACITY]",
        help="A slower memory that buffers may be sent to, e.g. disk:2GB/s:2GB/s:100us:8GiB, when the graph's times are "
        "microseconds; once a tier. Capacity: no limit where left out.",
    ),
]
Graph = Annotated[Path, typer.Argument(metavar="GRAPH.json", help="Node-link graph, joint graph or memplan problem.")]


@solve.command()
def placement(
    instance: Annotated[Path, typer.Argument(metavar="INSTANCE.csv", help="Columns id,lower,upper,size.")],
    capacity: Annotated[str | None, typer.Option(help="Bytes to fit into; without it the height is minimised.")] = None,
    time_limit: Seconds = None,
    work: Work = 1.0,
    seed: Seed = 0,
    output: Output = None,
    force: Force = False,
) -> int:
    """Offsets for buffers that live over spans: columns id,lower,upper,size,offset."""
    from memplan.outcome import Status
    from memplan.solvers.placement import check_placement, read_csv, solve_placement
    from memplan.units import parse_bytes

    check_output(output, force)
    problem = read_csv(instance)
    wanted = None if capacity is None else parse_bytes(capacity)
    with progress("placement") as say:
        plan = solve_placement(problem, capacity=wanted, limits=_limits(work, time_limit, seed, say))
    tell(f"{plan.status}: height {plan.height}, at least {plan.bound}, gap {100 * plan.gap:.3f} %")
    if plan.status in (Status.OPTIMAL, Status.FEASIBLE):
        check_placement(problem, plan)
        _write(output, placement_csv(problem, plan))
    return status_code(plan.status)


@solve.command()
def recompute(
    graph: Graph,
    budget: Annotated[str, typer.Option(help="Bytes, '24GiB', or '80%' of the stored order's peak.")],
    tier: Tiers = None,
    time_limit: Seconds = None,
    work: Work = 1.0,
    seed: Seed = 0,
    output: Output = None,
    force: Force = False,
) -> int:
    """The cheapest sequence within a budget; ops that stand in it twice are recomputed. With tiers, also offloads."""
    from memplan.graph_files import load_graph
    from memplan.solvers.offload import solve_offload
    from memplan.solvers.recompute import solve_recompute
    from memplan.units import parse_budget
    from memplan.validate import check_sequence

    check_output(output, force)
    tiers = tuple(parse_tier(text) for text in tier or ())
    file = load_graph(graph)
    if tiers:
        file = replace(file, problem=replace(file.problem, tiers=tiers))
        file.problem.check()
    stored_peak, _ = check_sequence(file.problem, tuple(range(len(file.problem.ops))))
    limit = parse_budget(budget, stored_peak)
    with progress("recompute") as say:
        solver = solve_offload if file.problem.tiers else solve_recompute
        plan = solver(file.problem, limit, limits=_limits(work, time_limit, seed, say))
    return _sequence_answer(file, plan, output, "time")


@solve.command()
def order(
    graph: Graph,
    time_limit: Seconds = None,
    work: Work = 1.0,
    seed: Seed = 0,
    output: Output = None,
    force: Force = False,
) -> int:
    """The order with the smallest peak; every op runs once."""
    from memplan.graph_files import load_graph
    from memplan.solvers.order import solve_order

    check_output(output, force)
    file = load_graph(graph)
    with progress("order") as say:
        plan = solve_order(file.problem, limits=_limits(work, time_limit, seed, say))
    return _sequence_answer(file, plan, output, "peak")


def parse_tier(text: str) -> Tier:
    """``NAME:WRITE:READ:LATENCY[:CAPACITY]`` with rates a second and a latency in microseconds; OptionError otherwise."""
    from memplan.problem import Tier
    from memplan.units import parse_bytes, parse_rate

    name, *values = text.split(":")
    if not name or len(values) not in (3, 4):
        raise OptionError(f"cannot read {text!r} as a tier; write for example 'disk:2GB/s:2GB/s:100us:8GiB'")
    latency = re.fullmatch(r"(\d+(?:\.\d+)?)(?:us)?", values[2])
    if latency is None:
        raise OptionError(f"cannot read {values[2]!r} as a latency in microseconds; write for example '100us'")
    capacity = parse_bytes(values[3]) if len(values) == 4 else NO_LIMIT
    return Tier(name, capacity, parse_rate(values[0]) / 1e6, parse_rate(values[1]) / 1e6, float(latency[1]))


def placement_csv(problem: PlacementProblem, plan: Placement) -> str:
    """The plan as the solver writes it to a file."""
    from memplan.solvers.placement import write_csv

    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.csv"
        write_csv(path, problem, plan)
        return path.read_text(encoding="utf-8")


def status_code(status: Status) -> int:
    """0 for a plan, 1 for a proof that there is none, 2 otherwise."""
    from memplan.outcome import Status

    return {Status.OPTIMAL: 0, Status.FEASIBLE: 0, Status.INFEASIBLE: 1}.get(status, 2)


class progress:
    """A spinner with the solver's last line, on stderr; silent when stderr is no terminal."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __enter__(self) -> Callable[[str], None] | None:
        if not sys.stderr.isatty():
            self.status = None
            return None
        from rich.console import Console

        self.status = Console(stderr=True).status(f"{self.title} …")
        self.status.start()
        return lambda line: self.status.update(f"{self.title}: {line}") if self.status else None

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()


def _limits(work: float, seconds: float | None, seed: int, say: Callable[[str], None] | None) -> Limits:
    from memplan.outcome import Limits

    return Limits(work=work, seconds=seconds, seed=seed, progress=say)


def _sequence_answer(file: GraphFile, plan: Plan, output: Path | None, minimised: str) -> int:
    """Print or write the plan in the file's own node ids; it is checked before it leaves. ``minimised``: what ``bound``
    and ``gap`` are about, "time" or "peak"."""
    from memplan.outcome import Status, relative_gap
    from memplan.validate import validate

    if plan.status == Status.INFEASIBLE:
        tell(f"infeasible: no sequence of this graph has a peak below {plan.peak_bound} bytes")
    elif plan.status not in (Status.OPTIMAL, Status.FEASIBLE):
        tell(f"{plan.status}: no sequence within the budget was found; the lowest peak found is {plan.peak} bytes")
    else:
        validate(file.problem, plan)
        bound, gap = plan.bound, plan.gap
        if minimised == "peak":
            bound, gap = plan.peak_bound, relative_gap(plan.peak, plan.peak_bound)
        tell(
            f"{plan.status}: peak {plan.peak} ({100 * plan.peak / (plan.unplanned_peak or 1):.2f} % of the stored "
            f"order's), time {plan.time:g} (+{100 * (plan.time / (plan.unplanned_time or 1) - 1):.3f} %), "
            f"{minimised} at least {bound:g} ({plan.bound_scope}), gap {100 * gap:.3f} %, "
            f"{plan.recomputed} recomputations" + (f", {len(plan.offloads)} offloads" if plan.offloads else "")
        )
        answer = {
            "sequence": file.sequence_ids(plan.sequence),
            "status": plan.status,
            "minimised": minimised,
            "bound": bound,
            "bound_scope": plan.bound_scope,
            "gap": gap,
            "peak": plan.peak,
            "peak_bound": plan.peak_bound,
            "time": plan.time,
            "budget": plan.budget,
            "stored_peak": plan.unplanned_peak,
            "stored_time": plan.unplanned_time,
            "solver": plan.solver,
            "offloads": [asdict(stay) | {"name": file.problem.buffers[stay.buffer].name} for stay in plan.offloads],
        }
        _write(output, json.dumps(answer) + "\n")
    return status_code(plan.status)


def _write(output: Path | None, text: str) -> None:
    if output is None:
        emit(text)
    else:
        put(output, text)


def register(app: typer.Typer) -> None:
    app.add_typer(solve, name="solve")

"""``memplan solve``: the solvers alone, on instance files. Exit 0 a plan, 1 proven infeasible, 2 no answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memplan.cli.common import Force, Output, check_output, emit, tell

if TYPE_CHECKING:
    from memplan.graph_files import GraphFile
    from memplan.outcome import Limits, Status
    from memplan.plan import Plan

solve = typer.Typer(help="Run a solver on an instance file.", no_args_is_help=True)

Seconds = Annotated[float | None, typer.Option("--time-limit", min=0.0, help="Stop after this many seconds.")]
Work = Annotated[float, typer.Option(min=0.0, help="Effort, as a multiple of the default; repeatable, unlike seconds.")]
Seed = Annotated[int, typer.Option(help="Seed of the search; equal seeds give equal plans.")]
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
    from memplan.solvers.placement import read_csv, solve_placement, write_csv
    from memplan.units import parse_bytes

    check_output(output, force)
    problem = read_csv(instance)
    wanted = None if capacity is None else parse_bytes(capacity)
    with progress("placement") as say:
        plan = solve_placement(problem, wanted, limits=_limits(work, time_limit, seed, say))
    tell(f"{plan.status}: height {plan.height}, bound {plan.bound}, gap {100 * plan.gap:.3f} %")
    if plan.status in (Status.OPTIMAL, Status.FEASIBLE):
        _write(output, write_csv(problem, plan))
    return status_code(plan.status)


@solve.command()
def recompute(
    graph: Graph,
    budget: Annotated[str, typer.Option(help="Bytes, '24GiB', or '80%' of the stored order's peak.")],
    time_limit: Seconds = None,
    work: Work = 1.0,
    seed: Seed = 0,
    output: Output = None,
    force: Force = False,
) -> int:
    """The cheapest sequence within a budget; ops that stand in it twice are recomputed."""
    from memplan.graph_files import load_graph
    from memplan.solvers.recompute import solve_recompute
    from memplan.units import parse_budget
    from memplan.validate import check_sequence

    check_output(output, force)
    file = load_graph(graph)
    stored_peak, _ = check_sequence(file.problem, tuple(range(len(file.problem.ops))))
    limit = parse_budget(budget, stored_peak)
    with progress("recompute") as say:
        plan = solve_recompute(file.problem, limit, limits=_limits(work, time_limit, seed, say))
    return _sequence_answer(file, plan, stored_peak, output)


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
    from memplan.validate import check_sequence

    check_output(output, force)
    file = load_graph(graph)
    stored_peak, _ = check_sequence(file.problem, tuple(range(len(file.problem.ops))))
    with progress("order") as say:
        plan = solve_order(file.problem, limits=_limits(work, time_limit, seed, say))
    return _sequence_answer(file, plan, stored_peak, output)


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


def _sequence_answer(file: GraphFile, plan: Plan, stored_peak: int, output: Path | None) -> int:
    """Print or write the plan in the file's own node ids; the plan is checked before it leaves."""
    from memplan.outcome import Status
    from memplan.validate import validate

    fits = plan.status in (Status.OPTIMAL, Status.FEASIBLE)
    base_time = file.problem.total_time
    tell(
        f"{plan.status}: peak {plan.peak} ({100 * plan.peak / stored_peak:.2f} % of the stored order's), time "
        f"{plan.time:g} (+{100 * (plan.time / base_time - 1) if base_time else 0:.3f} %), bound {plan.bound:g}, "
        f"gap {100 * plan.gap:.3f} %, {plan.recomputed} recomputations"
    )
    if fits:
        validate(file.problem, plan)
        answer = {
            "sequence": file.sequence_ids(plan.sequence),
            "status": plan.status,
            "bound": plan.bound,
            "bound_scope": plan.bound_scope,
            "gap": plan.gap,
            "peak": plan.peak,
            "peak_bound": plan.peak_bound,
            "time": plan.time,
            "budget": plan.budget,
            "base_peak": stored_peak,
            "base_time": base_time,
            "solver": plan.solver,
        }
        _write(output, json.dumps(answer) + "\n")
    return status_code(plan.status)


def _write(output: Path | None, text: str) -> None:
    if output is None:
        emit(text)
    else:
        output.write_text(text, encoding="utf-8")


def register(app: typer.Typer) -> None:
    app.add_typer(solve, name="solve")

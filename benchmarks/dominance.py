"""What the measured frontier says: who is ahead where, what a budget costs, and how good the predictions were."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from measure import Record, error_against, ratio_spread, time_ratio
from tables import markdown, megabytes, percent, ratio

TIME_TOLERANCE = 1.02  # a memplan point this much slower still counts as level: medians of pairs differ by as much
WRONG = 10.0  # gradients this many times further from float64 than eager's are wrong, not rounded otherwise
SHARES = (75, 50, 35, 25)


@dataclass(frozen=True)
class Point:
    """A measured contender: its name, peak bytes, time by eager's, and gradient error by eager's."""

    name: str
    peak: int
    time: float
    error: float

    @property
    def ours(self) -> bool:
        return self.name.startswith("memplan")

    @property
    def family(self) -> str:
        """The name without its budget: the points of one line in the picture."""
        return self.name.partition("@")[0]


@dataclass(frozen=True)
class Verdict:
    """A rival's point and the memplan point that is at least as small and about as fast; None where there is none."""

    model: str
    rival: Point
    answer: Point | None
    cause: str = ""


def points(rows: dict[str, Record]) -> list[Point]:
    """Every row that ran and was timed."""
    found = []
    for name, record in rows.items():
        time = time_ratio(record)
        if "peak" in record and time is not None:
            found.append(Point(name, record["peak"], time, error_against(record, rows.get("eager")) or 1.0))
    return found


def verdicts(model: str, rows: dict[str, Record]) -> Iterator[Verdict]:
    """For each rival's point: the fastest memplan point with no larger peak, if its time is within the tolerance."""
    measured = points(rows)
    ours = [point for point in measured if point.ours]
    for rival in (point for point in measured if not point.ours):
        fitting = [point for point in ours if point.peak <= rival.peak]
        best = min(fitting, key=lambda point: point.time, default=None)
        if best is None:
            least = min((point.peak for point in ours), default=None)
            yield Verdict(model, rival, None, f"memplan's lowest peak is {megabytes(least)} MB")
        elif best.time > TIME_TOLERANCE * rival.time:
            yield Verdict(model, rival, None, f"{best.name} needs {best.time / rival.time:.3f} of its time")
        else:
            yield Verdict(model, rival, best)


def report(data: dict[str, Any]) -> str:
    """The whole report in Markdown."""
    parts = ["# Memory against time", _machine(data), *_findings(data["rows"])]
    for model, rows in data["rows"].items():
        parts += [f"## {model}", _points_table(rows)]
    return "\n\n".join(parts) + "\n"


def _machine(data: dict[str, Any]) -> str:
    environment = data["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    revisions = {record["revision"] for rows in data["rows"].values() for record in rows.values()}
    where = f"{environment['processor']}, {environment['cores']} cores"
    measured = (
        f"revision {revisions.pop()}" if len(revisions) == 1 else f"{len(revisions)} revisions, which the JSON names"
    )
    return f"{where}; {packages}; rows measured at {measured}."


def _findings(models: dict[str, dict[str, Record]]) -> Iterator[str]:
    judged = [verdict for model, rows in models.items() for verdict in verdicts(model, rows)]
    yield "## Dominance"
    yield _dominance(judged, models)
    open_ones = [v for v in judged if v.answer is None]
    if open_ones:
        header = ("model", "rival", "MB", "time / eager", "why not")
        lines = [(v.model, v.rival.name, megabytes(v.rival.peak), ratio(v.rival.time), v.cause) for v in open_ones]
        yield markdown(header, lines)
    yield "## What a budget costs"
    yield markdown(("share of the peak", "models", "time / unplanned"), list(_costs(models)))
    yield "## Prediction"
    yield "\n".join(f"- {line}" for line in _predictions(models))


def _dominance(judged: list[Verdict], models: dict[str, dict[str, Record]]) -> str:
    honest = [v for v in judged if v.rival.error <= WRONG]
    lines = []
    for label, group in (("all rival points", judged), ("rival points with right gradients", honest)):
        done = sum(v.answer is not None for v in group)
        share = f" ({done / len(group):.0%})" if group else ""
        lines.append(f"- {label}: {done} of {len(group)} dominated{share}")
    lowest = [_lowest_is_ours(measured) for measured in map(points, models.values()) if measured]
    lines.append(f"- lowest peak of all contenders is memplan's: {sum(lowest)} of {len(lowest)} models that were timed")
    return "\n".join(lines)


def _lowest_is_ours(measured: list[Point]) -> bool:
    return min(measured, key=lambda point: (point.peak, not point.ours)).ours


def _costs(models: dict[str, dict[str, Record]]) -> Iterator[tuple[str, str, str]]:
    """Geometric mean over models of memplan's time under a share of the peak by its own time without a budget."""
    for share in SHARES:
        factors = []
        for rows in models.values():
            own, limited = time_ratio(rows.get("memplan", {})), time_ratio(rows.get(f"memplan@{share}%", {}))
            if own and limited:
                factors.append(limited / own)
        yield f"{share} %", str(len(factors)), ratio(statistics.geometric_mean(factors) if factors else None)


def predictions(models: dict[str, dict[str, Record]]) -> Iterator[tuple[str, str, float, float, float | None]]:
    """Model, row, predicted by measured peak, predicted time by the unplanned plan's, the same measured."""
    for model, rows in models.items():
        for name, record in rows.items():
            if "plan" in record and "peak" in record:
                own = time_ratio(rows.get(name.partition("@")[0], {}))
                plan, measured = record["plan"], time_ratio(record)
                told = plan["time"] / plan["unplanned_time"] if plan["unplanned_time"] else 1.0
                yield model, name, plan["peak"] / record["peak"], told, measured / own if measured and own else None


def _predictions(models: dict[str, dict[str, Record]]) -> Iterator[str]:
    rows = list(predictions(models))
    close = sum(abs(peak - 1) <= 0.02 for _, _, peak, _, _ in rows)
    yield f"predicted peak within 2 % of the measured one: {close} of {len(rows)} rows"
    timed = [(told, measured) for *_, told, measured in rows if measured is not None]
    near = sum(abs(told - measured) <= 0.05 for told, measured in timed)
    yield (
        f"predicted time ratio within 5 points of the measured one: {near} of {len(timed)} rows, every row a process of "
        "its own under glibc's defaults; on memory kept between steps: [predicted_time.md](predicted_time.md)"
    )


def _points_table(rows: dict[str, Record]) -> str:
    header = (
        "contender",
        "peak MB",
        "of eager",
        "time / eager",
        "quartiles",
        "error / eager's",
        "first step s",
        "predicted peak",
    )
    eager = rows.get("eager", {}).get("peak")
    lines = []
    for name, record in rows.items():
        if "peak" not in record:
            if "failure" in record:
                lines.append((name, "", "", "", "", "", "", record["failure"]))
            continue
        spread = ratio_spread(record)
        predicted = record["plan"]["peak"] / record["peak"] - 1 if "plan" in record else None
        lines.append(
            (
                name,
                megabytes(record["peak"]),
                ratio(record["peak"] / eager if eager else None),
                ratio(time_ratio(record)),
                f"{spread[0]:.3f}-{spread[1]:.3f}" if spread else "",
                ratio(error_against(record, rows.get("eager"))),
                f"{record['first_step_s']:.1f}",
                percent(predicted),
            )
        )
    return markdown(header, lines)

"""An Analysis in words: the sentences that every report shares."""

from __future__ import annotations

from memplan.analysis import Analysis
from memplan.decisions import Decision
from memplan.problem import Phase
from memplan.units import format_bytes

_VERB = {"recompute": "recomputing", "offload": "moving away"}
_PROPOSED = 3  # plans proposed in words
_NAMED = 3  # decisions named of a plan that is only proposed
_SHOWN = 6  # sentences of advice; the full list is in the JSON


def format_time(microseconds: float) -> str:
    """1500 → '1.5 ms'; for people only."""
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.2f} s"
    return f"{microseconds / 1e3:.2f} ms" if microseconds >= 1e3 else f"{microseconds:.0f} µs"


def share(part: float, whole: float) -> str:
    """'12.5 %'; '0 %' of nothing, never '-0.0 %'."""
    return f"{100 * part / whole:z.1f} %" if whole else "0 %"


def headline(analysis: Analysis) -> str:
    """One sentence: the peak, where it is reached, and what the plan made of it."""
    at = ""
    if analysis.program.steps:
        step = analysis.program.steps[analysis.peak_step]
        at = f", reached in the {step.phase} at {step.name}"
    text = f"Peak {format_bytes(analysis.peak_bytes)} ({analysis.peak_bytes} bytes){at}."
    if analysis.unplanned:
        text += (
            f" Without a plan: {format_bytes(analysis.unplanned_peak_bytes)}; "
            f"the plan adds {share(analysis.time - analysis.unplanned_time, analysis.unplanned_time)} time."
        )
    if analysis.measured_peak_bytes is not None:
        text += f" Measured: {format_bytes(analysis.measured_peak_bytes)}."
    return text


def decision_sentence(decision: Decision, whole_time: float) -> str:
    """'recomputing the 12 softmax of h.*.attn frees 1.9 GiB for 1.3 % time'."""
    what = _doing(decision)
    cost = f"{share(decision.time, whole_time)} time"
    return f"{what} frees {format_bytes(decision.freed)} for {cost}" if decision.freed else f"{what} costs {cost}"


def _summary(decided: tuple[Decision, ...]) -> str:
    rest = len(decided) - _NAMED
    more = f" and {rest} more kind{'s' if rest > 1 else ''} of op" if rest > 0 else ""
    return ", ".join(_doing(d) for d in decided[:_NAMED]) + more


def _doing(decision: Decision) -> str:
    many = f"the {decision.count} " if decision.count > 1 else ""
    where = f" of {decision.module}" if decision.module else ""
    return f"{_VERB[decision.kind]} {many}{decision.what}{where}"


def advice(analysis: Analysis) -> tuple[str, ...]:
    """What would lower the peak and what it costs, most useful first; from the plan and the frontier."""
    whole = analysis.unplanned_time
    said = [_sentence(decision_sentence(d, whole)) for d in analysis.decisions[:_SHOWN] if d.freed]
    return (*said, *outlook(analysis))


def outlook(analysis: Analysis) -> tuple[str, ...]:
    """What more could be had, and what cannot, beyond the plan's own decisions."""
    whole = analysis.unplanned_time
    said = []
    points = sorted((p for p in analysis.frontier if p.peak < analysis.unplanned_peak_bytes), key=lambda p: -p.peak)
    for point in points:
        smallest = point is points[-1]
        if not smallest and (analysis.plan or len(points) > _PROPOSED):
            continue  # a plan has been chosen, or a table shows the whole range
        least = " (the smallest found)" if smallest else ""
        doing = f": {_summary(point.decisions)}" if point.decisions else ""
        said.append(
            f"Peak {format_bytes(point.peak, up=True)}{least} for {share(point.time - whole, whole)} more time{doing}."
        )
    held = analysis.breakdown
    program, at = analysis.program, analysis.peak_step
    if program.steps and program.steps[at].phase == Phase.OPTIMIZER and held.get("temporary"):
        said.append(
            f"The optimizer's update is the peak, {format_bytes(held['temporary'])} of it temporaries: fused=True makes "
            "none, foreach=False those of one parameter at a time."
        )
    largest = max(held, key=lambda c: held[c], default="")
    if largest in ("parameter", "optimizer") and 2 * held[largest] > analysis.peak_bytes:
        said.append(
            f"{largest.capitalize()} bytes are {share(held[largest], analysis.peak_bytes)} of the peak: recomputation "
            "cannot lower them; a smaller dtype, fewer parameters or sharding can."
        )
    return tuple(said)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."

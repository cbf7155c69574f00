"""What regions and results over operands spare of a plan, and what becomes of those bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from memplan.passes.fuse import Fuse
from memplan.plans import Plan
from memplan.problem import Phase
from memplan.realise import Planned, finished, realise
from memplan.seek import Seek

# Of the unplanned peak, tried without a budget until one costs time: what GPT-2, Llama and T5 recompute is free.
_SHARES = (0.9, 0.8, 0.65, 0.5)
_AS_FAST = 1.02  # of the time: as close as estimates are to what is measured
_WORTH = 0.2  # without a budget: one percent of the time has to buy five of the peak
_WORTH_SOLVING = 0.01  # of the bytes that a plan has to free


def spared(planned: Planned, budget: int | None, seek: Seek, estimated: bool) -> Planned:
    """The plan with its regions and with results over operands. Where they leave bytes of the budget free, those go back
    to the planner: less is recomputed as long as the Program keeps the budget and gets faster."""
    options = seek.options
    trial = Fuse(budget, options.lowering, measured=False)
    if budget is None:
        limit = None
        if options.fusion_enabled and not estimated:
            if options.objective == "peak":
                return _least(seek)
            plan, limit = _free_of_time(seek, planned)
            planned = realise(seek.built, plan, options)
        return finished(planned, options, replace(trial, limit=limit, measured=not estimated))
    best = finished(planned, options, trial)
    if best.timeline.peak <= budget and not estimated:
        best = _loosened(best, budget, seek, trial)
    best = _fastest(best, budget, seek, trial, estimated)
    if estimated or not options.fusion_enabled:
        return best
    for plan in (best.plan, planned.plan) if best.timeline.peak <= budget else ():
        found = finished(realise(planned.built, plan, options), options, replace(trial, measured=True))
        if found.timeline.peak <= budget:
            return found
    return _least(seek)


def _loosened(best: Planned, budget: int, seek: Seek, trial: Fuse) -> Planned:
    """The fastest of the plans for budgets that exceed this one by what their Programs spare."""
    asked, spare = budget, best.counted - best.timeline.peak
    for _ in range(seek.attempts):
        if not best.plan.recomputed or not seek.options.recompute_enabled:
            break
        if spare < _WORTH_SOLVING * (seek.stored.peak - budget):
            break
        candidate = finished(seek.plan(asked + spare), seek.options, trial)
        if candidate.timeline.peak > budget:
            spare //= 2
        elif candidate.timeline.time >= best.timeline.time:
            break
        else:
            asked, best = asked + spare, candidate
            spare = best.counted - best.timeline.peak - (asked - budget)
    return best


def _limits(seek: Seek) -> list[int]:
    """Bytes that plans are asked for beside the budget's, the loosest first."""
    return [int(share * seek.stored.peak) for share in _SHARES]


def _variants(plan: Plan, seek: Seek, fuse: Fuse) -> list[Planned]:
    """A plan finished, and with recomputations that its regions take in: the solver counts with every result on its own,
    and does not see how little those hold."""
    variants = (realise(seek.built, plan, seek.options), seek.melted(plan))
    return [finished(variant, seek.options, fuse) for variant in variants if variant is not None]


def _fastest(best: Planned, budget: int, seek: Seek, trial: Fuse, estimated: bool) -> Planned:
    """The fastest within the budget: a plan, or a variant of a looser one or of itself."""
    if not seek.may_melt:
        return best

    def looser() -> Iterator[Plan]:
        yield seek.stored
        if best.timeline.peak > budget or not estimated:
            yield from (seek.within(limit).plan for limit in _limits(seek) if limit > budget)
        yield best.plan

    for plan in looser():
        kept = [v for v in _variants(plan, seek, trial) if v.timeline.peak <= budget]
        if kept:  # what holds less is not faster
            fits = [best] if best.timeline.peak <= budget else []
            return min([*fits, *kept], key=lambda v: v.timeline.time)
    return best


def _least(seek: Seek) -> Planned:
    """What holds least, finished: what a refusal names must be kept when it is asked for, so it depends on no budget."""
    options, plan = seek.options, seek.least().plan
    trial = Fuse(None, options.lowering, measured=False)
    if seek.may_melt:
        plans = (seek.stored, *(seek.within(limit).plan for limit in _limits(seek)), plan)
        different = {each.sequence: each for each in plans}.values()
        found = [variant for each in different for variant in _variants(each, seek, trial)]
        plan = min(found, key=lambda v: v.timeline.peak).plan
    return finished(realise(seek.built, plan, options), options, replace(trial, measured=True))


def _free_of_time(seek: Seek, planned: Planned) -> tuple[Plan, int | None]:
    """Without a budget: a plan that holds less, where what it recomputes melts into the backward's regions and so costs
    no time; and the bytes that its regions may hold."""
    if not seek.options.recompute_enabled or all(op.phase == Phase.FORWARD for op in planned.problem.ops):
        return planned.plan, None

    def variants(plan: Plan, limit: int | None) -> list[tuple[Planned, int | None]]:
        return [(v, limit) for v in _variants(plan, seek, Fuse(limit, seek.options.lowering, measured=False))]

    found = variants(planned.plan, None)
    most = found[0][0].timeline
    for limit in _limits(seek):
        candidate = seek.within(limit)
        if candidate.timeline.peak > limit:
            break
        fast = [v for v in variants(candidate.plan, limit) if v[0].timeline.time <= _AS_FAST * most.time]
        if not fast:  # nor is what holds even less
            break
        found += fast
    kept = [v for v in found if v[0].timeline.peak <= most.peak]
    best, held = min(kept, key=lambda v: v[0].timeline.time * v[0].timeline.peak ** _WORTH)
    if held is None and best.plan is not planned.plan:
        held = most.peak  # what it would hold without regions may be more
    return best.plan, held

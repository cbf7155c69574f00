"""An independent check of a plan against its problem. Shares no code with any solver or with the simulator.

Written from the rules in memplan/problem.py, one copy at a time, in the most literal way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memplan.errors import PlanError
from memplan.plans import Offload, Plan
from memplan.problem import Phase, Problem


@dataclass
class _Copy:
    """What a sequence does with one copy of a buffer; ``made`` is -1 for a resident one."""

    buffer: int
    made: int
    reads: list[int] = field(default_factory=list)
    changes: list[int] = field(default_factory=list)
    held_from: int | None = None  # from here to the end the caller holds it


def validate(problem: Problem, plan: Plan) -> None:
    """Raise PlanError when the plan breaks a rule of the problem, its budget, or states a wrong peak or time.

    The bytes that its Program spares are the simulator's to find: here they are taken as stated."""
    peak, time = check_plan(problem, plan.sequence, plan.offloads)
    if peak != plan.peak + plan.spared:
        raise PlanError(f"the plan states a peak of {plan.peak + plan.spared} bytes; it is {peak}")
    if abs(time - plan.time) > 1e-6 * max(1.0, time):
        raise PlanError(f"the plan states a time of {plan.time}; it is {time}")
    if plan.budget is not None and plan.peak > plan.budget:
        raise PlanError(f"the plan's peak of {plan.peak} bytes is over its budget of {plan.budget}")


def check_sequence(problem: Problem, sequence: tuple[int, ...]) -> tuple[int, float]:
    """(peak bytes, time) of a sequence, homes left aside; raises PlanError at the first rule it breaks."""
    copies = _follow(problem, sequence)
    return _peak(problem, sequence, copies, ()), sum(problem.ops[i].time for i in sequence)


def check_plan(problem: Problem, sequence: tuple[int, ...], offloads: tuple[Offload, ...]) -> tuple[int, float]:
    """(peak bytes, time) of a sequence with its offloads; raises PlanError at the first rule they break."""
    copies = _follow(problem, sequence)
    known = {(copy.buffer, copy.made): copy for copy in copies}
    stays: dict[tuple[int, int], list[Offload]] = {}
    for stay in offloads:
        name = problem.buffers[stay.buffer].name if 0 <= stay.buffer < len(problem.buffers) else ""
        if (stay.buffer, stay.made_at) not in known:
            raise PlanError(f"no copy of buffer {stay.buffer} {name} is made at position {stay.made_at}")
        if stay.tier not in [tier.name for tier in problem.tiers]:
            raise PlanError(f"{name} is sent to {stay.tier!r}, which is no tier")
        if not 0 <= stay.out_from <= stay.out_until <= stay.in_from <= stay.in_until <= len(sequence):
            raise PlanError(f"the positions of {name}'s offload do not ascend within the sequence")
        stays.setdefault((stay.buffer, stay.made_at), []).append(stay)
    for b in problem.homed:
        if (b, -1) not in stays:
            raise PlanError(f"{problem.buffers[b].name} has its home on a tier and no offload")
    source: dict[Offload, Offload | None] = {}  # what sent the contents that an offload brings back; None: its home
    last_read: dict[Offload | tuple[str, int], int] = {}  # of a copy-out or a home, the last in_until that needs it
    for key, of_copy in stays.items():
        _check_stays(problem, len(sequence), known[key], of_copy, source, last_read)
    _check_capacities(problem, len(sequence), last_read)
    return _peak(problem, sequence, copies, offloads), _time(problem, sequence, offloads, source)


def _follow(problem: Problem, sequence: tuple[int, ...]) -> list[_Copy]:
    """Every copy that a sequence makes or finds; raises PlanError at the first rule the sequence breaks."""
    ops, buffers = problem.ops, problem.buffers
    made_by_an_op = {b for op in ops for b in op.writes}
    copies = [_Copy(b, -1, held_from=None if x.home else 0) for b, x in enumerate(buffers) if b not in made_by_an_op]
    newest = {copy.buffer: copy for copy in copies}
    ran: set[int] = set()
    over: dict[int, str] = {}  # op that may not run any more -> what ran that it had to precede
    backward_began = False
    for at, i in enumerate(sequence):
        if not 0 <= i < len(ops):
            raise PlanError(f"position {at}: there is no op {i}")
        op = ops[i]
        if op.phase != Phase.FORWARD and not backward_began:
            backward_began = True
            for b in problem.forward_outputs:
                if b not in newest:
                    raise PlanError(f"position {at}: backward begins before forward output {buffers[b].name} exists")
                if newest[b].held_from is None:
                    newest[b].held_from = at
        if op.once and i in ran:
            raise PlanError(f"position {at}: {op.name} must run once and runs again")
        if op.once and op.phase == Phase.FORWARD and backward_began:
            raise PlanError(f"position {at}: {op.name} belongs to the forward and runs after backward began")
        if i in over:
            raise PlanError(f"position {at}: {op.name} runs after {over[i]}, which must follow its every run")
        over |= dict.fromkeys(op.after_all, op.name)
        for j in (*op.after, *op.after_all):
            if j not in ran:
                raise PlanError(f"position {at}: {op.name} runs before {ops[j].name}, which it must follow")
        for b in op.reads:
            if b not in newest:
                raise PlanError(f"position {at}: {op.name} reads {buffers[b].name}, which does not exist")
            newest[b].reads.append(at)
        for b in op.mutates:
            newest[b].changes.append(at)
        for b in op.writes:
            newest[b] = _Copy(b, at)
            copies.append(newest[b])
        ran.add(i)
    if len(ran) != len(ops):
        missing = next(i for i in range(len(ops)) if i not in ran)
        raise PlanError(f"{ops[missing].name} never runs")
    for b in problem.outputs:
        if not (backward_began and b in problem.forward_outputs) and newest[b].held_from is None:
            newest[b].held_from = newest[b].made + 1 if b in problem.given else len(sequence)
    return copies


def _peak(problem: Problem, sequence: tuple[int, ...], copies: list[_Copy], offloads: tuple[Offload, ...]) -> int:
    end = len(sequence)
    change = [0] * (end + 2)
    for copy in copies:
        to_the_end = copy.made < 0 or copy.held_from is not None
        last = end if to_the_end else max((copy.made, *copy.reads))
        change[max(0, copy.made)] += problem.buffers[copy.buffer].size
        change[last + 1] -= problem.buffers[copy.buffer].size
    for stay in offloads:
        change[stay.out_until] -= problem.buffers[stay.buffer].size
        change[end + 1 if _for_good(problem, stay, end) else stay.in_from] += problem.buffers[stay.buffer].size
    live, peak = 0, 0
    for at in range(end + 1):  # what comes back after the last run counts as well
        live += change[at]
        peak = max(peak, live + (problem.ops[sequence[at]].workspace if at < end else 0))
    return peak


def _for_good(problem: Problem, stay: Offload, end: int) -> bool:
    """Whether the offload leaves a buffer at its home until the next step."""
    return bool(problem.buffers[stay.buffer].home) and stay.in_from == end


def _check_stays(
    problem: Problem,
    end: int,
    copy: _Copy,
    stays: list[Offload],
    source: dict[Offload, Offload | None],
    last_read: dict[Offload | tuple[str, int], int],
) -> None:
    """The rules about one copy's offloads, in order of time."""
    buffer = problem.buffers[copy.buffer]
    stays = sorted(stays, key=lambda stay: (stay.out_from, stay.in_until))
    there: dict[str, Offload | None] = {buffer.home: None} if buffer.home else {}  # tiers that hold the contents
    if copy.made < 0 and not buffer.home:
        raise PlanError(f"{buffer.name} belongs to the caller and is sent away")
    if buffer.home:
        first, last = stays[0], stays[-1]
        if (first.out_from, first.out_until, first.tier) != (0, 0, buffer.home):
            raise PlanError(f"{buffer.name} does not begin at its home")
        if (last.in_from, last.in_until, last.tier) != (end, end, buffer.home):
            raise PlanError(f"{buffer.name} does not end at its home")
        last_read["home", copy.buffer] = end
    returned = copy.made + 1
    for stay in stays:
        if stay.out_from < returned:
            raise PlanError(f"{buffer.name} is sent away before position {stay.out_from}, when it is not there")
        for at in copy.changes:
            if returned <= at < stay.out_from:
                there.clear()
            if stay.out_from <= at < stay.in_until:
                raise PlanError(f"position {at} changes {buffer.name}, which is on its way")
        if any(stay.out_until <= at < stay.in_until for at in copy.reads):
            raise PlanError(f"a position in [{stay.out_until}, {stay.in_until}) reads {buffer.name}, which is away")
        if copy.held_from is not None and stay.in_until > copy.held_from:
            raise PlanError(f"{buffer.name} is away until {stay.in_until}; the caller holds it from {copy.held_from}")
        if (
            not _for_good(problem, stay, end)
            and copy.held_from is None
            and all(at < stay.in_until for at in copy.reads)
        ):
            raise PlanError(f"{buffer.name} is brought back at {stay.in_until} for nothing")
        if stay.tier in there and stay.out_from != stay.out_until:
            raise PlanError(f"{buffer.name} is copied to {stay.tier}, which has it")
        source[stay] = there.setdefault(stay.tier, stay)
        held_by = source[stay]
        if held_by is not None:
            last_read[held_by] = stay.in_until
        returned = stay.in_until


def _check_capacities(problem: Problem, end: int, last_read: dict[Offload | tuple[str, int], int]) -> None:
    """No tier ever holds more than it can; a copy that was changed leaves its home's place there taken."""
    for tier in problem.tiers:
        change = [0] * (end + 2)
        for held, until in last_read.items():
            if isinstance(held, Offload):
                b, since, name = held.buffer, held.out_from, held.tier
                if name == problem.buffers[b].home:
                    continue  # written back in place
            else:
                b, since, name = held[1], 0, problem.buffers[held[1]].home
            if name == tier.name:
                change[since] += problem.buffers[b].size
                change[until if isinstance(held, Offload) else end + 1] -= problem.buffers[b].size
        load = 0
        for at in range(end + 1):
            load += change[at]
            if load > tier.capacity:
                raise PlanError(f"position {at}: {tier.name} holds {load} bytes, more than its {tier.capacity}")


def _time(
    problem: Problem, sequence: tuple[int, ...], offloads: tuple[Offload, ...], source: dict[Offload, Offload | None]
) -> float:
    """The end of the last run and of the waits after it: each position's starts and waits, one after the other."""
    tiers = {tier.name: tier for tier in problem.tiers}
    size = [buffer.size for buffer in problem.buffers]
    end = len(sequence)
    out_free = dict.fromkeys(tiers, 0.0)
    in_free = dict.fromkeys(tiers, 0.0)
    out_end: dict[Offload, float] = {}
    in_end: dict[Offload, float] = {}
    starts_out: list[list[Offload]] = [[] for _ in range(end + 1)]
    ends_out: list[list[Offload]] = [[] for _ in range(end + 1)]
    starts_in: list[list[Offload]] = [[] for _ in range(end + 1)]
    ends_in: list[list[Offload]] = [[] for _ in range(end + 1)]
    for stay in offloads:
        if source[stay] == stay:
            starts_out[stay.out_from].append(stay)
            ends_out[stay.out_until].append(stay)
        if not _for_good(problem, stay, end):
            starts_in[stay.in_from].append(stay)
            ends_in[stay.in_until].append(stay)
    clock = 0.0
    for at in range(end + 1):
        for stay in sorted(starts_out[at], key=lambda stay: stay.out_until):
            tier = tiers[stay.tier]
            out_end[stay] = max(clock, out_free[stay.tier]) + tier.latency + size[stay.buffer] / tier.write
            out_free[stay.tier] = out_end[stay]
        for stay in ends_out[at]:
            clock = max(clock, out_end[stay])
        for stay in sorted(starts_in[at], key=lambda stay: stay.in_until):
            tier, sent = tiers[stay.tier], source[stay]
            begin = max(clock, in_free[stay.tier], out_end[sent] if sent is not None else 0.0)
            in_end[stay] = begin + tier.latency + size[stay.buffer] / tier.read
            in_free[stay.tier] = in_end[stay]
        for stay in ends_in[at]:
            clock = max(clock, in_end[stay])
        if at < end:
            clock += problem.ops[sequence[at]].time
    return clock

"""What an edit of a sequence costs: the time it adds, the loads it makes, and whether it keeps the rules."""

from __future__ import annotations

from memplan.solvers.compiled import compiled
from memplan.solvers.recompute.arrays import (
    AFTER,
    AFTER_ROW,
    BEFORE,
    BEFORE_ROW,
    FINAL,
    FINAL_ROW,
    FORWARD,
    GUARDS,
    MADE,
    ONCE,
    UNTIL,
    UNTIL_ROW,
    WORKSPACE,
)
from memplan.solvers.recompute.state import (
    AT,
    BEGIN,
    BITS,
    BORDER,
    BROKEN,
    BUDGET,
    CHANGE,
    FIRST,
    FRESH,
    GONE,
    HIGH,
    INSERTED,
    KEY,
    LENGTH,
    LOAD,
    LOW,
    N_INSERTED,
    N_REMOVED,
    N_TOUCHED,
    NEW_OVER,
    NEXT,
    NONE,
    OP,
    OVER,
    REMOVED,
    RUN,
    SPACING,
    TOUCHED,
    N,
    place,
    spans,
    sweep_useless,
)


@compiled
def runs_in_order(g, s, i):
    """Whether op i keeps its order with the ops it must follow and those that must follow it."""
    if s[FIRST, i] == NONE:
        return False
    key = s[KEY, s[FIRST, i]]
    for k in range(g[AFTER_ROW, i], g[AFTER_ROW, i + 1]):
        j = s[FIRST, g[AFTER, k]]
        if j == NONE or s[KEY, j] > key:
            return False
    for k in range(g[BEFORE_ROW, i], g[BEFORE_ROW, i + 1]):
        j = s[FIRST, g[BEFORE, k]]
        if j == NONE or s[KEY, j] < key:
            return False
    for k in range(g[FINAL_ROW, i], g[FINAL_ROW, i + 1]):
        if last_key(s, g[FINAL, k]) > key:
            return False
    if g[UNTIL_ROW, i] < g[UNTIL_ROW, i + 1]:
        key = last_key(s, i)
        for k in range(g[UNTIL_ROW, i], g[UNTIL_ROW, i + 1]):
            if s[KEY, s[FIRST, g[UNTIL, k]]] < key:
                return False
    return True


@compiled
def last_key(s, i):
    """Where op i runs last."""
    run = s[FIRST, i]
    while s[NEXT, run] != NONE:
        run = s[NEXT, run]
    return s[KEY, run]


@compiled
def move_border(g, s):
    """Find where backward begins after the edit; False when a forward output or a random op ends on the wrong side."""
    border = s[N, BORDER]
    old = border << BITS
    if border < s[N, LENGTH] and s[GONE, s[RUN, border]] == 1:
        border += 1
        while border < s[N, LENGTH] and (s[GONE, s[RUN, border]] == 1 or g[FORWARD, s[OP, s[RUN, border]]] == 1):
            border += 1
    key = border << BITS
    for k in range(s[N, N_INSERTED]):
        run = s[INSERTED, k]
        if g[FORWARD, s[OP, run]] == 0 and s[GONE, run] == 0:
            key = min(key, s[KEY, run])
    if key != old:
        for t in range(max(0, min(key, old) >> BITS), min(s[N, LENGTH], (max(key, old) >> BITS) + 1)):
            if g[GUARDS, s[OP, s[RUN, t]]] == 1 and s[GONE, s[RUN, t]] == 0:
                return False
    s[N, BEGIN] = key
    for k in range(s[N, N_INSERTED]):
        run, i = s[INSERTED, k], s[OP, s[INSERTED, k]]
        late = g[GUARDS, i] == 1 and s[GONE, run] == 0 and s[KEY, run] > key
        if late and (g[ONCE, i] == 1 or key != old):
            return False
    return True


@compiled
def weigh(g, duration, s):
    """Finish the edit: NEW_OVER and the loads; returns how much time it adds. BROKEN when it breaks a rule."""
    if not move_border(g, s):
        s[N, BROKEN] = 1
    if s[N, BROKEN] == 0:
        sweep_useless(g, s)
        if not move_border(g, s):  # the sweep may have removed the run at which backward began
            s[N, BROKEN] = 1
    added = 0.0
    for k in range(s[N, N_INSERTED]):
        added += duration[s[OP, s[INSERTED, k]]]
        if s[N, BROKEN] == 0 and not runs_in_order(g, s, s[OP, s[INSERTED, k]]):
            s[N, BROKEN] = 1
    for k in range(s[N, N_REMOVED]):
        added -= duration[s[OP, s[REMOVED, k]]]
        if s[N, BROKEN] == 0 and not runs_in_order(g, s, s[OP, s[REMOVED, k]]):
            s[N, BROKEN] = 1
    if s[N, BROKEN] == 0:
        for k in range(s[N, N_TOUCHED]):
            spans(g, s, s[TOUCHED, k], 1)
    _profile(g, s)
    return added


@compiled
def _profile(g, s):
    """Loads of the edited sequence between LOW and HIGH, and the bytes over the budget; clears ``change``."""
    at, inserted, budget = s[N, AT], s[N, N_INSERTED], s[N, BUDGET]
    length = s[N, LENGTH] + inserted
    low, high = s[N, LOW], min(s[N, HIGH], length)
    over = s[N, OVER]
    if s[N, BROKEN] == 1:
        s[CHANGE, low : s[N, HIGH] + 1] = 0
        return
    more = 0
    for v in range(low, min(at, high)):
        more += s[CHANGE, v]
        old = s[LOAD, v]
        s[FRESH, v] = old + more
        over += max(0, old + more - budget) - max(0, old - budget)
    if inserted > 0:
        here = s[OP, s[RUN, at]]
        across = s[LOAD, at] - g[MADE, here] - g[WORKSPACE, here]
        for v in range(at, at + inserted):
            more += s[CHANGE, v]
            run = s[INSERTED, v - at]
            s[FRESH, v] = across + more + g[WORKSPACE, s[OP, run]]
            if s[GONE, run] == 0:
                over += max(0, s[FRESH, v] - budget)
    for v in range(max(low, at + inserted), high):
        more += s[CHANGE, v]
        old = s[LOAD, v - inserted]
        s[FRESH, v] = old + more
        over += max(0, old + more - budget) - max(0, old - budget)
    for k in range(s[N, N_REMOVED]):
        t = s[KEY, s[REMOVED, k]]
        if t & (SPACING - 1) == 0:
            v = place(s, t)
            over -= max(0, s[FRESH, v] - budget)
    s[CHANGE, low : s[N, HIGH] + 1] = 0
    s[N, NEW_OVER] = over

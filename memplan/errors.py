"""Every error memplan raises on purpose: each names the cause and the next step."""

from __future__ import annotations

from dataclasses import dataclass


class MemplanError(Exception):
    """Base of all errors that memplan raises on purpose."""


class OptionError(MemplanError, ValueError):
    """An option, a budget or a combination of options that cannot be understood."""


class InputError(MemplanError, ValueError):
    """A file, a graph or a model that cannot be read; the message names the place."""


class PlanError(MemplanError):
    """A plan that breaks a rule of its problem. Always a bug of a solver, never run."""


class UnsupportedError(MemplanError):
    """A graph memplan cannot plan; the caller runs it unplanned after one warning."""


class TierError(MemplanError):
    """A slower tier failed while a step ran: full, lost, or in another process. The next step starts afresh."""


@dataclass(frozen=True)
class LiveBuffer:
    """One buffer alive at the tightest instant, as an error or a report shows it."""

    name: str
    size: int  # bytes
    category: str
    module: str
    source: str


class BudgetInfeasibleError(MemplanError):
    """No plan fits the budget.

    Attributes: budget, smallest (bytes, the smallest feasible budget found, None if none was), bound (bytes, no plan
    of this graph can go below), tightest (op at the tightest instant), alive (the buffers alive there, largest first).
    """

    def __init__(
        self, budget: int, smallest: int | None, bound: int, tightest: str = "", alive: tuple[LiveBuffer, ...] = ()
    ) -> None:
        self.budget, self.smallest, self.bound, self.tightest, self.alive = budget, smallest, bound, tightest, alive
        super().__init__(self._message())

    @property
    def verdict(self) -> tuple[str, str]:
        """That the budget cannot be kept, and which can: a sentence each."""
        from memplan.units import format_bytes

        refused = f"a budget of {format_bytes(self.budget)} cannot be kept."
        below = f"below {format_bytes(self.bound)} can exist for this graph."
        if self.smallest is None:
            return refused, f"None {below}"
        found = f"{format_bytes(self.smallest, up=True)} ({self.smallest} bytes)"
        return refused, f"The smallest feasible budget found is {found}; none {below}"

    def _message(self) -> str:
        from memplan.units import format_bytes

        lines = [*self.verdict]
        if self.tightest:
            lines.append(f"What stands in the way, alive at {self.tightest}:")
        for b in self.alive[:8]:
            where = " ".join(part for part in (b.module, b.source) if part)
            lines.append(f"  {format_bytes(b.size):>10}  {b.category:<10} {b.name}  {where}".rstrip())
        lines.append("Next: raise memory_budget to the smallest feasible one, or reduce batch, length or parameters.")
        return "\n".join(lines)

"""What an op costs: time and workspace, estimated from a device profile or measured once and remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from memplan.errors import OptionError

if TYPE_CHECKING:
    from torch import fx

    from memplan.devices import DeviceProfile

__all__ = ["Cost", "CostModel", "cost_model"]


@dataclass(frozen=True)
class Cost:
    """The price of one run of an op."""

    time: float = 0.0  # microseconds
    workspace: int = 0  # bytes its kernel holds beyond operands and results while it runs


class CostModel(Protocol):
    """Prices nodes of a graph of functional aten ops whose ``meta["val"]`` are fake tensors."""

    def cost(self, node: fx.Node) -> Cost: ...


def cost_model(estimator: Literal["analytic", "profile"] | str, profile: DeviceProfile) -> CostModel:
    """``"analytic"``: from the profile alone. ``"profile"``: measured here, once per op, shape and dtype, and cached.

    A profile of a device that is not at hand leaves only the analytic model, which is then used. Raises OptionError for
    another estimator.
    """
    from memplan.cost.analytic import AnalyticCost

    if estimator == "analytic":
        return AnalyticCost(profile)
    if estimator == "profile":
        from memplan.cost.measured import MeasuredCost

        return MeasuredCost(AnalyticCost(profile))
    raise OptionError(f"no runtime estimator named {estimator!r}; there are 'analytic' and 'profile'")

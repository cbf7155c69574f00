"""pytest: ``@pytest.mark.limit_peak_memory("8GiB")`` and the ``memplan`` fixture.

    @pytest.mark.limit_peak_memory("8GiB")
    def test_a_training_step_fits(memplan):
        memplan.analyze(build_model(), (tokens,), optimizer="adamw")

Every step analysed in a marked test must stay within its limit; the failure says what is alive at the peak.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from memplan.analysis import Analysis

MARKER = "limit_peak_memory"


class MemoryBudget:
    """What the ``memplan`` fixture gives: ``analyze``, and the analyses made so far."""

    def __init__(self, limit: str | int | None) -> None:
        self.limit = limit
        self.analyses: list[Analysis] = []

    def analyze(self, model: Any, args: Any = (), kwargs: Any = None, **options: Any) -> Analysis:
        """``memplan.analyze`` of one step; fails the test when the peak is over the marker's limit."""
        from memplan import api

        return self.check(api.analyze(model, args, kwargs or {}, **options))

    def check(self, analysis: Analysis) -> Analysis:
        """Hold an analysis made elsewhere against the marker's limit."""
        self.analyses.append(analysis)
        if self.limit is not None and not analysis.fits(self.limit):
            pytest.fail(over_limit(analysis, self.limit), pytrace=False)
        return analysis


def over_limit(analysis: Analysis, limit: str | int) -> str:
    """The failure's text: by how much, and the buffers alive at the peak."""
    from memplan.report.text import buffer_table, category_table, plain
    from memplan.report.words import headline
    from memplan.units import format_bytes, parse_bytes

    over = analysis.peak_bytes - parse_bytes(limit)
    return "\n".join(
        [
            f"peak memory is {format_bytes(over)} over the limit of {format_bytes(parse_bytes(limit))}",
            headline(analysis),
            "",
            plain(category_table(analysis)),
            plain(buffer_table(analysis.at_peak[:20], len(analysis.at_peak))),
        ]
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARKER}(limit): fail when a step analysed in the test holds more than this")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """A marked test that analyses nothing would pass whatever happens: that is an error of the test."""
    result = yield
    if pyfuncitem.get_closest_marker(MARKER):
        budget = pyfuncitem.funcargs.get("memplan")
        if not isinstance(budget, MemoryBudget) or not budget.analyses:
            pytest.fail(f"marked with {MARKER}, but it analyses nothing: call memplan.analyze(model, inputs)", False)
    return result


@pytest.fixture
def memplan(request: pytest.FixtureRequest) -> MemoryBudget:
    """Analyses steps; holds each against ``@pytest.mark.limit_peak_memory`` where the test has it."""
    marker = request.node.get_closest_marker(MARKER)
    if marker is not None and len(marker.args) != 1:
        raise pytest.UsageError(f'write @pytest.mark.{MARKER}("8GiB")')
    return MemoryBudget(marker.args[0] if marker else None)

"""The plugin, run by pytest on test files of its own."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

pytest_plugins = ["pytester"]

BODY = """
import sys
sys.path.insert(0, {tests!r})
import pytest
from samples import unplanned_analysis
"""


@pytest.fixture
def run_tests(pytester, request):
    def run(code: str):
        tests = str(request.config.rootpath / "tests")
        pytester.makepyfile(BODY.format(tests=tests) + code)
        # Where memplan is installed its entry point loads the plugin; pytest refuses to load one twice.
        installed = any(point.value == "memplan.pytest_plugin" for point in entry_points(group="pytest11"))
        load = () if installed else ("-p", "memplan.pytest_plugin")
        return pytester.runpytest(*load, "--strict-markers", "-p", "no:cacheprovider")

    return run


def test_a_step_over_the_limit_fails_and_says_what_is_alive(run_tests):
    result = run_tests("""
@pytest.mark.limit_peak_memory("1MiB")
def test_step(memplan):
    memplan.check(unplanned_analysis())
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*over the limit of 1.0 MiB*", "*activation*", "*softmax_0*model.py:30*"])
    result.stdout.no_fnmatch_line("*pytest_plugin.py*Failed*")


def test_a_step_within_the_limit_passes_and_is_kept(run_tests):
    result = run_tests("""
@pytest.mark.limit_peak_memory("1GiB")
def test_step(memplan):
    assert memplan.check(unplanned_analysis()).peak_bytes == memplan.analyses[0].peak_bytes

def test_unmarked(memplan):
    memplan.check(unplanned_analysis())
""")
    result.assert_outcomes(passed=2)


@pytest.mark.parametrize("signature", ["", "memplan"])
def test_a_marked_test_that_analyses_nothing_fails(run_tests, signature):
    result = run_tests(f"""
@pytest.mark.limit_peak_memory("1GiB")
def test_step({signature}):
    pass
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*analyses nothing*"])


def test_a_limit_that_cannot_be_read_is_an_error(run_tests):
    result = run_tests("""
@pytest.mark.limit_peak_memory("lots")
def test_step(memplan):
    memplan.check(unplanned_analysis())
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*cannot read 'lots' as bytes*"])

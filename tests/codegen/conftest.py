from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-goldens", action="store_true", help="write the generated kernels to tests/codegen/goldens"
    )
    parser.addoption("--all-targets", action="store_true", help="compile every golden for every target, not in turn")

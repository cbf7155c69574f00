"""Makes the tests' shared helper modules importable from every folder of tests, and sets what properties are drawn.

Profiles of hypothesis: ``repeatable``, the default, draws the same cases every time, so that a change is judged by itself;
``nightly`` draws other ones on every run and shrinks where they fail.
"""

import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

_SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=_SLOW)
settings.register_profile("nightly", deadline=None, suppress_health_check=_SLOW, print_blob=True)
settings.load_profile("repeatable")

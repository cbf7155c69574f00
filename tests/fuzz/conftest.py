"""Profiles of the fuzzer: ``fuzz`` runs the same cases every time, ``nightly`` other ones, shrunk where they fail."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

_SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
settings.register_profile("fuzz", derandomize=True, deadline=None, database=None, suppress_health_check=_SLOW)
settings.register_profile("nightly", deadline=None, suppress_health_check=_SLOW, print_blob=True)

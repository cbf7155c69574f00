"""Random numbers inside compiled code: Lehmer's generator with the constants of Park and Miller's minimal standard
(Communications of the ACM 31, 1988). The state is an array of one number, so that a kernel can hand it on."""

from __future__ import annotations

from memplan.solvers.compiled import compiled

MULTIPLIER, MODULUS = 48271, 2**31 - 1  # products stay below 2**47 in any integer type


@compiled
def draw(random, below):
    """A whole number in [0, below)."""
    random[0] = random[0] * MULTIPLIER % MODULUS
    return random[0] % below


@compiled
def unit(random):
    """A number in (0, 1)."""
    random[0] = random[0] * MULTIPLIER % MODULUS
    return random[0] / float(MODULUS)

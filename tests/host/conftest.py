"""Options and fixtures of the host tests: golden files, random seeds, bitwise comparison."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Timing never decides a test.
settings.register_profile(
    "host", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("host")

SameBits = Callable[..., None]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh random numbers in every run; a failing test shows the seed."""
    # With a default: run as `pytest tests`, pytest reads this file too late for its options.
    seed = request.config.getoption("--seed", default=None)
    seed = secrets.randbits(32) if seed is None else seed
    print(f"repeat with: pytest --seed {seed} '{request.node.nodeid}'")
    return np.random.default_rng(seed)


@pytest.fixture
def same_bits() -> SameBits:
    """same_bits(got, want, note): equal dtype, shape and bits; NaNs and zeros too."""

    def check(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any], note: object = "") -> None:
        assert (got.dtype, got.shape) == (want.dtype, want.shape), note
        unsigned = np.dtype(f"u{got.dtype.itemsize}")
        got_bits = np.ascontiguousarray(got).view(unsigned)
        want_bits = np.ascontiguousarray(want).view(unsigned)
        bad = np.argwhere(got_bits != want_bits)
        if len(bad):
            first = tuple(map(int, bad[0]))
            digits = 2 * got.dtype.itemsize
            pytest.fail(
                f"{len(bad)} of {got.size} elements differ, the first at {first}:"
                f" got {got[first]} = {got_bits[first]:#0{digits + 2}x},"
                f" want {want[first]} = {want_bits[first]:#0{digits + 2}x}\n{note}",
                pytrace=False,
            )

    return check

"""The example of an MLA layer against float32: on the interpreter, and on a GPU if there is one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.examples import load

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def example() -> Any:
    return load("mla_decode_layer")


# BF16 keys and queries cost 2^-9 of a value each; E4M3 codes 2^-4 at most, and 2.6% on average.
@pytest.mark.parametrize(("is_fp8", "steps", "bound"), [(False, 66, 0.01), (True, 5, 0.06)])
def test_small_layer_meets_float32(example: Any, is_fp8: bool, steps: int, bound: float) -> None:
    config = example.Config(hidden=96, heads=2, q_rank=48, nope=32, value=16)
    error = example.run(config, 1, steps, "cpu", is_fp8=is_fp8)
    assert 0 < error < bound


@pytest.mark.gpu
@pytest.mark.parametrize(("is_fp8", "bound"), [(False, 0.01), (True, 0.06)])
def test_layer_of_deepseek_meets_float32(example: Any, is_fp8: bool, bound: float) -> None:
    error = example.run(example.Config(), 4, 64, "cuda", is_fp8=is_fp8)
    assert 0 < error < bound

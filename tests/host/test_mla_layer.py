"""The example of an MLA layer against float32: on the interpreter, and on a GPU if there is one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

FILE = Path(__file__).parents[2] / "examples" / "mla_decode_layer.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("mla_decode_layer", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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

"""Dense GEMMs with gate and up, row weights and D in E4M3 on the GPU, against the interpreter."""

from __future__ import annotations

import os
import random
import secrets
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jitgen  # noqa: E402
from jitgen import Gemm, gate, silu, up  # noqa: E402
from jitgen.dtypes import BF16, E4M3, F32  # noqa: E402
from jitgen.expr import operands  # noqa: E402
from jitgen.tuning.space import candidates  # noqa: E402

from .draws import to_numpy  # noqa: E402
from .grouped_draws import RESULTS  # noqa: E402

SEED = int(os.environ.get("JITGEN_TEST_SEED", secrets.randbits(31)))
SWIGLU = silu(gate) * up


def make(problem: Gemm, m: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", generator=generator)

    a, sfa = jitgen.quantize(normal(m, problem.k))
    b, sfb = jitgen.quantize(normal(problem.n, problem.k), (128, 128))
    tensors = {"a": a, "b": b, "sfa": sfa, "sfb": sfb}
    for operand in operands(problem.epilogue):
        extents = {"m": m, "n": problem.columns}
        value = normal(*(extents[axis] for axis in operand.axes))
        tensors[operand.name] = value.to(getattr(torch, operand.dtype.name))
    return tensors


def run(problem: Gemm, tensors: dict[str, Any], **options: Any) -> Any:
    """gemm on tensors or arrays."""
    bound = {operand.name: tensors[operand.name] for operand in operands(problem.epilogue)}
    return jitgen.gemm(
        *(tensors["a"], tensors["b"], (tensors["sfa"], tensors["sfb"])),
        out_dtype=problem.d_dtype,
        epilogue=problem.epilogue.bind(**bound),
        ue8m0=problem.ue8m0,
        **options,
    )


def pair(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("index", range(8 * len(RESULTS)))
def test_gemm_of_other_results_equals_interpreter(index: int) -> None:
    rng = random.Random(SEED + index)
    dtype, epilogue, ue8m0 = RESULTS[index % len(RESULTS)]
    n, k, m = rng.choice((256, 512, 768)), rng.choice((16, 144, 576)), rng.choice((1, 63, 129, 300))
    problem = Gemm(n, k, dtype, epilogue, ue8m0=ue8m0)
    schedule = rng.choice(list(candidates(problem)))
    tensors = make(problem, m, rng.getrandbits(31))
    got = pair(run(problem, tensors, schedule=schedule))
    host = {name: to_numpy(t) for name, t in tensors.items()}
    want = pair(run(problem, host, schedule=schedule))
    for one, other in zip(got, want, strict=True):
        one = to_numpy(one)
        word = np.dtype(f"u{one.dtype.itemsize}")
        np.testing.assert_array_equal(one.view(word), other.view(word), f"{problem}; {schedule}")


@pytest.mark.parametrize("dtype", [BF16, F32, E4M3], ids=str)
def test_swiglu_is_within_its_bound_of_the_interpreter(dtype: Any) -> None:
    """silu is within 11 units in the last place (jitgen.expr.OPERATIONS), a product rounds once."""
    problem = Gemm(1024, 1040, dtype, SWIGLU)
    tensors = make(problem, 200, SEED)
    got = [to_numpy(t).astype(np.float64) for t in pair(run(problem, tensors))]
    host = {name: to_numpy(t) for name, t in tensors.items()}
    want = [x.astype(np.float64) for x in pair(run(problem, host))]
    float32_bound = 13 * 2.0**-23
    if dtype == E4M3:
        assert (np.abs(got[1] - want[1]) <= float32_bound * want[1]).all()
        # Values so near to each other round to the same E4M3, or to neighbours.
        codes = np.sort(np.arange(256, dtype=np.uint8).view(E4M3.numpy).astype(np.float64))
        places = [np.searchsorted(codes, values) for values in (got[0], want[0])]
        assert (np.abs(places[0] - places[1]) <= 1).all()
        assert (places[0] != places[1]).mean() < 1e-3
        return
    bound = float32_bound if dtype == F32 else 2.0**-7
    assert (np.abs(got[0] - want[0]) <= bound * np.abs(want[0]) + 2.0**-121).all()
    assert (got[0] != want[0]).mean() < (1.0 if dtype == F32 else 1e-3)

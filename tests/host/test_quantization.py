"""Quantizing a matrix and its transpose: rules, verifier, meaning, source and compiling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import jitgen
from jitgen import BF16, E4M3, F32, Quantization, QuantizationSchedule
from jitgen.build import build, prebuild
from jitgen.codegen import render
from jitgen.control import remedy
from jitgen.lower import lower_any
from jitgen.numerics import NAN_F32, quantize_blocks
from jitgen.quantization import (
    RULES,
    LoadTile,
    MakeScales,
    QuantizationKernel,
    StoreCodes,
    Transpose,
    interpret_quantization,
    lower_quantization,
    num_quantization_blocks,
    output_shapes,
)
from jitgen.runtime.store import KernelStore
from jitgen.verify import verify

from .conftest import SameBits

KINDS = [(rows, columns) for rows in (0, 1, 128) for columns in (0, 1, 128) if rows or columns]
SHAPES = [(1, 1), (130, 7), (128, 256), (300, 200)]


def draw(shape: tuple[int, ...], dtype: Any, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    x = rng.standard_normal(shape) * np.exp(3 * rng.standard_normal(shape))
    x[rng.random(shape) < 0.1] = 0
    x[rng.random(shape) < 0.1] *= -0.0
    return x.astype(np.float32).astype(dtype)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_quantization_is_quantize_blocks_of_both(
    kind: tuple[int, int], dtype: Any, rng: np.random.Generator, same_bits: SameBits
) -> None:
    problem = Quantization(jitgen.dtypes.dtype_of(dtype), *kind)
    kernel = lower_quantization(problem, QuantizationSchedule())
    for shape in SHAPES:
        x = draw(shape, dtype, rng)
        made = interpret_quantization(kernel, {"x": x})
        assert {name: a.shape for name, a in made.items()} == output_shapes(problem, shape)
        padded = np.zeros((-(-shape[0] // 128) * 128, shape[1]), dtype)
        padded[: shape[0]] = x
        if kind[0]:
            q, sf = quantize_blocks(x, (kind[0], 128))
            same_bits(made["q"], q)
            same_bits(made["sf"], sf)
        if kind[1]:
            q, sf = quantize_blocks(np.ascontiguousarray(padded.T), (kind[1], 128))
            same_bits(made["q_t"], q)
            same_bits(made["sf_t"], np.ascontiguousarray(sf.T) if kind[1] == 1 else sf)


def test_quantization_of_matrices_is_of_each(rng: np.random.Generator, same_bits: SameBits) -> None:
    kernel = lower_quantization(Quantization(F32, 1, 128), QuantizationSchedule())
    x = draw((3, 130, 140), np.float32, rng)
    made = interpret_quantization(kernel, {"x": x})
    for i, matrix in enumerate(x):
        for name, array in interpret_quantization(kernel, {"x": matrix}).items():
            same_bits(made[name][i], array)
    assert num_quantization_blocks(kernel, x.shape) == 3 * 2 * 2


def test_what_is_not_finite_makes_its_blocks_so() -> None:
    x = np.ones((2, 300), np.float32)
    x[0, 0], x[0, 130], x[1, 299] = np.nan, np.inf, -np.inf
    for rule in RULES:
        kernel = lower_quantization(Quantization(F32, 1, 0, rule), QuantizationSchedule())
        made = interpret_quantization(kernel, {"x": x})
        scales, codes = made["sf"], made["q"].astype(np.float32)
        assert scales[0, 0].view(np.uint32) == NAN_F32.view(np.uint32)
        assert np.isinf([scales[0, 1], scales[1, 2]]).all()
        assert np.isnan(codes[0, :128]).all()
        assert np.isnan([codes[0, 130], codes[1, 299]]).all()
        assert not codes[0, 131:256].any()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_reciprocal_is_deep_gemms_formula(
    power_of_two: bool, rng: np.random.Generator, same_bits: SameBits
) -> None:
    x = draw((200, 300), np.float32, rng)
    x[:, :128] *= 1e-6
    padded = np.pad(x, ((0, 0), (0, 84))).reshape(200, 3, 128)
    sf = np.maximum(np.abs(padded).max(axis=2), np.float32(1e-4)) * np.float32(1 / 448)
    if power_of_two:
        sf = np.exp2(np.ceil(np.log2(sf.astype(np.float64)))).astype(np.float32)
    codes = padded * (np.float32(1) / sf)[..., None]
    rule = "reciprocal_ue8m0" if power_of_two else "reciprocal"
    kernel = lower_quantization(Quantization(F32, 1, 0, rule), QuantizationSchedule())
    made = interpret_quantization(kernel, {"x": x})
    same_bits(made["sf"], sf)
    same_bits(made["q"], codes.astype(E4M3.numpy).reshape(200, 384)[:, :300].copy())


def fma(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], z: np.ndarray[Any, Any], down: bool = False
) -> np.ndarray[Any, Any]:
    """x * y + z, rounded once to float32, to nearest even or down; exact before, in 64 bits."""
    exact = x.astype(np.longdouble) * y.astype(np.longdouble) + z.astype(np.longdouble)
    rounded = exact.astype(np.float32)
    if down:
        return np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    return rounded


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="longdouble is no wider than double")
def test_quotients_of_bfloat16_are_mended_once_as_the_kernel_does() -> None:
    """All significands of x and amax: `quotient` in quantize_tile.cuh, against a division."""
    significands = np.arange(128, 256).astype(np.float32)
    for exponent in range(27):
        amax, x = np.meshgrid(significands, -significands * np.float32(2.0**-exponent))
        scale = amax / np.float32(448)
        inverse = np.float32(1) / scale
        q = x * inverse
        q = fma(fma(-q, scale, x, down=True), inverse, q)
        assert np.array_equal(q, x / scale)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="longdouble is no wider than double")
def test_quotients_of_float32_are_mended_twice_as_the_kernel_does(rng: np.random.Generator) -> None:
    amax = np.exp(rng.uniform(-30, 30, 10**6)).astype(np.float32)
    scale = amax / np.float32(448)
    inverse = np.float32(1) / scale
    ties = rng.integers(1, 512, 10**6) / 16 * 2.0 ** rng.integers(-6, 4, 10**6)
    near_tie = (ties * scale).astype(np.float32)
    near_tie = np.nextafter(near_tie, rng.choice([0, np.inf], 10**6).astype(np.float32))
    for x in (near_tie, amax * rng.uniform(2**-12, 1, 10**6).astype(np.float32)):
        q = x * inverse
        for _ in range(2):
            q = fma(fma(-q, scale, x, down=True), inverse, q)
        assert np.array_equal(q, x / scale)


@pytest.mark.parametrize("blocks", [((1, 128), (1, 128)), ((1, 128), (128, 128))], ids=str)
def test_quantize_both_of_numpy_and_torch_agree(
    blocks: tuple[tuple[int, int], tuple[int, int]], rng: np.random.Generator, same_bits: SameBits
) -> None:
    for shape in ((130, 70), (2, 128, 140)):
        x = draw(shape, np.float32, rng)
        for got, want in zip(
            jitgen.quantize_both(torch.from_numpy(x), *blocks),
            jitgen.quantize_both(x, *blocks),
            strict=True,
        ):
            same_bits(got[0].view(torch.uint8).numpy(), want[0].view(np.uint8))
            same_bits(got[1].numpy(), want[1])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: jitgen.quantize_both(np.zeros(3, "f")), r"x is \[3\], must be a matrix"),
        (lambda: jitgen.quantize_both(np.full((2, 2), np.inf, "f")), "and finite"),
        (lambda: jitgen.quantize_both(torch.zeros(3)), "must be float32 or bfloat16"),
        (lambda: jitgen.quantize_both(torch.zeros(3, 3).half()), "x is torch.float16"),
        (lambda: jitgen.quantize_both(7), "x is a int, must be an array"),
        (lambda: jitgen.quantize_both(torch.zeros(3, 3), (2, 2)), r"block is \(2, 2\)"),
        (
            lambda: jitgen.quantize_both(torch.zeros(3, 3), (1, 128), 128),  # type: ignore[arg-type]
            "transposed_block is 128",
        ),
    ],
)
def test_quantize_both_rejects(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(jitgen.ProblemError, match=match):
        call()


def test_lower_quantization_rejects_what_breaks_a_rule() -> None:
    for problem, match in (
        (Quantization(jitgen.F16), "x has dtype float16"),
        (Quantization(BF16, 2), "rows = 2 must be 0, 1 or 128"),
        (Quantization(BF16, 1, True), "columns = True"),
        (Quantization(BF16, 0, 0), "nothing would be made"),
        (Quantization(BF16, rule="round"), "rule 'round' must be one of"),  # type: ignore[arg-type]
    ):
        with pytest.raises(jitgen.ProblemError, match=match):
            lower_quantization(problem, QuantizationSchedule())
    with pytest.raises(jitgen.ScheduleError, match=r"raster_group = 0 must be in 1\.\.64"):
        lower_quantization(Quantization(), QuantizationSchedule(0))
    with pytest.raises(jitgen.ScheduleError, match="another family's"):
        lower_any(Quantization(), jitgen.MergeSchedule())


def with_op(kernel: QuantizationKernel, index: int, **fields: Any) -> QuantizationKernel:
    ops = list(kernel.body.body)
    ops[index] = replace(ops[index], **fields)
    return replace(kernel, body=replace(kernel.body, body=tuple(ops)))


def without_op(kernel: QuantizationKernel, *indices: int) -> QuantizationKernel:
    ops = tuple(op for i, op in enumerate(kernel.body.body) if i not in indices)
    return replace(kernel, body=replace(kernel.body, body=ops))


def with_last_twice(kernel: QuantizationKernel) -> QuantizationKernel:
    ops = kernel.body.body
    return replace(kernel, body=replace(kernel.body, body=(*ops, ops[-1])))


def test_verify_rejects_mutations() -> None:
    kernel = lower_quantization(Quantization(BF16, 1, 128), QuantizationSchedule())
    verify(kernel)
    _, q, sf, _, sf_t = kernel.tensors
    kinds = [LoadTile, MakeScales, StoreCodes, Transpose, MakeScales, StoreCodes]
    assert [type(op) for op in kernel.body.body] == kinds
    for made, message in (
        (replace(kernel, tensors=kernel.tensors[:-1]), "takes"),
        (replace(kernel, problem=Quantization(BF16, 3)), "rows = 3"),
        (replace(kernel, body=replace(kernel.body, rows=64)), "a tile must be 128x128"),
        (replace(kernel, num_threads=128), "needs 256 threads"),
        (with_op(kernel, 0, x=q), "must load x"),
        (with_op(kernel, 3, src="tile_t"), "must transpose the tile of x"),
        (with_op(kernel, 3, tile="tile"), "must not be another tile"),
        (with_op(kernel, 1, rows=128), "a block must be 1x128"),
        (with_op(kernel, 1, rule="reciprocal"), "must go by the rule divide"),
        (with_op(kernel, 1, sf=sf_t), "must make sf of the problem"),
        (with_op(kernel, 4, tile="tile"), "must make sf of the problem"),
        (with_op(kernel, 5, tile="tile_u"), "must be of a tile that is there"),
        (with_op(kernel, 5, sf=sf), "its scales must be of this tile"),
        (with_op(kernel, 5, q=q), "must make q_t of the problem"),
        (without_op(kernel, 1), "its scales must be of this tile, made before"),
        (without_op(kernel, 3, 4, 5), "does not make q_t, sf_t"),
        (with_last_twice(kernel), "must be made once"),
    ):
        with pytest.raises(jitgen.VerifyError, match=message):
            verify(made)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_quantization_compiles_and_is_pure(
    kind: tuple[int, int], dtype: jitgen.DType, tmp_path: Path
) -> None:
    for rule in RULES if kind[1] == 0 else RULES[:1]:
        problem = Quantization(dtype, *kind, rule)
        kernel = lower_quantization(problem, QuantizationSchedule())
        source = render(kernel)
        assert source == render(lower_quantization(problem, QuantizationSchedule()))
        assert source.startswith(f"// {problem}\n")
        entry = build(kernel, KernelStore(tmp_path))
        assert entry.resources.spill_bytes == 0
        (again,) = prebuild([(problem, QuantizationSchedule())], root=tmp_path, num_processes=1)
        assert not again.compiled
    assert f"jitgen.Quantization(jitgen.{dtype.short.upper()}, {kind[0]}, {kind[1]}, " in remedy(
        problem, QuantizationSchedule()
    )


def test_kernel_says_what_it_does() -> None:
    kernel = lower_quantization(Quantization(BF16, 1, 1), QuantizationSchedule())
    assert str(kernel.problem) == (
        "quantization of bf16 x[g, m, n] in 1x128 and transposed in 1x128, divide"
    )
    assert "tile_t = transpose(tile)" in str(kernel)
    assert "store q_t = e4m3(tile_t / sf_t)" in str(kernel)

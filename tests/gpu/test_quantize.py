"""Quantizing on the GPU: the interpreter's bits, outputs poisoned and fenced in, in a graph."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

import jitgen
import jitgen.integrations.torch_ops  # registers torch.ops.jitgen
from jitgen import api_quantize
from jitgen.quantization import (
    Quantization,
    QuantizationSchedule,
    interpret_quantization,
    lower_quantization,
    output_shapes,
)
from tests.gpu.draws import to_numpy

KINDS = [(rows, columns) for rows in (0, 1, 128) for columns in (0, 1, 128) if rows or columns]
SHAPES = [
    *((1, 1), (7, 16), (128, 128), (129, 130), (200, 513), (300, 264), (1, 7168), (2, 130, 96)),
    *((640, 2112), (4, 128, 384)),
]
DTYPES = [torch.bfloat16, torch.float32]
FENCE = 64  # bytes before and behind each output


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values of a wide range, with zeros, whole blocks of them, subnormals and values that tie."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, device="cuda", generator=generator)
    x *= torch.exp(4 * torch.randn(shape, device="cuda", generator=generator))
    x[torch.rand(shape, device="cuda", generator=generator) < 0.05] = 0
    x[torch.rand(shape, device="cuda", generator=generator) < 0.02] *= -1e-36
    kind = seed % 4
    if kind == 1:
        x = x.round(decimals=1)
    elif kind == 2:  # amax is 448 or so, and codes lie between two
        x = torch.randint(-57344, 57345, shape, device="cuda", generator=generator) / 128.0
    elif kind == 3:
        x *= 2.0**-100
        x[..., :128] = 0
    return x.to(dtype)


def run_fenced(x: torch.Tensor, problem: Quantization) -> dict[str, np.ndarray[Any, Any]]:
    """What the kernel makes, of memory that held NaN; nothing around it may change."""
    call = api_quantize._prepare(x, problem.rows, problem.columns, problem.rule)
    fences, addresses = {}, [x.data_ptr()]
    for name, shape in output_shapes(problem, tuple(x.shape)).items():
        size = int(np.prod(shape)) * (1 if name.startswith("q") else 4)
        memory = torch.full((size + 2 * FENCE,), 0xFF, dtype=torch.uint8, device="cuda")
        fences[name] = memory, shape
        addresses.append(memory.data_ptr() + FENCE)
    call.launch(tuple(addresses))
    made = {}
    for name, (memory, shape) in fences.items():
        host = memory.cpu().numpy()
        assert (host[:FENCE] == 0xFF).all(), name
        assert (host[len(host) - FENCE :] == 0xFF).all(), name
        inside = host[FENCE : len(host) - FENCE].copy()
        made[name] = inside.view(np.uint8 if name.startswith("q") else np.uint32).reshape(shape)
    return made


def check(x: torch.Tensor, problem: Quantization) -> None:
    kernel = lower_quantization(problem, QuantizationSchedule())
    want = interpret_quantization(kernel, {"x": to_numpy(x.contiguous())})
    got = run_fenced(x, problem)
    again = run_fenced(x, problem)
    assert list(got) == list(want)
    for name, bits in got.items():
        expected = want[name].view(bits.dtype)
        bad = np.argwhere(bits != expected)
        assert len(bad) == 0, (str(problem), name, tuple(x.shape), len(bad), bad[:3])
        assert np.array_equal(bits, again[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_quantization_has_the_interpreters_bits(kind: tuple[int, int], dtype: torch.dtype) -> None:
    name = jitgen.BF16 if dtype == torch.bfloat16 else jitgen.F32
    for seed, shape in enumerate(SHAPES):
        check(draw(shape, dtype, seed), Quantization(name, *kind))


@pytest.mark.parametrize("rule", ["reciprocal", "reciprocal_ue8m0"])
@pytest.mark.parametrize("rows", [1, 128])
def test_quantization_by_reciprocals_has_the_interpreters_bits(rows: int, rule: Any) -> None:
    for seed, shape in enumerate(SHAPES):
        check(draw(shape, torch.bfloat16, seed), Quantization(jitgen.BF16, rows, 0, rule))


def test_quantization_of_what_is_not_finite_has_the_interpreters_bits() -> None:
    generator = random.Random(3)
    for dtype in DTYPES:
        x = draw((200, 300), dtype, 0)
        for value in (float("nan"), float("inf"), -float("inf")):
            x[generator.randrange(200), generator.randrange(300)] = value
        name = jitgen.BF16 if dtype == torch.bfloat16 else jitgen.F32
        for kind in KINDS:
            check(x, Quantization(name, *kind))


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (1, 64)], ids=str)
def test_quantize_has_numpys_bits_of_any_strides(block: tuple[int, int]) -> None:
    whole = draw((300, 700), torch.bfloat16, 2)
    for x in (whole, whole[:, 3:260], whole[::2, 8:264], whole.t(), whole[:, ::3], whole[:0]):
        codes, scales = jitgen.quantize(x, block)
        want, want_scales = jitgen.quantize(to_numpy(x.contiguous()), block)
        assert np.array_equal(to_numpy(codes).view(np.uint8), want.view(np.uint8))
        assert np.array_equal(to_numpy(scales), want_scales)


@pytest.mark.parametrize("blocks", [(1, 1), (1, 128), (128, 128)], ids=str)
def test_quantize_both_is_quantize_of_both(blocks: tuple[int, int]) -> None:
    x = draw((2, 200, 320), torch.bfloat16, 5)
    codes, scales, codes_t, scales_t = torch.ops.jitgen.quantize_both(x, *blocks)
    for i, matrix in enumerate(x):
        padded = torch.nn.functional.pad(matrix, (0, 0, 0, 56)).t().contiguous()
        for got, given, rows in (
            ((codes[i], scales[i]), matrix, blocks[0]),
            ((codes_t[i], scales_t[i]), padded, blocks[1]),
        ):
            want = jitgen.quantize(given, (rows, 128))
            assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))
            assert torch.equal(got[1], want[1])


def test_quantize_both_in_a_graph_equals_eager() -> None:
    x = draw((500, 768), torch.bfloat16, 1)
    jitgen.quantize_both(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.jitgen.quantize_both(x)
    x.copy_(draw((500, 768), torch.bfloat16, 2))
    graph.replay()
    for got, want in zip(captured, torch.ops.jitgen.quantize_both(x), strict=True):
        assert got.stride() == want.stride()
        same = (to_numpy(got) == to_numpy(want)).all()
        assert same

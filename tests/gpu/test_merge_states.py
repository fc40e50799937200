"""Merging attention results on the GPU: against the interpreter, poisoned, repeated, in a graph."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import jitgen
from tests.gpu.draws import to_numpy


def draw(b: int, s_q: int, h_q: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two results on the GPU; some rows have no keys, and NaN for their o."""
    generator = torch.Generator("cuda").manual_seed(b + columns)
    given = []
    for empty in (math.inf, -math.inf):
        o = torch.randn(b, s_q, h_q, columns, device="cuda", generator=generator)
        lse = 8 * torch.randn(b, h_q, s_q, device="cuda", generator=generator)
        none = torch.rand(b, h_q, s_q, device="cuda", generator=generator) < 0.2
        lse[none] = empty
        o[none.transpose(1, 2)] = math.nan
        given += [o.to(dtype), lse]
    return given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 1, 512), (7, 2, 16, 512), (130, 3, 5, 256), (3, 1, 9, 8)])
def test_small_merge_equals_interpreter_within_a_step(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    given = draw(*shape, dtype)
    o, lse = jitgen.merge_states(*given)
    want, want_lse = jitgen.merge_states(*map(to_numpy, given))
    step = 2**-22 if dtype == torch.float32 else torch.finfo(dtype).eps
    got = to_numpy(o).astype(np.float64)
    np.testing.assert_allclose(got, want.astype(np.float64), rtol=step, atol=1e-6)
    np.testing.assert_allclose(lse.cpu().numpy(), want_lse, rtol=2e-6, atol=2e-6)
    again = jitgen.merge_states(*given)
    assert torch.equal(again[0], o)
    assert torch.equal(again[1], lse)


def test_merge_states_in_a_graph_equals_eager() -> None:
    given = draw(4, 2, 16, 512, torch.bfloat16)
    jitgen.merge_states(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = jitgen.merge_states(*given)
    for tensor, other in zip(given, draw(4, 2, 16, 512, torch.bfloat16), strict=True):
        tensor.copy_(other.flip(0))
    graph.replay()
    want = jitgen.merge_states(*given)
    assert torch.equal(o, want[0])
    assert torch.equal(lse, want[1])


def test_merge_states_of_nothing() -> None:
    o, lse = jitgen.merge_states(*draw(0, 1, 16, 512, torch.bfloat16))
    assert o.shape == (0, 1, 16, 512)
    assert lse.shape == (0, 16, 1)

"""torch.ops.jitgen on the GPU: the bits of jitgen.gemm, torch.compile, CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import jitgen  # noqa: E402
from jitgen import Schedule, acc, vector  # noqa: E402
from jitgen.errors import CaptureError  # noqa: E402
from jitgen.integrations import torch_ops  # noqa: E402,F401

N, K = 576, 1536


def make(m: int, n: int = N, k: int = K) -> tuple[Any, ...]:
    a, sfa = jitgen.quantize(torch.randn(m, k, device="cuda"))
    b, sfb = jitgen.quantize(torch.randn(n, k, device="cuda"), (128, 128))
    return a, b, sfa, sfb


@pytest.mark.parametrize("m", [1, 65, 1000])
def test_gemm_gives_the_bits_of_jitgen_gemm(m: int) -> None:
    a, b, sfa, sfb = make(m)
    bias = torch.randn(N, device="cuda").bfloat16()
    expected = jitgen.gemm(a, b, (sfa, sfb), epilogue=(acc + vector("bias")).bind(bias=bias))
    d = torch.ops.jitgen.gemm(a, b, sfa, sfb, bias=bias)
    assert torch.equal(d, expected)
    out = torch.full_like(d, torch.nan)
    torch.ops.jitgen.gemm_out(a, b, sfa, sfb, out=out, bias=bias)
    assert torch.equal(out, expected)


def test_operators_pass_opcheck() -> None:
    t = make(33)
    tests = ["test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
    for function, arguments, options in (
        (torch.ops.jitgen.gemm, t, {}),
        (torch.ops.jitgen.gemm_out, t, {"out": torch.zeros(33, N, device="cuda")}),
        (torch.ops.jitgen.quantize, (torch.randn(33, K, device="cuda"),), {}),
    ):
        results = torch.library.opcheck(function, arguments, options, test_utils=tests)
        assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gemm_takes_any_m_without_a_break(backend: str) -> None:
    _, b, _, sfb = make(1)
    bias = torch.randn(N, device="cuda").bfloat16()

    def layer(x: torch.Tensor) -> torch.Tensor:
        a, sfa = torch.ops.jitgen.quantize(x)
        d = torch.ops.jitgen.gemm(a, b, sfa, sfb, bias=bias, activation="relu")
        return d.float() * 2

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for m in (7, 64, 333):
        x = torch.randn(m, K, device="cuda")
        try:
            got = compiled(x)
        except torch._inductor.exc.InductorError as error:  # no Triton or no host compiler here
            pytest.skip(str(error)[:200])
        assert torch.equal(got, layer(x)), m


def test_cold_kernel_during_capture_is_an_error_and_the_capture_goes_on() -> None:
    a, b, sfa, sfb = make(129)
    warm, cold = Schedule(64, 96, 4, 1), Schedule(64, 80, 3, 1)
    expected = jitgen.gemm(a, b, (sfa, sfb), schedule=warm)
    out = torch.full_like(expected, torch.nan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(CaptureError, match="make the call once before the capture"):
            jitgen.gemm(a, b, (sfa, sfb), schedule=cold)
        jitgen.gemm(a, b, (sfa, sfb), out=out, schedule=warm)
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(jitgen.gemm(a, b, (sfa, sfb), schedule=cold), expected)


def make_grouped(m: int, num_groups: int = 4) -> tuple[Any, ...]:
    """a, b, sfa, sfb, and offsets that leave one group empty."""
    a, _, sfa, _ = make(m)
    weights = [make(1)[1::2] for _ in range(num_groups)]
    b, sfb = (torch.stack(parts) for parts in zip(*weights, strict=True))
    offsets = torch.tensor([0, m // 3, m // 3, m - 1, m], dtype=torch.int32, device="cuda")
    return a, b, sfa, sfb, offsets


def make_cache(num_heads: int = 16, num_queries: int = 1) -> tuple[torch.Tensor, ...]:
    """q, kv_cache, block_table and seqlens_k."""
    q = torch.randn(3, num_queries, num_heads, 576, device="cuda").bfloat16()
    cache = torch.randn(96, 64, 1, 576, device="cuda").bfloat16()
    table = torch.randperm(96, device="cuda", dtype=torch.int32).view(3, 32)
    return q, cache, table, torch.tensor([2000, 0, 65], dtype=torch.int32, device="cuda")


def make_sparse() -> tuple[torch.Tensor, ...]:
    """q, an FP8 cache and indices."""
    cache = jitgen.quantize_mla_cache(torch.randn(9, 64, 1, 576, device="cuda").bfloat16())
    indices = torch.randint(-1, 9 * 64, (3, 2, 128), dtype=torch.int32, device="cuda")
    return torch.randn(3, 2, 64, 576, device="cuda").bfloat16(), cache, indices


@pytest.mark.parametrize("m", [4, 1000])
def test_grouped_gemm_gives_the_bits_of_jitgen(m: int) -> None:
    a, b, sfa, sfb, offsets = t = make_grouped(m)
    expected = jitgen.grouped_gemm(a, b, (sfa, sfb), layout=jitgen.Ragged(offsets))
    assert torch.equal(torch.ops.jitgen.grouped_gemm(*t, layout="ragged"), expected)
    out = torch.full_like(expected, torch.nan)
    torch.ops.jitgen.grouped_gemm_out(*t, layout="ragged", out=out)
    assert torch.equal(out, expected)


def test_mla_decode_gives_the_bits_of_jitgen() -> None:
    sparse = make_sparse()
    for got, expected in zip(
        torch.ops.jitgen.mla_decode_sparse(*sparse), jitgen.mla_decode_sparse(*sparse), strict=True
    ):
        assert torch.equal(got, expected)
    t = make_cache()
    o, lse = jitgen.mla_decode(*t)
    got = torch.ops.jitgen.mla_decode(*t)
    assert torch.equal(got[0], o)
    assert torch.equal(got[1], lse)
    out = torch.full_like(o, torch.nan)
    assert torch.equal(torch.ops.jitgen.mla_decode_out(*t, out=out), lse)
    assert torch.equal(out, o)


def test_grouped_swiglu_gives_the_bits_of_jitgen() -> None:
    a, sfa = jitgen.quantize(torch.randn(200, 512, device="cuda"))
    b, sfb = jitgen.quantize(torch.randn(3 * 512, 512, device="cuda"), (128, 128))
    b, sfb = b.view(3, 512, 512), sfb.view(3, 4, 4)
    offsets = torch.tensor([0, 7, 7, 200], dtype=torch.int32, device="cuda")
    d, sfd = torch.ops.jitgen.grouped_swiglu(a, b, sfa, sfb, offsets, layout="ragged")
    want, scales = jitgen.grouped_gemm(
        *(a, b, (sfa, sfb)),
        layout=jitgen.Ragged(offsets),
        out_dtype=torch.float8_e4m3fn,
        epilogue=jitgen.silu(jitgen.gate) * jitgen.up,
    )
    assert torch.equal(d.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(sfd, scales)


def test_grouped_gemm_and_mla_decode_pass_opcheck() -> None:
    t, cache = make_grouped(33), make_cache()
    tests = ["test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
    o = torch.zeros(3, 1, 16, 512, device="cuda").bfloat16()
    for function, arguments, options in (
        (torch.ops.jitgen.grouped_gemm, t, {"layout": "ragged"}),
        (
            torch.ops.jitgen.grouped_gemm_out,
            t,
            {"layout": "ragged", "out": torch.zeros(33, N, device="cuda")},
        ),
        (torch.ops.jitgen.mla_decode, cache, {}),
        (torch.ops.jitgen.mla_decode_sparse, make_sparse(), {}),
        (torch.ops.jitgen.mla_decode_out, cache, {"out": o}),
    ):
        results = torch.library.opcheck(function, arguments, options, test_utils=tests)
        assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_experts_and_attention_take_any_m(mode: str) -> None:
    _, b, _, sfb, _ = make_grouped(9)

    def layer(x: torch.Tensor, offsets: torch.Tensor, *cache: torch.Tensor) -> Any:
        a, sfa = torch.ops.jitgen.quantize(x)
        d = torch.ops.jitgen.grouped_gemm(a, b, sfa, sfb, offsets, layout="ragged")
        o, _ = torch.ops.jitgen.mla_decode(*cache)
        return d.float() * 2, o + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, mode=mode, fullgraph=True, dynamic=mode == "default")
    cache = make_cache()
    # CUDA graphs are of one m: the first calls warm up and capture, the last ones replay.
    for m in (7, 64, 333) if mode == "default" else (64,) * 5:
        x, offsets = torch.randn(m, K, device="cuda"), make_grouped(m)[-1]
        expected = layer(x, offsets, *cache)
        try:
            got = compiled(x, offsets, *cache)
        except torch._inductor.exc.InductorError as error:  # no Triton or no host compiler here
            pytest.skip(str(error)[:200])
        assert torch.equal(got[0], expected[0]), m
        assert torch.equal(got[1], expected[1]), m


def test_captured_operators_replay_with_what_the_tensors_hold() -> None:
    t, cache, x = make_grouped(300), make_cache(), torch.randn(9, K, device="cuda")

    def call() -> tuple[torch.Tensor, ...]:
        o, _ = torch.ops.jitgen.mla_decode(*cache)
        _, scales = torch.ops.jitgen.quantize(x)
        return torch.ops.jitgen.grouped_gemm(*t, layout="ragged"), o, scales

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for lengths, ends in (([1, 2, 3], [5, 5, 200, 300]), ([2048, 64, 0], [0, 300, 300, 300])):
        cache[3].copy_(torch.tensor(lengths))
        t[4][1:].copy_(torch.tensor(ends))
        x.normal_()
        for got in captured:
            got.fill_(torch.nan)
        graph.replay()
        for got, expected in zip(captured, call(), strict=True):
            assert torch.equal(got, expected)

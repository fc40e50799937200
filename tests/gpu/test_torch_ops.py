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

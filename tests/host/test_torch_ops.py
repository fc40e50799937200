"""torch.ops.jitgen on CPU tensors, where the interpreter runs them; tests/gpu has the rest."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import jitgen  # noqa: E402
from jitgen.errors import ProblemError  # noqa: E402
from jitgen.integrations import torch_ops  # noqa: E402

M, N, K = 5, 72, 272


def make(m: int = M, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(torch.initial_seed() + seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    a, sfa = jitgen.quantize(normal(m, K))
    b, sfb = jitgen.quantize(normal(N, K), (128, 128))
    return {
        "a": a,
        "b": b,
        "sfa": sfa,
        "sfb": sfb,
        "bias": normal(N).bfloat16(),
        "residual": normal(m, N),
    }


def operands(t: dict[str, Any]) -> tuple[Any, ...]:
    return t["a"], t["b"], t["sfa"], t["sfb"]


def reference(t: dict[str, Any], activation: str = "none") -> torch.Tensor:
    """In float64, from the quantized values."""

    def dequantized(q: torch.Tensor, scale: torch.Tensor, rows: int) -> torch.Tensor:
        spread = scale.double().repeat_interleave(rows, 0).repeat_interleave(128, 1)
        return q.double() * spread[: q.shape[0], : q.shape[1]]

    d = dequantized(t["a"], t["sfa"], 1) @ dequantized(t["b"], t["sfb"], 128).t() + t["bias"]
    return getattr(torch.nn.functional, activation, lambda x: x)(d) + t["residual"]


@pytest.mark.parametrize("activation", torch_ops.ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gemm_computes_the_epilogue(activation: str, out_dtype: torch.dtype) -> None:
    t = make()
    epilogue = {"bias": t["bias"], "residual": t["residual"], "activation": activation}
    d = torch.ops.jitgen.gemm(*operands(t), **epilogue, out_dtype=out_dtype)
    assert (d.dtype, d.shape) == (out_dtype, (M, N))
    # FP8 wgmma keeps 13 fraction bits of a sum over a K block of 128.
    expected = reference(t, activation)
    error = (d.double() - expected).abs().max() / expected.abs().max()
    assert error < 2**-7
    out = torch.full((M, N), torch.nan, dtype=out_dtype)
    torch.ops.jitgen.gemm_out(*operands(t), out=out, **epilogue)
    assert torch.equal(out, d)


def test_gemm_gives_the_bits_of_numpy() -> None:
    t = make()
    arrays = {name: torch_ops._to_numpy(t[name]) for name in ("a", "b", "sfa", "sfb")}
    expected = jitgen.gemm(arrays["a"], arrays["b"], (arrays["sfa"], arrays["sfb"]))
    got = torch_ops._to_numpy(torch.ops.jitgen.gemm(*operands(t)))
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("rows", [1, 128])
def test_quantize_is_that_of_jitgen(rows: int) -> None:
    x = torch.randn(200, K)
    for got, expected in zip(
        torch.ops.jitgen.quantize(x, rows), jitgen.quantize(x, (rows, 128)), strict=True
    ):
        assert torch.equal(got.float(), expected.float())


def test_gemm_rejects_unknown_activation() -> None:
    with pytest.raises(
        ProblemError, match="activation 'tanh' must be one of none, relu, gelu, silu"
    ):
        torch.ops.jitgen.gemm(*operands(make()), activation="tanh")


def test_operators_pass_opcheck() -> None:
    t = make()
    epilogue = {"bias": t["bias"], "residual": t["residual"], "activation": "silu"}
    for function, arguments, options in (
        (torch.ops.jitgen.gemm, operands(t), {}),
        (torch.ops.jitgen.gemm, operands(t), {**epilogue, "out_dtype": torch.float32}),
        (torch.ops.jitgen.gemm_out, operands(t), {"out": torch.zeros(M, N), **epilogue}),
        (torch.ops.jitgen.quantize, (torch.randn(M, K),), {}),
        (torch.ops.jitgen.quantize, (torch.randn(M, K).bfloat16(), 128), {}),
    ):
        # test_schema compares inputs in a way that torch has not for FP8; see the next test.
        tests = ["test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
        if function is torch.ops.jitgen.quantize:
            tests.append("test_schema")
        results = torch.library.opcheck(function, arguments, options, test_utils=tests)
        assert set(results.values()) == {"SUCCESS"}, results


def test_gemm_writes_what_its_schema_says() -> None:
    t = make()
    before = {name: torch_ops._to_numpy(tensor).copy() for name, tensor in t.items()}
    out = torch.full((M, N), torch.nan)
    for _ in range(2):
        d = torch.ops.jitgen.gemm(*operands(t), bias=t["bias"], residual=t["residual"])
        torch.ops.jitgen.gemm_out(*operands(t), out=out, bias=t["bias"], residual=t["residual"])
    assert not out.isnan().any()
    for name, tensor in t.items():
        assert torch_ops._to_numpy(tensor).tobytes() == before[name].tobytes()
        assert d.data_ptr() != tensor.data_ptr()


def test_compiled_gemm_has_no_graph_break_and_takes_any_m() -> None:
    t = make()

    def layer(x: torch.Tensor) -> torch.Tensor:
        a, sfa = torch.ops.jitgen.quantize(x)
        d = torch.ops.jitgen.gemm(a, t["b"], sfa, t["sfb"], bias=t["bias"], activation="relu")
        return d.float() * 2

    num_graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    compiled = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    for m in (7, 5, 64, 130):  # the first is no other extent, or it would be taken for that
        x = torch.randn(m, K)
        assert torch.equal(compiled(x), layer(x)), m
    assert num_graphs == 1

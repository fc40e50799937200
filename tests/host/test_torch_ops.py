"""torch.ops.jitgen on CPU tensors, where the interpreter runs them; tests/gpu has the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jitgen  # noqa: E402
from jitgen.errors import ProblemError  # noqa: E402
from jitgen.integrations import torch_arguments, torch_ops  # noqa: E402,F401
from jitgen.integrations.tensors import to_numpy  # noqa: E402

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


@pytest.mark.parametrize("activation", torch_arguments.ACTIVATIONS)
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
    arrays = {name: to_numpy(t[name]) for name in ("a", "b", "sfa", "sfb")}
    expected = jitgen.gemm(arrays["a"], arrays["b"], (arrays["sfa"], arrays["sfb"]))
    got = to_numpy(torch.ops.jitgen.gemm(*operands(t)))
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
        (torch.ops.jitgen.quantize_both, (torch.randn(M, K),), {}),
        (torch.ops.jitgen.quantize_both, (torch.randn(2, M, K).bfloat16(), 1, 128), {}),
        (torch.ops.jitgen.quantize_both, (torch.randn(M, K), 128, 128), {}),
    ):
        # test_schema compares inputs in a way that torch has not for FP8; see the next test.
        tests = ["test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
        if function in (torch.ops.jitgen.quantize, torch.ops.jitgen.quantize_both):
            tests.append("test_schema")
        results = torch.library.opcheck(function, arguments, options, test_utils=tests)
        assert set(results.values()) == {"SUCCESS"}, results


def test_gemm_writes_what_its_schema_says() -> None:
    t = make()
    before = {name: to_numpy(tensor).copy() for name, tensor in t.items()}
    out = torch.full((M, N), torch.nan)
    for _ in range(2):
        d = torch.ops.jitgen.gemm(*operands(t), bias=t["bias"], residual=t["residual"])
        torch.ops.jitgen.gemm_out(*operands(t), out=out, bias=t["bias"], residual=t["residual"])
    assert not out.isnan().any()
    for name, tensor in t.items():
        assert to_numpy(tensor).tobytes() == before[name].tobytes()
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


# --- grouped GEMM ---------------------------------------------------------------------------------

G, MAX_M = 3, 6
LAYOUTS = {  # of rows 0..2, none, 3..4 or, masked, so many of each group
    "ragged": [0, 3, 3, 5],
    "group_of_row": [0, 0, 0, 2, 2],
    "group_ends": [3, 3, 5],
    "masked": [3, 0, 2],
}


def make_grouped(layout: str) -> tuple[torch.Tensor, ...]:
    """a, b, sfa, sfb and groups."""
    shape = (G, MAX_M) if layout == "masked" else (M,)
    a, sfa = jitgen.quantize(torch.randn(MAX_M * G if layout == "masked" else M, K))
    weights = [jitgen.quantize(torch.randn(N, K), (128, 128)) for _ in range(G)]
    b, sfb = (torch.stack(parts) for parts in zip(*weights, strict=True))
    groups = torch.tensor(LAYOUTS[layout], dtype=torch.int32)
    return a.view(*shape, K), b, sfa.view(*shape, -1), sfb, groups


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_gemm_is_the_gemm_of_each_group(layout: str) -> None:
    a, b, sfa, sfb, _ = t = make_grouped(layout)
    bias = torch.randn(G, N).bfloat16()
    options = {"layout": layout, "alignment": 1, "bias": bias, "activation": "silu"}
    out = torch.full((*a.shape[:-1], N), torch.nan).bfloat16()
    torch.ops.jitgen.grouped_gemm_out(*t, out=out, **options)
    d = torch.ops.jitgen.grouped_gemm(*t, **options)
    assert d.shape == out.shape
    owned = torch.zeros(d.shape[:-1], dtype=torch.bool)
    for group, (begin, end) in {0: (0, 3), 2: (3, 5)}.items():
        rows = (group, slice(0, end - begin)) if layout == "masked" else slice(begin, end)
        owned[rows] = True
        expected = torch.ops.jitgen.gemm(
            *(a[rows], b[group], sfa[rows], sfb[group]), bias=bias[group], activation="silu"
        )
        assert torch.equal(d[rows], expected)
    assert torch.equal(out[owned], d[owned])
    assert out[~owned].isnan().all()


def make_k_grouped() -> tuple[torch.Tensor, ...]:
    """a, b, sfa, sfb and offsets of two groups of k, with an empty one between them."""
    a, sfa = jitgen.quantize(torch.randn(M, 384))
    b, sfb = jitgen.quantize(torch.randn(N, 384))
    return a, b, sfa, sfb, torch.tensor([0, 256, 256, 384], dtype=torch.int32)


def make_gated() -> tuple[torch.Tensor, ...]:
    """a, b, sfa, sfb and offsets of two groups, whose B have 128 rows of gate and 128 of up."""
    a, sfa = jitgen.quantize(torch.randn(M, 128))
    b, sfb = jitgen.quantize(torch.randn(512, 128), (128, 128))
    offsets = torch.tensor([0, 3, M], dtype=torch.int32)
    return a, b.view(2, 256, 128), sfa, sfb.view(2, 2, 1), offsets


def test_grouped_swiglu_is_the_fused_grouped_gemm() -> None:
    *t, offsets = make_gated()
    d, sfd = torch.ops.jitgen.grouped_swiglu(*t, offsets, layout="ragged")
    a, b, sfa, sfb = map(to_numpy, t)
    want, scales = jitgen.grouped_gemm(
        *(a, b, (sfa, sfb)),
        layout=jitgen.Ragged(offsets.numpy()),
        out_dtype="float8_e4m3fn",
        epilogue=jitgen.silu(jitgen.gate) * jitgen.up,
    )
    assert (d.dtype, d.shape, sfd.shape) == (torch.float8_e4m3fn, (M, 128), (M, 1))
    assert np.array_equal(to_numpy(d).view(np.uint8), want.view(np.uint8))
    assert np.array_equal(sfd.numpy(), scales)


def test_k_grouped_gemm_is_added_to_out() -> None:
    a, b, sfa, sfb, _ = t = make_k_grouped()
    d = torch.ops.jitgen.grouped_gemm(*t, layout="k_grouped")
    assert (d.dtype, d.shape) == (torch.float32, (3, M, N))
    out = torch.ones(3, M, N)
    torch.ops.jitgen.grouped_gemm_out(*t, layout="k_grouped", out=out)
    exact_a = a.double() * sfa.repeat_interleave(128, 1)
    exact_b = b.double() * sfb.repeat_interleave(128, 1)
    for group, ks in enumerate((slice(0, 256), slice(0, 0), slice(256, 384))):
        exact = exact_a[:, ks] @ exact_b[:, ks].t()
        tolerance = 2**-9 * max(float(exact.abs().max()), 1)
        assert torch.allclose(d[group].double(), exact, atol=tolerance)
        assert torch.allclose(out[group].double(), exact + 1, atol=tolerance)


def test_grouped_gemm_rejects_unknown_layout() -> None:
    with pytest.raises(ProblemError, match="layout 'rows' must be one of ragged, group_of_row"):
        torch.ops.jitgen.grouped_gemm(*make_grouped("ragged"), layout="rows")


# --- MLA decode -----------------------------------------------------------------------------------

LENGTHS = (3, 0, 17)


def make_cache(num_heads: int = 2, num_queries: int = 2) -> tuple[torch.Tensor, ...]:
    """q, kv_cache, block_table and seqlens_k."""
    q = torch.randn(len(LENGTHS), num_queries, num_heads, 320).bfloat16()
    table = torch.tensor([[2, 9], [9, 9], [0, 3]], dtype=torch.int32)
    cache = torch.randn(4, 16, 1, 320).bfloat16()
    return q, cache, table, torch.tensor(LENGTHS, dtype=torch.int32)


@pytest.mark.parametrize("causal", [False, True])
def test_mla_decode_is_attention(causal: bool) -> None:
    q, cache, table, _ = t = make_cache()
    options = {"head_dim_v": 256, "softmax_scale": 0.1, "causal": causal}
    o, lse = torch.ops.jitgen.mla_decode(*t, **options)
    assert (o.dtype, o.shape, lse.dtype) == (q.dtype, (3, 2, 2, 256), torch.float32)
    for row, length in enumerate(LENGTHS):
        pages = table[row, : -(-length // 16)].long()
        keys = cache[pages].reshape(-1, 320)[:length].double()
        scores = torch.einsum("shd,kd->hsk", q[row].double(), keys) * 0.1
        if causal and length:
            scores[:, 0, length - 1] = -torch.inf
        if length == 0:
            assert (o[row] == 0).all()
            assert (lse[row] == torch.inf).all()
            continue
        expected = torch.einsum("hsk,kd->shd", scores.softmax(-1), keys[:, :256])
        assert torch.allclose(o[row].double(), expected, atol=2**-6, rtol=2**-6)
        assert torch.allclose(lse[row].double(), scores.logsumexp(-1), atol=1e-4)
    out = torch.full_like(o, torch.nan)
    assert torch.equal(torch.ops.jitgen.mla_decode_out(*t, out=out, **options), lse)
    assert torch.equal(out, o)


def make_sparse() -> tuple[torch.Tensor, ...]:
    """q, an FP8 cache and indices."""
    cache = jitgen.quantize_mla_cache(torch.randn(2, 16, 1, 576).bfloat16())
    indices = torch.randint(-1, 32, (3, 1, 9), dtype=torch.int32)
    return torch.randn(3, 1, 2, 576).bfloat16(), cache, indices


def test_sparse_mla_decode_gives_the_bits_of_numpy() -> None:
    t, sink = make_sparse(), torch.randn(2)
    lengths = torch.tensor([9, 4, 0], dtype=torch.int32)
    got = torch.ops.jitgen.mla_decode_sparse(*t, topk_length=lengths, attention_sink=sink)
    expected = jitgen.mla_decode_sparse(
        *map(to_numpy, t), topk_length=to_numpy(lengths), attention_sink=to_numpy(sink)
    )
    for tensor, array in zip(got, expected, strict=True):
        assert to_numpy(tensor).tobytes() == array.tobytes()


def test_grouped_gemm_and_mla_decode_pass_opcheck() -> None:
    tests = ["test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
    t, small = make_grouped("ragged"), {"head_dim_v": 256}
    for function, arguments, options in (
        (torch.ops.jitgen.grouped_gemm, t, {"layout": "ragged"}),
        (torch.ops.jitgen.grouped_gemm_out, t, {"layout": "ragged", "out": torch.zeros(M, N)}),
        (torch.ops.jitgen.grouped_gemm, make_k_grouped(), {"layout": "k_grouped"}),
        (
            torch.ops.jitgen.grouped_gemm,
            (*make_k_grouped()[:4], torch.tensor([0, 128, 384], dtype=torch.int32)),
            {"layout": "k_grouped", "out_dtype": torch.bfloat16},
        ),
        (torch.ops.jitgen.grouped_swiglu, make_gated(), {"layout": "ragged"}),
        (torch.ops.jitgen.mla_decode, make_cache(), small),
        (torch.ops.jitgen.mla_decode_sparse, make_sparse(), {"attention_sink": torch.randn(2)}),
        (
            torch.ops.jitgen.mla_decode_out,
            make_cache(),
            {"out": torch.zeros(3, 2, 2, 256).bfloat16(), **small},
        ),
    ):
        # test_schema compares inputs in a way that torch has not for FP8; MLA decode takes none.
        schema = ["test_schema"] * (function is torch.ops.jitgen.mla_decode)
        results = torch.library.opcheck(function, arguments, options, test_utils=tests + schema)
        assert set(results.values()) == {"SUCCESS"}, results


def test_compiled_experts_and_attention_take_any_m() -> None:
    _, b, _, sfb, _ = make_grouped("ragged")

    def layer(
        x: torch.Tensor, offsets: torch.Tensor, cache: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a, sfa = torch.ops.jitgen.quantize(x)
        d = torch.ops.jitgen.grouped_gemm(a, b, sfa, sfb, offsets, layout="ragged")
        o, _ = torch.ops.jitgen.mla_decode(*cache, head_dim_v=256)
        return d.float() * 2, o + 1

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    cache = make_cache()
    for m in (7, 5, 40):
        x, offsets = torch.randn(m, K), torch.tensor([0, 2, 2, m], dtype=torch.int32)
        for got, expected in zip(
            compiled(x, offsets, cache), layer(x, offsets, cache), strict=True
        ):
            assert torch.equal(got, expected), m

"""The peers' interfaces on the GPU: against float64, in place, and the names a profiler shows."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from jitgen import control  # noqa: E402
from jitgen.compat import deep_gemm, flash_mla  # noqa: E402

N, K, G = 1024, 1536, 4


def activations(*shape: int) -> tuple[Any, Any, Any]:
    """The values, and codes and scales of them."""
    x = torch.randn(*shape, K, device="cuda").bfloat16()
    codes, scales = deep_gemm.per_token_cast_to_fp8(x.view(-1, K), use_ue8m0=False)
    return x, codes.view(x.shape), scales.view(*shape, -1)


def weights() -> tuple[Any, Any, Any]:
    x = torch.randn(G, N, K, device="cuda").bfloat16()
    cast = [deep_gemm.per_block_cast_to_fp8(part, use_ue8m0=False) for part in x]
    return x, *(torch.stack(parts) for parts in zip(*cast, strict=True))


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - cosine, of both as one vector."""
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


@pytest.mark.parametrize("m", [1, 100, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gemm_adds_c_in_place(m: int, dtype: Any) -> None:
    (x, *a), (w, *b) = activations(m), weights()
    d = torch.full((m, N), torch.nan, device="cuda", dtype=dtype)
    deep_gemm.fp8_gemm_nt(a, (b[0][0], b[1][0]), d)
    exact = x.double() @ w[0].double().t()
    assert difference(d, exact) < 1e-3
    c = torch.randn_like(d) * 32
    d.copy_(c)
    deep_gemm.fp8_gemm_nt(a, (b[0][0], b[1][0]), d, c=d)
    assert difference(d, exact + c) < 1e-3


@pytest.mark.parametrize("use_psum_layout", [False, True])
def test_contiguous_meets_float64(use_psum_layout: bool) -> None:
    (x, *a), (w, *b) = activations(6 * 128), weights()
    ends, group_of_row = [100, 400, 400, 700], torch.full((6 * 128,), -1, dtype=torch.int32)
    spans = {0: (0, 128), 1: (128, 512), 3: (512, 768)}
    for group, (begin, _) in spans.items():
        group_of_row[begin : ends[group]] = group
    layout = torch.tensor([100, 400, 400, 700], dtype=torch.int32)
    d = torch.full((6 * 128, N), torch.nan, device="cuda", dtype=torch.bfloat16)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        *(a, b, d, (layout if use_psum_layout else group_of_row).cuda()),
        use_psum_layout=use_psum_layout,
    )
    for group, (begin, end) in spans.items():
        rows = slice(begin, ends[group] if use_psum_layout else end)
        assert difference(d[rows], x[rows].double() @ w[group].double().t()) < 1e-3


def test_masked_meets_float64_and_leaves_the_rest() -> None:
    (x, *a), (w, *b) = activations(G, 256), weights()
    counts = [256, 0, 1, 77]
    d = torch.full((G, 256, N), torch.nan, device="cuda", dtype=torch.bfloat16)
    masked_m = torch.tensor(counts, dtype=torch.int32, device="cuda")
    deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, masked_m, 80)
    for group, count in enumerate(counts):
        assert d[group, count:].isnan().all()
        if count:
            exact = x[group, :count].double() @ w[group].double().t()
            assert difference(d[group, :count], exact) < 1e-3


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_decode_of_several_heads_meets_float64(num_kv_heads: int) -> None:
    lengths, num_heads = (1000, 0, 64), 6
    q = torch.randn(3, 2, num_heads, 576, device="cuda").bfloat16()
    cache = torch.randn(48, 64, num_kv_heads, 576, device="cuda").bfloat16()
    table = torch.randperm(48, device="cuda", dtype=torch.int32).view(3, 16)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    metadata, num_splits = flash_mla.get_mla_metadata()
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, cache, table, seqlens, 512, metadata, num_splits, causal=True
    )
    for row, length in enumerate(lengths):
        if length == 0:
            assert (out[row] == 0).all()
            assert (lse[row] == torch.inf).all()
            continue
        keys = cache[table[row].long()].reshape(-1, num_kv_heads, 576)[:length].double()
        keys = keys.repeat_interleave(num_heads // num_kv_heads, dim=1)
        scores = torch.einsum("shd,khd->hsk", q[row].double(), keys) * 576**-0.5
        scores[:, 0, length - 1] = -torch.inf
        expected = torch.einsum("hsk,khd->shd", scores.softmax(-1), keys[..., :512])
        assert difference(out[row], expected) < 1e-4
        assert torch.allclose(lse[row].double(), scores.logsumexp(-1), atol=1e-4)


def test_profiler_shows_the_names_that_users_look_for() -> None:
    (_, *a), (_, *b) = activations(64), weights()
    d = torch.empty(64, N, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(1, 1, 16, 576, device="cuda").bfloat16()
    cache = torch.randn(2, 64, 1, 576, device="cuda").bfloat16()
    table = torch.tensor([[0, 1]], dtype=torch.int32, device="cuda")
    seqlens = torch.tensor([100], dtype=torch.int32, device="cuda")

    def call() -> None:
        deep_gemm.fp8_gemm_nt(a, (b[0][0], b[1][0]), d)
        flash_mla.flash_mla_with_kvcache(
            q, cache, table, seqlens, 512, *flash_mla.get_mla_metadata()
        )

    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert sum("gemm_" in name for name in names) == 1, names
    assert sum("flash_fwd_splitkv_mla" in name for name in names) == 1, names


def test_k_grouped_meets_float64_in_place() -> None:
    ks, m, n = [256, 0, 1024, 128], 512, 384
    x, w = (torch.randn(sum(ks), width, device="cuda").bfloat16() for width in (m, n))
    operands = []
    for values in (x, w):
        codes, scales = deep_gemm.per_channel_cast_to_fp8(values, use_ue8m0=False)
        flat = torch.cat([part.t().reshape(-1).view(torch.uint8) for part in codes.split(ks)])
        operands.append((flat.view(codes.dtype), scales.t()))
    c = torch.randn(len(ks), m, n, device="cuda") * 32
    d, layout = c.clone(), torch.tensor(ks, dtype=torch.int32, device="cuda")
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(*operands, d, ks, layout, d)
    for group, (left, right) in enumerate(zip(x.split(ks), w.split(ks), strict=True)):
        exact = c[group].double() + left.double().t() @ right.double()
        assert difference(d[group], exact) < 1e-3
    assert torch.equal(d[1], c[1])


@pytest.mark.parametrize("use_ue8m0", [False, True])
def test_casts_have_the_bits_of_a_cpu(use_ue8m0: bool) -> None:
    x = torch.randn(300, 456) * torch.randn(300, 1).exp()
    for dtype in (torch.bfloat16, torch.float32):
        for cast in (deep_gemm.per_token_cast_to_fp8, deep_gemm.per_block_cast_to_fp8):
            given = x.to(dtype)
            on_cpu, on_gpu = cast(given, use_ue8m0), cast(given.cuda(), use_ue8m0)
            for want, got in zip(on_cpu, on_gpu, strict=True):
                assert torch.equal(want.view(torch.uint8), got.cpu().view(torch.uint8))


def test_fewer_sms_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "num_sms_limit", 0)
    x, w = torch.randn(600, K, device="cuda"), torch.randn(2112, K, device="cuda")
    a = deep_gemm.per_token_cast_to_fp8(x, use_ue8m0=False)
    b = deep_gemm.per_block_cast_to_fp8(w, use_ue8m0=False)
    results = []
    for num_sms in (deep_gemm.get_num_sms(), 20, 1):
        deep_gemm.set_num_sms(num_sms)
        d = torch.full((600, 2112), torch.nan, device="cuda", dtype=torch.bfloat16)
        deep_gemm.fp8_gemm_nt(a, b, d)
        results.append(d)
    assert torch.equal(results[1], results[2])  # neither splits k
    assert ((results[0] - results[1]).abs() <= 2**-6 * results[1].abs() + 1e-2).all()

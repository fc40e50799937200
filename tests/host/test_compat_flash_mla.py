"""jitgen.compat.flash_mla on CPU tensors, by the interpreter; tests/gpu has the rest."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import jitgen  # noqa: E402
from jitgen.compat import flash_mla  # noqa: E402

LENGTHS = (3, 0, 70)


def make(num_heads: int, num_kv_heads: int, num_queries: int) -> tuple[Any, ...]:
    q = torch.randn(len(LENGTHS), num_queries, num_heads, 320).bfloat16()
    table = torch.tensor([[1, 9], [9, 9], [0, 2]], dtype=torch.int32)
    cache = torch.randn(3, 64, num_kv_heads, 320).bfloat16()
    return q, cache, table, torch.tensor(LENGTHS, dtype=torch.int32)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 1), (4, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_decode_is_attention(num_heads: int, num_kv_heads: int, causal: bool) -> None:
    q, cache, table, lengths = make(num_heads, num_kv_heads, num_queries=2)
    metadata, num_splits = flash_mla.get_mla_metadata(lengths, 2 * num_heads, 1)
    out, lse = flash_mla.flash_mla_with_kvcache(
        *(q, cache, table, lengths, 256, metadata, num_splits), causal=causal
    )
    assert out.shape == (3, 2, num_heads, 256)
    assert lse.shape == (3, num_heads, 2)
    for row, length in enumerate(LENGTHS):
        pages = table[row, : -(-length // 64)].long()
        keys = cache[pages].reshape(-1, num_kv_heads, 320)[:length].double()
        keys = keys.repeat_interleave(num_heads // num_kv_heads, dim=1)
        scores = torch.einsum("shd,khd->hsk", q[row].double(), keys) * 320**-0.5
        if causal and length:
            scores[:, 0, length - 1] = -torch.inf
        if length == 0:
            assert (out[row] == 0).all()
            assert (lse[row] == torch.inf).all()
            continue
        expected = torch.einsum("hsk,khd->shd", scores.softmax(-1), keys[..., :256])
        assert torch.allclose(out[row].double(), expected, atol=2**-6, rtol=2**-6)
        assert torch.allclose(lse[row].double(), scores.logsumexp(-1), atol=1e-4)


def make_fp8(page: int) -> tuple[Any, Any, Any]:
    """q, an FP8 cache whose blocks lie apart, and its keys and values as they are read."""
    q = torch.randn(2, 2, 3, 576).bfloat16()
    keys = torch.randn(5, page + 1, 1, 576).bfloat16()
    cache = jitgen.quantize_mla_cache(keys)
    scales = cache[..., 512:528].contiguous().view(torch.float32).repeat_interleave(128, -1)
    values = cache[..., :512].contiguous().view(torch.float8_e4m3fn).float() * scales
    read = torch.cat((values, keys[..., 512:].float()), dim=-1)
    cache = cache.view(torch.float8_e4m3fn)  # as FlashMLA has it
    return q, cache[:, :page], read[:, :page, 0].double()


def attention(q: Any, keys: Any, scale: float) -> tuple[Any, Any]:
    """o [heads, 512] and lse [heads] of a token's queries [heads, 576]."""
    scores = q.double() @ keys.t() * scale
    return scores.softmax(-1) @ keys[:, :512], scores.logsumexp(-1)


@pytest.mark.parametrize("page", [2, 61])
@pytest.mark.parametrize("has_extras", [False, True])
def test_sparse_decode_is_attention_over_lists(page: int, has_extras: bool) -> None:
    q, cache, keys = make_fp8(page)
    indices = torch.randint(0, 5 * page, (2, 3, 24), dtype=torch.int32)[:, :2, :20]  # strided
    indices[0, 1, 3:], indices[1, 0, ::2] = -1, -1
    sink = torch.tensor([0.5, -torch.inf, torch.inf]) if has_extras else None
    lengths = torch.tensor([20, 7], dtype=torch.int32) if has_extras else None
    out, lse = flash_mla.flash_mla_with_kvcache(
        *(q, cache, None, None, 512, *flash_mla.get_mla_metadata(), 0.1),
        is_fp8_kvcache=True,
        indices=indices,
        attn_sink=sink,
        topk_length=lengths,
    )
    for row in range(2):
        for token in range(2):
            listed = indices[row, token][: lengths[row] if lengths is not None else None]
            listed = listed[listed >= 0].long()
            o, expected = attention(q[row, token], keys.reshape(-1, 576)[listed], 0.1)
            if sink is not None:
                o /= 1 + (sink.double() - expected).exp()[:, None]
            assert torch.allclose(out[row, token].double(), o, atol=2**-6, rtol=2**-6)
            # Each of a key's blocks of columns is off by 2^-11 of its part of a score, about 1.
            assert torch.allclose(lse[row, :, token].double(), expected, atol=2**-8)


def test_dense_decode_reads_an_fp8_cache() -> None:
    q, cache, keys = make_fp8(64)
    table, lengths = torch.tensor([[3], [1]], dtype=torch.int32), [50, 64]
    out, _ = flash_mla.flash_mla_with_kvcache(
        *(q, cache, table, torch.tensor(lengths, dtype=torch.int32), 512),
        *flash_mla.get_mla_metadata(),
        is_fp8_kvcache=True,
    )
    for row, length in enumerate(lengths):
        o, _ = attention(q[row, 1], keys[table[row, 0], :length], 576**-0.5)
        assert torch.allclose(out[row, 1].double(), o, atol=2**-6, rtol=2**-6)


@pytest.mark.parametrize("name", ["extra_k_cache", "extra_topk_length", "indices"])
def test_unsupported_argument_names_itself(name: str) -> None:
    metadata, _ = flash_mla.get_mla_metadata()
    option = {name: torch.zeros(3, 1, 4, dtype=torch.int32)}
    with pytest.raises(NotImplementedError, match=name):
        flash_mla.flash_mla_with_kvcache(*make(2, 1, 1), 256, metadata, **option)


def test_arguments_of_sparse_attention_need_indices() -> None:
    metadata, _ = flash_mla.get_mla_metadata()
    with pytest.raises(ValueError, match="give indices"):
        flash_mla.flash_mla_with_kvcache(*make(2, 1, 1), 256, metadata, attn_sink=torch.zeros(2))


def test_dense_attention_needs_its_block_table() -> None:
    q, cache, _, lengths = make(2, 1, 1)
    with pytest.raises(ValueError, match="block_table"):
        flash_mla.flash_mla_with_kvcache(
            q, cache, None, lengths, 256, flash_mla.FlashMLASchedMeta()
        )


@pytest.mark.parametrize("name", flash_mla.UNSUPPORTED)
def test_unsupported_function_names_itself(name: str) -> None:
    with pytest.raises(NotImplementedError, match=name):
        getattr(flash_mla, name)()
    assert not hasattr(flash_mla, "flash_mla_with_cache")

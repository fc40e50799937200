"""jitgen.compat.flash_mla on CPU tensors, by the interpreter; tests/gpu has the rest."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

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


@pytest.mark.parametrize(
    "option",
    [
        {"is_fp8_kvcache": True},
        {"indices": torch.zeros(3, 1, 4, dtype=torch.int32)},
        {"attn_sink": torch.zeros(2)},
        {"topk_length": torch.zeros(3, dtype=torch.int32)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_unsupported_argument_names_itself(option: dict[str, Any]) -> None:
    metadata, _ = flash_mla.get_mla_metadata()
    with pytest.raises(NotImplementedError, match=next(iter(option))):
        flash_mla.flash_mla_with_kvcache(*make(2, 1, 1), 256, metadata, **option)


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

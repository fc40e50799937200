"""FlashMLA's decoding interface on Hopper, on jitgen's kernel: `from jitgen.compat.flash_mla import
flash_mla_with_kvcache, get_mla_metadata`.

Names, arguments and meaning are FlashMLA's: https://github.com/deepseek-ai/FlashMLA. What is not
here raises NotImplementedError when it is called. CPU tensors run on the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from ..integrations.tensors import attend, attend_sparse
from ..problem_mla import FP8_HEAD_DIMS
from . import refuse

UNSUPPORTED = dict.fromkeys(
    (
        "flash_mla_sparse_fwd",
        "flash_attn_varlen_func",
        "flash_attn_varlen_kvpacked_func",
        "flash_attn_varlen_qkvpacked_func",
    ),
    "jitgen decodes only",
)


@dataclass
class FlashMLASchedMeta:
    """What `get_mla_metadata` returns and calls are given; empty.

    Every launch splits the sequences by the lengths that it finds, so one may serve any calls.
    """

    tile_scheduler_metadata: None = None
    num_splits: None = None


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """What calls take as tile_scheduler_metadata and num_splits; any arguments mean nothing."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, softmax_lse): attention over a paged cache of latent keys.

    Dense, over the first keys of each sequence, or sparse with `indices`: of each query token over
    its own list of tokens.

    Parameters
    ----------
    q : bfloat16 or float16 [b, s_q, h_q, head_dim], s_q in 1..8; head_dim is 576, 512 or 320, with
        an FP8 cache bfloat16 and 576
    k_cache : of q's dtype, [num_blocks, page, h_k, head_dim], page 16, 32, 64 or 128; or, with
        is_fp8_kvcache, of one byte an element, [num_blocks, page, 1, 656]: 512 E4M3 codes, 4
        float32 scales and 64 bfloat16 elements a token. Query heads h_q / h_k * i and on attend
        head i of several; each is a launch, and at s_q > 1 a copy of its queries
    block_table : int32 [b, max_pages], of dense attention
    cache_seqlens : int32 [b], of dense attention
    head_dim_v : 512, or 256 with a head_dim of 320
    tile_scheduler_metadata, num_splits : of `get_mla_metadata`
    softmax_scale : default head_dim^-0.5
    causal : token t of s_q sees s_q - 1 - t keys less than the last one; of dense attention
    indices : int32 [b, s_q, topk], block * page + position in the block; negative ones are skipped
    attn_sink : float32 [h_q]; out is multiplied by e^lse / (e^lse + e^attn_sink); of sparse
        attention
    topk_length : int32 [b], how many of `indices` count

    Returns
    -------
    out of q's dtype [b, s_q, h_q, head_dim_v];
    softmax_lse float32 [b, h_q, s_q], natural logarithm; +inf of a row without keys, whose out is 0

    Raises
    ------
    NotImplementedError : a second cache, or a sparse one that is not FP8 of head_dim 576
    ValueError : arguments of dense attention with those of sparse, or without their own
    As `jitgen.mla_decode` and `jitgen.mla_decode_sparse`
    """
    for name, value in {
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "extra_topk_length": extra_topk_length,
    }.items():
        if value is not None:
            raise NotImplementedError(f"{name}: jitgen decodes over one cache a call")
    if is_fp8_kvcache:
        k_cache = k_cache.view(torch.uint8)
    if indices is not None:
        if not is_fp8_kvcache or q.shape[-1] != FP8_HEAD_DIMS[0]:
            raise NotImplementedError(
                f"indices with is_fp8_kvcache={is_fp8_kvcache} and head_dim {q.shape[-1]}: jitgen"
                f" decodes sparse over FP8 caches of head_dim {FP8_HEAD_DIMS[0]}"
            )
        if causal:
            raise ValueError("sparse attention is not causal: its lists say what is seen")
        return attend_sparse(
            *(q.contiguous(), k_cache, indices.contiguous()),
            topk_length=topk_length,
            attention_sink=attn_sink,
            softmax_scale=softmax_scale,
        )
    if attn_sink is not None or topk_length is not None:
        raise ValueError("attn_sink and topk_length are of sparse attention: give indices")
    if block_table is None or cache_seqlens is None:
        raise ValueError("dense attention needs block_table and cache_seqlens")
    num_kv_heads = k_cache.shape[2]
    results = [
        attend(
            *(queries, k_cache[:, :, head : head + 1], block_table, cache_seqlens),
            head_dim_v=head_dim_v,
            softmax_scale=softmax_scale,
            causal=causal,
        )
        for head, queries in enumerate(map(torch.Tensor.contiguous, q.chunk(num_kv_heads, dim=2)))
    ]
    if num_kv_heads == 1:
        return results[0]
    out, lse = zip(*results, strict=True)
    return torch.cat(out, dim=2), torch.cat(lse, dim=1)


def __getattr__(name: str) -> Callable[..., NoReturn]:
    return refuse(__name__, name, UNSUPPORTED)

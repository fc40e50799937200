"""DeepSeek-V3's attention in Transformers, decoding over the latents that it caches.

Keys and values of a token are linear in its latent, so both projections move to the queries' side:
q k^T = (q W_uk) latent^T, and the sum of values is (the sum of latents) W_uv^T. The kernel reads a
token's 576 cached numbers once for all heads.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    eager_attention_forward,
)

from ..problem_mla import HEAD_DIMS, MAX_HEADS, MAX_QUERIES
from .torch_ops import operators

if TYPE_CHECKING:
    from .decode_graph import DecodeStep

PAGE = 64  # latents that a block of the kernel reads
FIRST_CAPACITY = 256
NAME = "jitgen_absorbed"  # of the attention function, as Transformers knows it


class SharedWindows:
    """What the layers of a cache have in common: the last answer of `LatentLayer.windows`, and
    steps that append a token to all."""

    def __init__(self) -> None:
        self.step: DecodeStep | None = None
        self.is_stepping = False
        self.num_appended = 0  # tokens, by steps
        self.mask: torch.Tensor | None = None
        self.asked: tuple[object, ...] = ()
        self.answer: tuple[torch.Tensor, torch.Tensor] | None = None

    def windows(
        self, layer: LatentLayer, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_stepping:
            return self.step.windows  # type: ignore[union-attr,return-value]
        rows, version = layer.rows, None
        if mask is not None and not mask.is_inference():
            version = mask._version
        is_captured = layer.keys.is_cuda and torch.cuda.is_current_stream_capturing()
        asked = version, is_captured, rows.shape, rows.device, layer.get_seq_length()  # type: ignore[union-attr]
        if self.answer is None or self.mask is not mask or self.asked != asked:
            self.mask, self.asked, self.answer = mask, asked, layer.windows(mask)
        return self.answer


class LatentLayer(DynamicLayer):  # type: ignore[misc]
    """A layer's cache: `rows` [batch, capacity, rank + rope], of which keys and values are views.

    There are PAGE rows behind the last latent at least: a page may begin at any.
    """

    def __init__(self, shared: SharedWindows) -> None:
        self.shared = shared
        self.rows: torch.Tensor | None = None
        super().__init__()

    @property
    def keys(self) -> Any:
        """Latents [batch, 1, tokens, rank]; None at first."""
        return self._views()[0]

    @keys.setter
    def keys(self, keys: Any) -> None:
        self._keys, self._num_appended = keys, self.shared.num_appended

    @property
    def values(self) -> Any:
        """Their rotary parts [batch, 1, tokens, rope]."""
        return self._views()[1]

    @values.setter
    def values(self, values: Any) -> None:
        self._values = values

    def _views(self) -> tuple[Any, Any]:
        """keys and values, with the tokens that steps have appended since they were set."""
        if self._num_appended != self.shared.num_appended:
            _, _, length, rank = self._keys.shape
            end = length + self.shared.num_appended - self._num_appended
            self._set_views(end, rank)
        return self._keys, self._values

    def _set_views(self, end: int, rank: int) -> None:
        rows = self.rows[:, None]  # type: ignore[index]
        self.keys, self.values = rows[:, :, :end, :rank], rows[:, :, :end, rank:]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append latents [batch, 1, tokens, rank] and their rotary parts [.., rope]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rank = key_states.shape[-1]
        if self.shared.is_stepping:
            rows, at = self.rows, self.shared.step.end  # type: ignore[union-attr]
            rows[..., :rank].index_copy_(1, at, key_states[:, 0])  # type: ignore[index]
            rows[..., rank:].index_copy_(1, at, value_states[:, 0])  # type: ignore[index]
            return self.keys, self.values
        begin = self.keys.shape[-2]
        end = begin + key_states.shape[-2]
        if not self.is_ready(end):
            self._grow(end)
        rows = self.rows[:, None]  # type: ignore[index]
        rows[:, :, begin:end, :rank] = key_states
        rows[:, :, begin:end, rank:] = value_states
        self._set_views(end, rank)
        return self.keys, self.values

    def is_ready(self, end: int) -> bool:
        """Whether the rows are still what keys is a view of, and enough for latents up to `end`."""
        rows, keys = self.rows, self.keys
        return (
            rows is not None
            and keys.data_ptr() == rows.data_ptr()
            and keys.shape[0] == rows.shape[0]
            and end + PAGE <= rows.shape[1]
        )

    def _grow(self, end: int) -> None:
        batch, _, length, rank = self.keys.shape
        capacity = max(FIRST_CAPACITY, 2 * end) + PAGE
        rows = self.keys.new_empty(batch, capacity, rank + self.values.shape[-1])
        rows[:, :length, :rank] = self.keys[:, 0]
        rows[:, :length, rank:] = self.values[:, 0]
        self.rows = rows

    def blocks(self) -> torch.Tensor:
        """kv_cache: a block begins at every row, so they overlap."""
        batch, capacity, width = self.rows.shape  # type: ignore[union-attr]
        return torch.as_strided(
            self.rows,
            (batch * capacity - PAGE + 1, PAGE, 1, width),
            (width, width, width, 1),
        )

    def windows(
        self, mask: torch.Tensor | None, length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """block_table and seqlens_k of what each sequence's last query sees, as `mask` says, of
        `length` tokens at most."""
        batch, capacity, _ = self.rows.shape  # type: ignore[union-attr]
        length = self.get_seq_length() if length is None else length
        first, lengths = _windows(mask, batch, length, self.device)
        begin = first + torch.arange(batch, device=first.device) * capacity
        page = torch.arange(-(-length // PAGE), device=first.device) * PAGE
        return (begin[:, None] + page).int(), lengths


class AbsorbedAttention(DeepseekV3Attention):  # type: ignore[misc]
    """DeepseekV3Attention that decodes by `jitgen.mla_decode`; prefill is left to what it was."""

    w_uk: torch.Tensor  # [heads, nope, rank]
    w_uv: torch.Tensor  # [heads, v, rank]
    usual: str  # the attention function of everything else

    @staticmethod
    def take_over(module: DeepseekV3Attention) -> None:
        """Make `module` one of these."""
        weight = _dense_weight(module.kv_b_proj).unflatten(0, (module.num_heads, -1))
        dtype = module.kv_a_layernorm.weight.dtype
        w_uk, w_uv = weight.to(dtype).split([module.qk_nope_head_dim, module.v_head_dim], dim=1)
        module.register_buffer("w_uk", w_uk.contiguous(), persistent=False)
        module.register_buffer("w_uv", w_uv.contiguous(), persistent=False)
        module.usual = module.config._attn_implementation
        module.config = copy.copy(module.config)  # masks go by the model's, which stays
        module.config._attn_implementation_internal = NAME
        module.__class__ = AbsorbedAttention

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        latents = _latent_layer(past_key_values, self.layer_idx)
        return super().forward(
            *(hidden_states, position_embeddings, attention_mask, past_key_values),
            latents=latents,
            **kwargs,
        )

    def expand_kv(
        self, kv_nope: torch.Tensor, k_rot: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both as they are: `_attend` expands them if it must."""
        return kv_nope, k_rot

    def decode(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        latents: LatentLayer,
    ) -> torch.Tensor:
        """[batch, tokens, heads, v] of queries [batch, heads, tokens, nope + rope]."""
        nope, rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        q = torch.cat((torch.matmul(nope, self.w_uk), rope), dim=-1).transpose(1, 2).contiguous()
        table, lengths = latents.shared.windows(latents, mask)
        o, _ = operators().mla_decode(
            *(q, latents.blocks(), table, lengths),
            head_dim_v=self.kv_lora_rank,
            softmax_scale=scaling,
        )
        return torch.matmul(o.transpose(1, 2), self.w_uv.mT).transpose(1, 2)


def can_absorb(module: DeepseekV3Attention) -> bool:
    """Whether the kernel takes its shapes."""
    rank = module.kv_lora_rank
    return (
        rank + module.qk_rope_head_dim,
        rank,
    ) in HEAD_DIMS and module.num_heads <= MAX_HEADS


def _attend(
    module: AbsorbedAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    latents: LatentLayer | None = None,
    **kwargs: Any,
) -> Any:
    """An attention function of Transformers; key and value are the cache's, not expanded."""
    is_16_bit = query.dtype in (torch.bfloat16, torch.float16)
    if latents is not None and is_16_bit and query.shape[2] <= MAX_QUERIES:
        return module.decode(query, attention_mask, scaling, latents), None
    usual = ALL_ATTENTION_FUNCTIONS.get_interface(module.usual, eager_attention_forward)
    key, value = DeepseekV3Attention.expand_kv(module, key, value)
    return usual(
        *(module, query, key, value, attention_mask), scaling=scaling, dropout=dropout, **kwargs
    )


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)


def _latent_layer(cache: Cache | None, index: int) -> LatentLayer | None:
    """The layer of the cache, made one of latents if it holds nothing yet; None of other caches."""
    if cache is None or type(cache) is not DynamicCache or cache.offloading:
        return None
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if type(layer) is DynamicLayer and not layer.is_initialized:
        others = (other.shared for other in cache.layers if isinstance(other, LatentLayer))
        layer = cache.layers[index] = LatentLayer(next(others, None) or SharedWindows())
    return layer if isinstance(layer, LatentLayer) else None


def _windows(
    mask: torch.Tensor | None, batch: int, length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first key that each sequence's last query sees, int64 [batch], and how many, int32.

    mask : of [batch, keys], or [batch, 1, queries, keys]: what is seen, or what is added to scores
    """
    if mask is None:
        first = torch.zeros(batch, dtype=torch.int64, device=device)
        return first, torch.full((batch,), length, dtype=torch.int32, device=device)
    last = mask[:, 0, -1] if mask.ndim == 4 else mask
    seen = (last == 0) if last.is_floating_point() else last.bool()
    seen = seen.expand(batch, -1)
    return seen.int().argmax(dim=-1), seen.sum(dim=-1, dtype=torch.int32)


def _dense_weight(linear: nn.Module) -> torch.Tensor:
    """The weight in float32, of a linear in FP8 or not."""
    weight: torch.Tensor = linear.weight.detach().float()
    scales = getattr(linear, "weight_scale_inv", None)
    if scales is None:
        return weight
    rows, columns = weight.shape
    spread = scales.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
    return weight * spread[:, :columns]

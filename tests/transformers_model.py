"""A small DeepSeek-V3 with random weights in fine-grained FP8, and what it is without jitgen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, FineGrainedFP8Config
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear

import jitgen

NO_FP8 = (".*",)


def make_model(
    device: str,
    *,
    hidden: int = 256,
    rank: int = 256,
    heads: int = 2,
    kept: tuple[str, ...] = (),
) -> Any:
    """In BF16, with FP8 weights but for those of `kept`: a dense layer and one of experts."""
    config = DeepseekV3Config(
        vocab_size=199,
        hidden_size=hidden,
        intermediate_size=hidden,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=128,
        kv_lora_rank=rank,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        num_mtp_layers=0,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=hidden**-0.5,
    )
    model = DeepseekV3ForCausalLM(config).to(device, torch.bfloat16).eval()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    if kept != NO_FP8:
        finegrained_fp8.replace_with_fp8_linear(model, ["lm_head", *kept], FineGrainedFP8Config())
    for name, module in model.named_modules():
        if isinstance(module, FP8Linear):
            _fill(module, name, "weight", weights)
        elif isinstance(module, FP8Experts):
            _fill(module, name, "gate_up_proj", weights)
            _fill(module, name, "down_proj", weights)
    model.config._experts_implementation = "eager"
    return model


def _fill(module: nn.Module, prefix: str, name: str, weights: dict[str, torch.Tensor]) -> None:
    weight = weights[f"{prefix}.{name}"].float()
    quantized = [jitgen.quantize(part, (128, 128)) for part in weight.view(-1, *weight.shape[-2:])]
    codes, scales = (torch.stack(parts) for parts in zip(*quantized, strict=True))
    for suffix, tensor in (("", codes), ("_scale_inv", scales)):
        values = tensor.view(*weight.shape[:-2], *tensor.shape[1:])
        setattr(module, name + suffix, nn.Parameter(values, requires_grad=False))


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    block_size: Any = None,
    bias: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """What Transformers' FP8 kernels compute, which come from the network: here in float32."""
    codes, scale = jitgen.quantize(x.reshape(-1, x.shape[-1]))

    def values(q: torch.Tensor, s: torch.Tensor, rows: int) -> torch.Tensor:
        spread = s.repeat_interleave(rows, 0).repeat_interleave(128, 1)
        return q.float() * spread[: q.shape[0], : q.shape[1]]

    d = values(codes, scale, 1) @ values(weight, scales, 128).t()
    return (d + bias if bias is not None else d).to(x.dtype).view(*x.shape[:-1], -1)


def without_jitgen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have unpatched FP8 modules run here."""
    monkeypatch.setattr(finegrained_fp8, "fp8_linear", _linear)


def generate(model: Any, tokens: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
    """The prompt and `count` tokens more, greedily."""
    done: torch.Tensor = model.generate(
        tokens, max_new_tokens=count, do_sample=False, pad_token_id=0, **options
    )
    return done


def logits_one_by_one(
    model: Any, tokens: torch.Tensor, prompt: int, **options: Any
) -> torch.Tensor:
    """Logits behind the prompt and behind each later token, decoded with a cache."""
    with torch.no_grad():
        out = model(tokens[:, :prompt], use_cache=True, **options)
        logits, cache = [out.logits[:, -1]], out.past_key_values
        for at in range(prompt, tokens.shape[1]):
            mask = options.get("attention_mask")
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (0, at + 1 - prompt), value=1)
            out = model(tokens[:, at : at + 1], past_key_values=cache, attention_mask=mask)
            logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1).float()

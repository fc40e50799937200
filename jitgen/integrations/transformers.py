"""Hugging Face models on jitgen's kernels: `patch(model)`, after it was loaded.

    model = AutoModelForCausalLM.from_pretrained("deepseek-ai/DeepSeek-V3", ...)
    jitgen.integrations.transformers.patch(model)

Written for transformers 5.17. CPU models run on the interpreter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8GroupedLinear, FP8Linear
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from ..problem import Gemm, supports
from .latent_attention import AbsorbedAttention, can_absorb
from .tensors import is_recorded
from .torch_ops import operators

BLOCK = (128, 128)  # of the weights' scales


class Patched(NamedTuple):
    """How many modules of a model run on jitgen's kernels."""

    linears: int
    experts: int
    attentions: int


def patch(model: PreTrainedModel) -> Patched:
    """Have `model` run on jitgen's kernels, from now on and in place.

    - FP8 linears (fine-grained FP8: weights in 128x128 blocks, activations quantized as they come)
      run `jitgen.gemm`.
    - FP8 experts run `jitgen.grouped_gemm`, all of a layer in one launch.
    - DeepSeek-V3's attention decodes by `jitgen.mla_decode`, over the latents that it caches, in
      BF16 and FP16: at most 8 tokens a sequence, with Transformers' default cache. What it does
      else, it does as before.

    Parameters, their names and the state dict stay as they are, but for UE8M0 scales, which become
    float32. A module that breaks a rule of the kernels stays as it is. For inference, each module
    whole on one device: not for tensor parallelism.

    Returns
    -------
    how many modules were replaced
    """
    linears, experts, attentions = 0, 0, 0
    for name, module in list(model.named_modules()):
        if isinstance(module, FP8Experts) and _takes_experts(module):
            model.set_submodule(name, Experts(module))
            experts += 1
        elif isinstance(module, FP8Linear) and _takes_linear(module):
            model.set_submodule(name, Linear(module))
            linears += 1
    for module in model.modules():
        if (
            type(module) is DeepseekV3Attention
            and can_absorb(module)
            and not isinstance(module.kv_b_proj, FP8Linear)  # of other blocks, and so kept
        ):
            AbsorbedAttention.take_over(module)
            attentions += 1
    return Patched(linears, experts, attentions)


class Linear(nn.Module):  # type: ignore[misc]
    """x @ (weight * scales)^T + bias with x quantized in 1x128; of an FP8Linear's parameters."""

    def __init__(self, linear: FP8Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.weight_scale_inv = _float_scales(linear.weight_scale_inv)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, sfa = _inputs.quantize(x)
        bias = self.bias.float() if self.bias is not None else None
        d = operators().gemm(
            a, self.weight, sfa, self.weight_scale_inv, bias=bias, out_dtype=_result(x)
        )
        return d.view(*x.shape[:-1], self.out_features).to(x.dtype)


class Experts(nn.Module):  # type: ignore[misc]
    """The experts of a layer, in two grouped GEMMs; of an FP8Experts' parameters."""

    def __init__(self, experts: FP8Experts) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.gate_up_proj_scale_inv = _float_scales(experts.gate_up_proj_scale_inv)
        self.down_proj_scale_inv = _float_scales(experts.down_proj_scale_inv)
        self.act_fn = experts.act_fn
        self.swiglu_alpha, self.swiglu_limit = experts.swiglu_alpha, experts.swiglu_limit
        self.limit = experts.limit
        # What the first product can end with: its halves are whole 128x128 blocks.
        self.is_swiglu = (
            isinstance(self.act_fn, (nn.SiLU, SiLUActivation))
            and self.swiglu_alpha is None
            and self.limit is None
            and self.gate_up_proj.shape[1] % (2 * BLOCK[0]) == 0
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum over each token's experts of weight * expert(token).

        hidden_states : [tokens, hidden]
        top_k_index, top_k_weights : [tokens, k]; experts from num_experts on are another rank's
        """
        num_tokens, num_chosen = top_k_index.shape
        expert, order = top_k_index.reshape(-1).sort(stable=True)
        bounds = torch.arange(self.num_experts + 1, device=expert.device, dtype=expert.dtype)
        offsets = torch.searchsorted(expert, bounds, out_int32=True)
        a, sfa = _quantize(hidden_states[order // num_chosen])
        of_gate_up = self.gate_up_proj, self.gate_up_proj_scale_inv
        if self.is_swiglu:
            a, sfa = operators().grouped_swiglu(
                a, of_gate_up[0], sfa, of_gate_up[1], offsets, layout="ragged"
            )
        else:
            x = self._multiply(a, sfa, *of_gate_up, offsets, hidden_states)
            a, sfa = _quantize(FP8Experts._apply_gate(self, x))
        of_down = self.down_proj, self.down_proj_scale_inv
        x = self._multiply(a, sfa, *of_down, offsets, hidden_states)
        weight = top_k_weights.reshape(-1)[order, None].to(x.dtype)
        x = torch.where(expert[:, None] < self.num_experts, x * weight, 0)
        result = torch.empty_like(x).index_copy_(0, order, x)
        return result.view(num_tokens, num_chosen, -1).sum(dim=1).to(hidden_states.dtype)

    @staticmethod
    def _multiply(
        a: torch.Tensor,
        sfa: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        like: torch.Tensor,
    ) -> torch.Tensor:
        return operators().grouped_gemm(
            a, weight, sfa, scales, offsets, layout="ragged", out_dtype=_result(like)
        )


class _Inputs:
    """Codes of the last small input: projections of a layer, such as gate and up, share theirs."""

    MAX_ELEMENTS = 2**20  # kept alive until the next one; where there are more, kernels take long

    def __init__(self) -> None:
        self.last: tuple[torch.Tensor, int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of the rows of x."""
        rows = x.reshape(-1, x.shape[-1])
        if is_recorded(x) or x.is_inference() or x.numel() > self.MAX_ELEMENTS:
            return _quantize(rows)
        last = self.last  # read once: other threads may replace it
        if last is None or last[0] is not x or last[1] != x._version:
            self.last = last = x, x._version, _quantize(rows)
        return last[2]


_inputs = _Inputs()


def _takes_linear(module: FP8Linear) -> bool:
    return (
        not isinstance(module, FP8GroupedLinear)
        and module.activation_scheme == "dynamic"
        and _takes_weight(module.weight, module.weight_scale_inv, module.block_size)
    )


def _takes_experts(module: FP8Experts) -> bool:
    return (
        module.has_gate
        and module.activation_scheme == "dynamic"
        and _takes_weight(module.gate_up_proj, module.gate_up_proj_scale_inv, module.block_size)
        and _takes_weight(module.down_proj, module.down_proj_scale_inv, module.block_size)
    )


def _takes_weight(weight: torch.Tensor, scales: torch.Tensor, block: object) -> bool:
    """Whether it is FP8 in blocks, and of a shape that `jitgen.gemm` takes."""
    n, k = weight.shape[-2:]
    grid = (*weight.shape[:-2], -(-n // BLOCK[0]), -(-k // BLOCK[1]))
    return (
        weight.dtype == torch.float8_e4m3fn
        and isinstance(block, (list, tuple))
        and tuple(block) == BLOCK
        and tuple(scales.shape) == grid
        and bool(supports(Gemm(n, k)))
    )


def _float_scales(scales: nn.Parameter) -> nn.Parameter:
    if scales.dtype == torch.float32:
        return scales
    return nn.Parameter(scales.float(), requires_grad=False)


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of each row's blocks; FP16 goes by float32."""
    codes, scales = operators().quantize(x.float() if x.dtype == torch.float16 else x)
    return codes, scales


def _result(x: torch.Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32

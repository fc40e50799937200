"""Hugging Face models on jitgen's kernels: `patch(model)`, after it was loaded.

    model = AutoModelForCausalLM.from_pretrained("deepseek-ai/DeepSeek-V3", ...)
    jitgen.integrations.transformers.patch(model)  # or patch(model, cuda_graphs=True)

Written for transformers 5.17. CPU models run on the interpreter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8GroupedLinear, FP8Linear
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3Experts,
    DeepseekV3ForCausalLM,
    DeepseekV3MLP,
    DeepseekV3RMSNorm,
)

from ..errors import ProblemError
from ..problem import Gemm, supports
from .decode_graph import decode_in_graphs
from .latent_attention import AbsorbedAttention, can_absorb
from .modules import gemm, grouped_gemm, quantize, swiglu
from .tensors import is_recorded

BLOCK = (128, 128)  # of the weights' scales


class Patched(NamedTuple):
    """How many modules of a model run on jitgen's kernels."""

    linears: int
    experts: int
    attentions: int


def patch(model: PreTrainedModel, *, cuda_graphs: bool = False) -> Patched:
    """Have `model` run on jitgen's kernels, from now on and in place.

    - FP8 linears (fine-grained FP8: weights in 128x128 blocks, activations quantized as they come)
      run `jitgen.gemm`.
    - FP8 experts run `jitgen.grouped_gemm`, all of a layer in one launch.
    - DeepSeek-V3's attention decodes by `jitgen.mla_decode`, over the latents that it caches, in
      BF16 and FP16: at most 8 tokens a sequence, with Transformers' default cache. What it does
      else, it does as before.
    - DeepSeek-V3's MLPs of FP8 linears, the shared experts too, compute gate and up in one GEMM,
      which ends with SwiGLU and the codes of its result; its norms are torch's own.

    Its parameters, their names and the state dict stay as they are, but for UE8M0 scales, which
    become float32. A module that breaks a rule of the kernels stays as it is. For inference, each
    module whole on one device: not for tensor parallelism.

    Parameters
    ----------
    cuda_graphs : decode in CUDA graphs what decodes by `jitgen.mla_decode` one token a sequence
        without gradients: `generate` does. Of few sequences the time of a token is the host's
        otherwise. Each cache has a graph, captured at its third token: for a model on one device,
        and for prompts and answers long enough. No module may wait for the GPU: a cache's first
        token raises ProblemError where one does. Experts that are not FP8 leave "eager", which
        does, for "grouped_mm"

    Returns
    -------
    how many modules were replaced

    Raises
    ------
    ProblemError : cuda_graphs of a model that is no DeepseekV3ForCausalLM whose attentions decode
        by `jitgen.mla_decode`
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
        elif type(module) is DeepseekV3MLP and _takes_mlp(module):
            Mlp.take_over(module)
        elif type(module) is DeepseekV3RMSNorm:
            module.__class__ = Norm
    if cuda_graphs:
        if not isinstance(model, DeepseekV3ForCausalLM) or attentions < len(model.model.layers):
            kind, layers = type(model).__name__, "all its attentions must decode by mla_decode"
            raise ProblemError(f"cuda_graphs of a {kind}: of a DeepseekV3ForCausalLM, and {layers}")
        has_usual_experts = any(type(module) is DeepseekV3Experts for module in model.modules())
        if has_usual_experts and model.config._experts_implementation == "eager":
            model.set_experts_implementation("grouped_mm")
        decode_in_graphs(model)
    return Patched(linears, experts, attentions)


class Linear(nn.Module):  # type: ignore[misc]
    """x @ (weight * scales)^T + bias with x quantized in 1x128; of an FP8Linear's parameters."""

    def __init__(self, linear: FP8Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.weight_scale_inv = _float_scales(linear.weight_scale_inv)
        self.register_parameter("bias", linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, scales = _inputs.quantize(x)
        return self.of_codes(codes, scales, x)

    def of_codes(
        self, codes: torch.Tensor, scales: torch.Tensor, like: torch.Tensor
    ) -> torch.Tensor:
        """The result for rows that are quantized, with the extents and the dtype of `like`."""
        parameters = self._parameters  # a module's attributes take a microsecond
        weight, bias = parameters["weight"], parameters["bias"]
        if bias is not None:
            bias = bias.float()
        d = gemm(
            *(codes, weight, scales, parameters["weight_scale_inv"]), bias=bias, dtype=_result(like)
        )
        if like.ndim != 2:
            d = d.view(*like.shape[:-1], self.out_features)
        return d if d.dtype == like.dtype else d.to(like.dtype)


class Mlp(DeepseekV3MLP):  # type: ignore[misc]
    """DeepseekV3MLP of three of these, in two GEMMs: the first is of both gate and up."""

    @staticmethod
    def take_over(module: DeepseekV3MLP) -> None:
        """Make `module` one of these."""
        module.gate_up = _Joined(module.gate_proj, module.up_proj)
        module.__class__ = Mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, scales = _inputs.quantize(x)
        weight, weight_scales = self.gate_up.parameters()
        codes, scales = swiglu(codes, weight, scales, weight_scales)
        result: torch.Tensor = self.down_proj.of_codes(codes, scales, x)
        return result


class _Joined:
    """Parameters of two Linears as one: those of the second lie behind the first's in memory."""

    NAMES = ("weight", "weight_scale_inv")

    def __init__(self, first: Linear, second: Linear) -> None:
        self.linears = first, second
        self._join()

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """weight and weight_scale_inv of both."""
        if not torch.compiler.is_compiling() and self._addresses() != self.addresses:
            self._join()  # they were moved, or are others
        return self.both

    def _addresses(self) -> list[int]:
        parts = [linear._parameters for linear in self.linears]
        return [part[name].data_ptr() for part in parts for name in self.NAMES]

    def _join(self) -> None:
        parts = [[getattr(linear, name) for linear in self.linears] for name in self.NAMES]
        weight, scales = (_cat([part.data for part in pair]) for pair in parts)
        for pair, both in zip(parts, (weight, scales), strict=True):
            for part, values in zip(pair, both.chunk(2), strict=True):
                part.data = values
        self.both, self.addresses = (weight, scales), self._addresses()


class Norm(DeepseekV3RMSNorm):  # type: ignore[misc]
    """DeepseekV3RMSNorm in one kernel of torch, rounded once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._parameters["weight"]
        if weight.dtype != x.dtype:
            result: torch.Tensor = super().forward(x)
            return result
        return nn.functional.rms_norm(x, weight.shape, weight, self.variance_epsilon)


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
            _is_silu(self.act_fn)
            and self.swiglu_alpha is None
            and self.limit is None
            and self.gate_up_proj.shape[1] % (2 * BLOCK[0]) == 0
        )
        bounds = torch.arange(self.num_experts + 1, device=self.gate_up_proj.device)
        self.register_buffer("bounds", bounds, persistent=False)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum over each token's experts of weight * expert(token).

        hidden_states : [tokens, hidden]
        top_k_index, top_k_weights : [tokens, k]; experts from num_experts on are another rank's
        """
        parameters, (num_tokens, num_chosen) = self._parameters, top_k_index.shape
        expert, order = top_k_index.reshape(-1).long().sort(stable=True)
        offsets = torch.searchsorted(expert, self.bounds, out_int32=True)
        token = order // num_chosen
        a, sfa = _inputs.quantize(hidden_states)
        a, sfa = _rows(a, token), sfa.index_select(0, token)
        of_gate_up = parameters["gate_up_proj"], parameters["gate_up_proj_scale_inv"]
        if self.is_swiglu:
            a, sfa = swiglu(a, of_gate_up[0], sfa, of_gate_up[1], offsets)
        else:
            x = self._multiply(a, sfa, *of_gate_up, offsets, hidden_states)
            a, sfa = _quantize(FP8Experts._apply_gate(self, x))
        of_down = parameters["down_proj"], parameters["down_proj_scale_inv"]
        x = self._multiply(a, sfa, *of_down, offsets, hidden_states)
        of_token = torch.empty_like(x).index_copy_(0, order, x).view(num_tokens, num_chosen, -1)
        result = torch.bmm(top_k_weights[:, None].to(x.dtype), of_token)[:, 0]
        return result if result.dtype == hidden_states.dtype else result.to(hidden_states.dtype)

    @staticmethod
    def _multiply(
        a: torch.Tensor,
        sfa: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        like: torch.Tensor,
    ) -> torch.Tensor:
        """The product for the rows of each expert; 0 for those of none."""
        d = torch.zeros(len(a), weight.shape[1], device=a.device, dtype=_result(like))
        return grouped_gemm(a, weight, sfa, scales, offsets, layout="ragged", out=d)


class _Inputs:
    """Codes of the last small input: projections of a layer, such as q and kv, share theirs."""

    MAX_ELEMENTS = 2**20  # kept alive until the next one; where there are more, kernels take long

    def __init__(self) -> None:
        self.last: tuple[torch.Tensor, int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of the rows of x."""
        if is_recorded(x) or x.is_inference() or x.numel() > self.MAX_ELEMENTS:
            return _quantize(x)
        last = self.last  # read once: other threads may replace it
        if last is None or last[0] is not x or last[1] != x._version:
            self.last = last = x, x._version, _quantize(x)
        return last[2]


_inputs = _Inputs()


def _takes_linear(module: FP8Linear) -> bool:
    return (
        not isinstance(module, FP8GroupedLinear)
        and module.activation_scheme == "dynamic"
        and _takes_weight(module.weight, module.weight_scale_inv, module.block_size)
    )


def _takes_mlp(module: DeepseekV3MLP) -> bool:
    """Whether its three are Linears, of whole blocks and without biases."""
    linears = module.gate_proj, module.up_proj, module.down_proj
    return (
        all(isinstance(linear, Linear) and linear.bias is None for linear in linears)
        and module.gate_proj.weight.shape[0] % BLOCK[0] == 0
        and _is_silu(module.act_fn)
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
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return quantize(rows.float() if x.dtype == torch.float16 else rows)


def _rows(codes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8).index_select(0, index).view(codes.dtype)


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    """Their rows, as bytes: torch does not know how to copy every dtype."""
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


def _is_silu(function: object) -> bool:
    return isinstance(function, (nn.SiLU, SiLUActivation))


def _result(x: torch.Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32

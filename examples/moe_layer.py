"""A mixture-of-experts layer in FP8: route, permute, two grouped GEMMs, combine.

The first GEMM applies SwiGLU and quantizes its result for the second, which weights each row: there
is no kernel between them. On CUDA tensors nothing waits for the GPU, so a CUDA graph can hold all
of it; on CPU tensors the interpreter computes the same bits (SwiGLU within its stated bound).

    python examples/moe_layer.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import torch

import jitgen
from jitgen import Ragged, acc, gate, per_row, silu, up


@dataclass(frozen=True)
class Experts:
    """Weights of all experts, quantized: float8_e4m3fn with a float32 scale a 128x128 block.

    gate_up : [num_experts, 2 * intermediate, hidden], the rows of gate_proj before those of up_proj
    down : [num_experts, hidden, intermediate]
    """

    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor
    down: torch.Tensor
    down_scale: torch.Tensor

    @classmethod
    def quantize(cls, gate_up: torch.Tensor, down: torch.Tensor) -> Experts:
        """From float32 or bfloat16 weights."""
        return cls(*_quantize_each(gate_up), *_quantize_each(down))


def _quantize_each(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [jitgen.quantize(weight, (128, 128)) for weight in weights]
    # Stacked as bytes: torch stacks no FP8 on a CPU.
    codes = torch.stack([quantized.view(torch.uint8) for quantized, _ in pairs])
    return codes.view(torch.float8_e4m3fn), torch.stack([scale for _, scale in pairs])


# --- routing --------------------------------------------------------------------------------------


def route_softmax(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 and experts int64, both [tokens, top_k]: the likeliest, renormalized."""
    weights, experts = logits.float().softmax(-1).topk(top_k, -1)
    return weights / weights.sum(-1, keepdim=True), experts


def route_node_limited(
    logits: torch.Tensor,
    bias: torch.Tensor,
    *,
    num_nodes: int = 8,
    top_nodes: int = 4,
    top_k: int = 8,
    scaling: float = 2.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V3's routing (section 2.1.2 of its report): weights and experts, [tokens, top_k].

    Affinities are sigmoids. With the bias that balances the load added, the `top_nodes` nodes with
    the largest sum of their two best experts are chosen, and of their experts the `top_k` best; the
    weights are the affinities without the bias, normalized, times `scaling`.
    """
    tokens, num_experts = logits.shape
    affinity = logits.float().sigmoid()
    biased = affinity + bias
    of_nodes = biased.view(tokens, num_nodes, -1).topk(2, -1).values.sum(-1)
    nodes = of_nodes.topk(top_nodes, -1).indices
    allowed = torch.zeros_like(of_nodes, dtype=torch.bool).scatter_(1, nodes, True)
    of_experts = allowed.repeat_interleave(num_experts // num_nodes, 1)
    experts = biased.masked_fill(~of_experts, -torch.inf).topk(top_k, -1).indices
    weights = affinity.gather(1, experts)
    return scaling * weights / weights.sum(-1, keepdim=True), experts


def permute(
    experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of token and expert, ordered by expert: order int64 [pairs], which pair is where;
    its inverse; and offsets int32 [num_experts + 1], where each expert's pairs begin."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return order, order.argsort(), offsets


# --- the layer ------------------------------------------------------------------------------------


def moe_layer(
    x: torch.Tensor, experts: Experts, weights: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """sum over a token's experts of weight * down(silu(gate(x)) * up(x)): float32 [tokens, hidden].

    Parameters
    ----------
    x : float32 or bfloat16 [tokens, hidden]
    weights, chosen : [tokens, top_k], from a router
    """
    tokens, top_k = chosen.shape
    order, inverse, offsets = permute(chosen, len(experts.down))
    rows = order // top_k
    quantized, scale = jitgen.quantize(x)
    hidden = quantized.view(torch.uint8)[rows].view(torch.float8_e4m3fn), scale[rows]
    middle = _grouped(
        hidden,
        (experts.gate_up, experts.gate_up_scale),
        offsets,
        out_dtype="float8_e4m3fn",
        epilogue=silu(gate) * up,
    )
    of_pairs = _grouped(
        middle,
        (experts.down, experts.down_scale),
        offsets,
        out_dtype="float32",
        epilogue=(acc * per_row("weight")).bind(weight=_give(weights.flatten()[order])),
    )
    return of_pairs[inverse].view(tokens, top_k, -1).sum(1)


def _grouped(
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    offsets: torch.Tensor,
    **options: Any,
) -> Any:
    scales = _give(a[1]), _give(b[1])
    layout = Ragged(_give(offsets))
    result = jitgen.grouped_gemm(_give(a[0]), _give(b[0]), scales, layout=layout, **options)
    return tuple(map(_take, result)) if isinstance(result, tuple) else _take(result)


def _give(tensor: torch.Tensor) -> Any:
    """The tensor, or on a CPU the same memory as an array for the interpreter."""
    if tensor.is_cuda:
        return tensor
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.numpy()


def _take(result: Any) -> torch.Tensor:
    if isinstance(result, torch.Tensor):
        return result
    if result.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(result.view("u1")).view(torch.float8_e4m3fn)
    return torch.from_numpy(result)


def main() -> None:
    """One layer of 16 small experts on this machine's GPU, or its CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    tokens, hidden, intermediate, num_experts = 64, 256, 128, 16
    gate_up = normal(num_experts, 2 * intermediate, hidden) * hidden**-0.5
    down = normal(num_experts, hidden, intermediate) * intermediate**-0.5
    x, logits = normal(tokens, hidden), normal(tokens, num_experts)
    weights, chosen = route_node_limited(
        logits, torch.zeros(num_experts, device=device), num_nodes=4, top_nodes=2, top_k=4
    )
    y = moe_layer(x, Experts.quantize(gate_up, down), weights, chosen)
    print(f"{device}: {tokens} tokens, {num_experts} experts: {list(y.shape)}, rms {y.std():.4f}")


if __name__ == "__main__":
    main()

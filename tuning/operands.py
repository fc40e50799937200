"""Operands that benchmarks and the tuner share."""

from __future__ import annotations

import functools
from typing import Any

from ..api_quantize import quantize


@functools.lru_cache(maxsize=1)
def make_weights(
    num_groups: int, n: int, k: int, device: str, scale_rows: int = 128
) -> tuple[Any, Any]:
    """B and sfb, which all m of a problem share: [n, k], or [num_groups, n, k] if there are groups.

    As of a trained layer, whose results are of the size of its inputs.

    scale_rows : of B that share a scale, 1 or 128
    """
    import torch

    generator = torch.Generator(device).manual_seed(n)
    b = torch.empty(max(num_groups, 1), n, k, dtype=torch.float8_e4m3fn, device=device)
    sfb = torch.empty(max(num_groups, 1), -(-n // scale_rows), -(-k // 128), device=device)
    for group in range(len(b)):
        weight = torch.randn(n, k, device=device, generator=generator) * k**-0.5
        quantized, scale = quantize(weight, (scale_rows, 128))
        b[group].copy_(quantized)
        sfb[group].copy_(scale)
    return (b, sfb) if num_groups else (b[0], sfb[0])

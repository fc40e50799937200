"""What tracing sees of the torch operators: shapes, dtypes and strides of their results."""

from __future__ import annotations

from typing import Any

import torch


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    **_: Any,
) -> torch.Tensor:
    torch._check(a.shape[1] == b.shape[1], lambda: "a and b must agree in k")
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype or torch.bfloat16)


def grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    _sfa: torch.Tensor,
    _sfb: torch.Tensor,
    groups: torch.Tensor,
    *,
    layout: str,
    out_dtype: torch.dtype | None = None,
    **_: Any,
) -> torch.Tensor:
    torch._check(a.shape[-1] == b.shape[-1], lambda: "a and b must agree in k")
    if layout == "k_grouped":
        shape = groups.shape[0] - 1, a.shape[0], b.shape[0]
        return a.new_empty(shape, dtype=out_dtype or torch.float32)
    return a.new_empty((*a.shape[:-1], b.shape[1]), dtype=out_dtype or torch.bfloat16)


def swiglu(
    a: torch.Tensor, b: torch.Tensor, *_: torch.Tensor, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    columns = b.shape[-2] // 2
    d = a.new_empty((*a.shape[:-1], columns), dtype=torch.float8_e4m3fn)
    return d, a.new_empty((*a.shape[:-1], columns // 128), dtype=torch.float32)


def mla_decode(
    q: torch.Tensor, *_: torch.Tensor, head_dim_v: int = 512, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, num_queries, num_heads, _head_dim = q.shape
    o = q.new_empty((batch, num_queries, num_heads, head_dim_v))
    return o, q.new_empty((batch, num_heads, num_queries), dtype=torch.float32)


def mla_decode_out(q: torch.Tensor, *_: torch.Tensor, out: torch.Tensor, **__: Any) -> torch.Tensor:
    return mla_decode(q)[1]


def nothing(*_: torch.Tensor, **__: Any) -> None:
    return None


def quantize(x: torch.Tensor, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    grid = (x.shape[0] + rows - 1) // rows, (x.shape[1] + 127) // 128
    quantized = torch.empty_like(
        x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format
    )
    return quantized, x.new_empty(grid, dtype=torch.float32)


def quantize_both(
    x: torch.Tensor, rows: int = 1, columns: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *outer, m, n = x.shape
    blocks_m, blocks_n = (m + 127) // 128, (n + 127) // 128

    def scales(*shape: int) -> torch.Tensor:
        return x.new_empty((*outer, *shape), dtype=torch.float32)

    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    transposed = x.new_empty((*outer, n, 128 * blocks_m), dtype=torch.float8_e4m3fn)
    of_columns = scales(blocks_m, n).mT if columns == 1 else scales(blocks_n, blocks_m)
    return codes, scales(m if rows == 1 else blocks_m, blocks_n), transposed, of_columns

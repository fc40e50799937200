"""deep_gemm's cuBLASLt GEMMs, without scales: what its tests and benchmarks compare with."""

from __future__ import annotations

import torch


def cublaslt_gemm_nt(
    a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None = None
) -> None:
    """d = a @ b^T, or c + a @ b^T, by cuBLASLt; a [m, k], b [n, k], FP8 or BF16, d [m, n]."""
    if a.dtype != torch.float8_e4m3fn:
        product = torch.mm(a, b.t()).to(d.dtype)
    else:
        one = torch.ones((), device=a.device)
        product = torch._scaled_mm(a, b.t(), one, one, out_dtype=d.dtype)
    torch.add(product, c, out=d) if c is not None else d.copy_(product)


def cublaslt_gemm_nn(
    a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None = None
) -> None:
    """As `cublaslt_gemm_nt`, with b [k, n]."""
    cublaslt_gemm_nt(a, b.t(), d, c)


def cublaslt_gemm_tn(
    a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None = None
) -> None:
    """As `cublaslt_gemm_nt`, with a [k, m] and b [k, n]."""
    cublaslt_gemm_nt(a.t(), b.t(), d, c)


def cublaslt_gemm_tt(
    a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None = None
) -> None:
    """As `cublaslt_gemm_nt`, with a [k, m]."""
    cublaslt_gemm_nt(a.t(), b, d, c)

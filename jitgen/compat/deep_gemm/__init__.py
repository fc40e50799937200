"""DeepGEMM 2.6's interface on Hopper, on jitgen's kernels: `import jitgen.compat.deep_gemm as
deep_gemm`.

Names, arguments and meaning are DeepGEMM's: https://github.com/deepseek-ai/DeepGEMM. FP8 only, with
float32 scales: 1x128 blocks of a, 128x128 blocks of b. What is not here raises NotImplementedError
when it is called. CPU tensors run on the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from .. import refuse
from . import utils
from .baseline import cublaslt_gemm_nn, cublaslt_gemm_nt, cublaslt_gemm_tn, cublaslt_gemm_tt
from .gemm import (
    fp8_gemm_nn,
    fp8_gemm_nt,
    fp8_gemm_tn,
    fp8_gemm_tt,
    k_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nn_contiguous,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from .settings import (
    get_num_sms,
    get_pdl,
    get_tc_util,
    set_block_size_multiple_of,
    set_ignore_compile_dims,
    set_num_sms,
    set_pdl,
    set_tc_util,
)
from .utils import (
    align,
    ceil_div,
    ceil_to_ue8m0,
    get_k_alignment_for_contiguous_layout,
    get_m_alignment_for_contiguous_layout,
    get_mk_alignment_for_contiguous_layout,
    get_mn_major_tma_aligned_tensor,
    get_theoretical_mk_alignment_for_contiguous_layout,
    get_tma_aligned_size,
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_custom_dims_cast_to_fp8,
    per_token_cast_to_fp8,
    set_mk_alignment_for_contiguous_layout,
    transform_sf_into_required_layout,
)

fp8_fp4_gemm_nt = fp8_gemm_nt
fp8_fp4_gemm_nn = fp8_gemm_nn
fp8_fp4_gemm_tn = fp8_gemm_tn
fp8_fp4_gemm_tt = fp8_gemm_tt
m_grouped_fp8_fp4_gemm_nt_contiguous = m_grouped_fp8_gemm_nt_contiguous
m_grouped_fp8_fp4_gemm_nn_contiguous = m_grouped_fp8_gemm_nn_contiguous
m_grouped_fp8_fp4_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked
fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked

# What DeepGEMM has and this has not, with the reason.
UNSUPPORTED = utils.UNSUPPORTED | {
    name: reason
    for names, reason in (
        (
            "bf16_gemm_nt bf16_gemm_nn bf16_gemm_tn bf16_gemm_tt bf16_m_grouped_gemm_nt_masked"
            " m_grouped_bf16_gemm_nt_contiguous m_grouped_bf16_gemm_nn_contiguous"
            " m_grouped_bf16_gemm_nt_masked k_grouped_bf16_gemm_tn_contiguous",
            "jitgen multiplies FP8",
        ),
        (
            "k_grouped_fp8_gemm_tn_contiguous fp8_fp4_mega_moe bf16_mega_moe SymmBuffer"
            " get_symm_buffer_for_mega_moe transform_weights_for_mega_moe",
            "it is for Blackwell, jitgen for Hopper",
        ),
        (
            "einsum fp8_einsum fp8_gemm_nt_skip_head_mid fp8_mqa_logits fp8_paged_mqa_logits"
            " fp8_fp4_mqa_logits fp8_fp4_paged_mqa_logits get_paged_mqa_logits_metadata"
            " tf32_hc_prenorm_gemm",
            "jitgen has no such kernel",
        ),
    )
    for name in names.split()
}


def __getattr__(name: str) -> Callable[..., NoReturn]:
    return refuse(__name__, name, UNSUPPORTED)


__all__ = [
    "align",
    "ceil_div",
    "ceil_to_ue8m0",
    "cublaslt_gemm_nn",
    "cublaslt_gemm_nt",
    "cublaslt_gemm_tn",
    "cublaslt_gemm_tt",
    "fp8_fp4_gemm_nn",
    "fp8_fp4_gemm_nt",
    "fp8_fp4_gemm_tn",
    "fp8_fp4_gemm_tt",
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "fp8_m_grouped_gemm_nt_masked",
    "get_k_alignment_for_contiguous_layout",
    "get_m_alignment_for_contiguous_layout",
    "get_mk_alignment_for_contiguous_layout",
    "get_mn_major_tma_aligned_tensor",
    "get_num_sms",
    "get_pdl",
    "get_tc_util",
    "get_theoretical_mk_alignment_for_contiguous_layout",
    "get_tma_aligned_size",
    "k_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_fp4_gemm_nn_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_masked",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_custom_dims_cast_to_fp8",
    "per_token_cast_to_fp8",
    "set_block_size_multiple_of",
    "set_ignore_compile_dims",
    "set_mk_alignment_for_contiguous_layout",
    "set_num_sms",
    "set_pdl",
    "set_tc_util",
    "transform_sf_into_required_layout",
    "utils",
]

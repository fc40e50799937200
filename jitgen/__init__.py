"""jitgen: a compiler-style JIT kernel generator for NVIDIA Hopper GPUs."""

from .api import bind, gemm, grouped_gemm
from .api_merge import merge_states
from .api_mla import mla_decode, mla_decode_sparse, quantize_mla_cache
from .api_quantize import quantize, quantize_both
from .calls_mla import MlaPlan
from .control import configure, stats
from .dtypes import BF16, E4M3, F16, F32, DType
from .errors import (
    CompileError,
    DeviceError,
    JitForbiddenError,
    JitgenError,
    ProblemError,
    ScheduleError,
    StoreError,
    VerifyError,
)
from .expr import acc, cast, gate, gelu, matrix, maximum, per_row, relu, scalar, silu, up, vector
from .layouts import Contiguous, KGrouped, Masked, Ragged
from .merge import MergeSchedule, MergeStates
from .plans import Plan, plan
from .problem import Gemm, GroupedGemm, ScaleBlock, supports
from .problem_mla import MlaDecode
from .quantization import Quantization, QuantizationSchedule
from .runtime.stats import Stats
from .schedule import Schedule
from .schedule_mla import MlaSchedule

__version__ = "0.1.0"

__all__ = [
    "BF16",
    "E4M3",
    "F16",
    "F32",
    "CompileError",
    "Contiguous",
    "DType",
    "DeviceError",
    "Gemm",
    "GroupedGemm",
    "JitForbiddenError",
    "JitgenError",
    "KGrouped",
    "Masked",
    "MergeSchedule",
    "MergeStates",
    "MlaDecode",
    "MlaPlan",
    "MlaSchedule",
    "Plan",
    "ProblemError",
    "Quantization",
    "QuantizationSchedule",
    "Ragged",
    "ScaleBlock",
    "Schedule",
    "ScheduleError",
    "Stats",
    "StoreError",
    "VerifyError",
    "acc",
    "bind",
    "cast",
    "configure",
    "gate",
    "gelu",
    "gemm",
    "grouped_gemm",
    "matrix",
    "maximum",
    "merge_states",
    "mla_decode",
    "mla_decode_sparse",
    "per_row",
    "plan",
    "quantize",
    "quantize_both",
    "quantize_mla_cache",
    "relu",
    "scalar",
    "silu",
    "stats",
    "supports",
    "up",
    "vector",
]

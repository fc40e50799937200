"""jitgen: a compiler-style JIT kernel generator for NVIDIA Hopper GPUs."""

from .api import bind, gemm, quantize
from .api_mla import mla_decode
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
from .expr import acc, cast, gelu, matrix, maximum, relu, scalar, silu, vector
from .plans import Plan, plan
from .problem import Gemm, ScaleBlock, supports
from .problem_mla import MlaDecode
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
    "DType",
    "DeviceError",
    "Gemm",
    "JitForbiddenError",
    "JitgenError",
    "MlaDecode",
    "MlaPlan",
    "MlaSchedule",
    "Plan",
    "ProblemError",
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
    "gelu",
    "gemm",
    "matrix",
    "maximum",
    "mla_decode",
    "plan",
    "quantize",
    "relu",
    "scalar",
    "silu",
    "stats",
    "supports",
    "vector",
]

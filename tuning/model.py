"""The cost model: predicts a kernel's time from its schedule, so that a schedule can be chosen without measuring."""

from __future__ import annotations

import functools
from dataclasses import replace

from ..expr import acc
from ..ir import Traversal
from ..problem import Gemm
from ..schedule import BLOCK_K, Schedule
from ..target import SM90A, Target
from .space import candidates

CLOCK_GHZ = 1.7
HBM_BYTES_PER_US = 3.0e6
LAUNCH_US = 2.0
MMA_PER_CLOCK = 4096 # FP8 multiply-adds per SM and clock
L2_BYTES_PER_CLOCK = 40.0
LATENCY_CLOCKS = 1100.0
PROLOGUE_CLOCKS = 1500.0


def predict_us(problem: Gemm, schedule: Schedule, m: int, num_sms: int = SM90A.num_sms) -> float:
    """Predicted kernel time in microseconds."""
    s = schedule
    rows, columns = Traversal(s.block_m, s.block_n, s.cluster_m, s.cluster_n, 1).grid(m, problem.n)
    rounds = -(-rows * columns // (num_sms // s.cluster_size))
    k_blocks = -(-problem.k // BLOCK_K)
    overlap = 1.12 if s.num_math_warpgroups > 1 else 1.4
    mma = s.block_m * s.block_n * BLOCK_K / MMA_PER_CLOCK * overlap + 60
    load = (s.block_m / s.cluster_n + s.block_n / s.cluster_m) * BLOCK_K / L2_BYTES_PER_CLOCK
    latency = LATENCY_CLOCKS / s.num_stages
    epilogue = 400 + s.block_m * s.block_n / 32
    clocks = rounds * (k_blocks * max(mma, load, latency) + epilogue) + PROLOGUE_CLOCKS
    traffic = problem.n * problem.k + m * problem.k + m * problem.n * problem.d_dtype.size_bytes
    return LAUNCH_US + max(clocks / CLOCK_GHZ / 1e3, traffic / HBM_BYTES_PER_US)


def choose(problem: Gemm, m: int, num_sms: int = SM90A.num_sms, target: Target = SM90A) -> Schedule:
    """The schedule with the least predicted time for `m` rows; one for all m of a bucket."""
    return _choose(replace(problem, epilogue=acc), m_bucket(m), num_sms, target)


def m_bucket(m: int) -> int:
    """The least extent at or above m among 64 * (2, 3) * 2^i: what a schedule is chosen for."""
    bucket = 64
    while bucket < min(m, 65536):
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


@functools.lru_cache(maxsize=4096)
def _choose(problem: Gemm, m: int, num_sms: int, target: Target) -> Schedule:
    return min(candidates(problem, target), key=lambda schedule: predict_us(problem, schedule, m, num_sms))

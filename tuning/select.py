"""Selection: the schedule of a call, decided in one place for calls, plans and the command line.

A measured record of the user's goes before one that comes with jitgen, and that before the cost
model or, for MLA decode, `select_mla`.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import overload

from ..errors import StoreError
from ..problem import Gemm
from ..problem_mla import MlaDecode
from ..runtime import driver
from ..schedule import Schedule
from ..schedule_mla import MlaSchedule, select_mla
from ..target import H100, SM90A, Gpu
from .keys import TunedProblem, TunedSchedule, is_tunable, tuned
from .model import choose, choose_for_all, m_bucket
from .records import Key, file_of, read_file, shipped_folder, user_folder
from .space import is_legal


@overload
def select(
    problem: Gemm,
    m: int,
    gpu: Gpu = H100,
    *,
    max_keys: int | None = None,
    batch_invariant: bool = False,
) -> Schedule: ...
@overload
def select(
    problem: MlaDecode,
    m: int,
    gpu: Gpu = H100,
    *,
    max_keys: int | None = None,
    batch_invariant: bool = False,
) -> MlaSchedule: ...
def select(
    problem: TunedProblem,
    m: int,
    gpu: Gpu = H100,
    *,
    max_keys: int | None = None,
    batch_invariant: bool = False,
) -> TunedSchedule:
    """The schedule for `m` rows on `gpu`: one for all m of a bucket, so that they are finite.

    Parameters
    ----------
    problem : its epilogue and layout do not matter, unless they rule a schedule out
    m : rows of A; of a grouped problem those of all groups, see `jitgen.groups.expected_rows`; of
        MLA decode sequences
    max_keys : that a sequence of MLA decode may have, or a query token lists; None for many. Where
        what is best depends on it, records have no say: `is_tunable`
    batch_invariant : one schedule for every m, so that the bits of a row do not depend on m

    The records are read once in a process, see `reload_records`. A records file that is broken
    costs a warning and is ignored.
    """
    bucket = m_bucket(m, problem)
    records_decide = is_tunable(problem, bucket, max_keys) and not batch_invariant
    recorded = _recorded(problem, bucket, gpu) if records_decide else None
    if recorded is not None:
        return recorded
    if isinstance(problem, MlaDecode):
        return select_mla(problem, batch=bucket, max_keys=max_keys, batch_invariant=batch_invariant)
    if batch_invariant:
        return choose_for_all(problem, gpu.num_sms)
    return choose(problem, bucket, gpu.num_sms)


def named_gpu(name: str | None = None, num_sms: int | None = None) -> Gpu:
    """A GPU by its name, as the driver gives it, and its number of multiprocessors.

    By default this machine's first GPU that runs jitgen's kernels or, without one, an H100 SXM. A
    GPU that is named and is not that one has 132 SMs (H100 SXM, H200, H800) unless `num_sms` tells.
    """
    if name is None or num_sms is None:
        local = _local_gpu()
        name = name or local.name
        num_sms = num_sms or (local.num_sms if name == local.name else H100.num_sms)
    return Gpu(name, num_sms)


def _local_gpu() -> Gpu:
    for ordinal in range(driver.num_devices()):
        found = driver.device(ordinal)
        if found.compute_capability == SM90A.compute_capability:
            return found.gpu
    return H100


def reload_records() -> None:
    """Let `select` read the records anew, after they were changed."""
    _recorded.cache_clear()
    _schedules.cache_clear()


@functools.lru_cache(maxsize=4096)
def _recorded(problem: TunedProblem, bucket: int, gpu: Gpu) -> TunedSchedule | None:
    plain = tuned(problem)
    for folder in (user_folder(), shipped_folder()):
        schedule = _schedules(file_of(folder, gpu, plain)).get((gpu, plain, bucket))
        # That of an old record may be legal no more.
        if schedule is not None and is_legal(problem, schedule):
            return schedule
    return None


@functools.lru_cache(maxsize=4096)
def _schedules(path: Path) -> dict[Key, TunedSchedule]:
    """The schedules of a records file, by what they are for; none if it is broken."""
    try:
        return {record.key: record.schedule for record in read_file(path)}
    except StoreError as error:
        warnings.warn(f"tuning records ignored: {error}", stacklevel=2)
        return {}

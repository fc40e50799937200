"""Schedules of MLA decode: how a problem is mapped to the GPU. None changes bits but `overhead` and
`whole`, which decide with the lengths where sequences are split."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ScheduleError
from .problem_mla import MlaDecode
from .schedule import REGISTER_SPLIT
from .target import SM90A, Target

TILE_ROWS = 64  # query rows of a thread block: those of one wgmma
BLOCK_KEYS = 64  # keys that a math warpgroup scores at a time
CHUNK_COLUMNS = 64  # of 16 bits: 128 bytes, the swizzle span
CHUNK_BYTES = 64 * 128
GROUP_CHUNKS = 2  # chunks of a block of keys that arrive together, of a plain cache
NUM_WARPS = 12  # of a block: two math warpgroups and the producer's
LOADER_WARPS = 4  # of the producer that decode an FP8 cache, each its share of every block of keys
FP8_REGISTERS = (88, 208)  # a thread of the producer, and of the math warpgroups: as REGISTER_SPLIT
REGISTER_CHUNKS = 1
ANNOUNCEMENT_BYTES = 4 * (3 * 6 + 2)  # segments that the producer tells of: mla_plan.cuh
WALKER_BYTES = 48  # of a plan on its way: ibid.


@dataclass(frozen=True)
class MlaSchedule:
    """
    cluster : thread blocks that work on neighbouring tiles of a sequence and share its keys, 1 or 2
    num_stages : blocks of 64 keys in shared memory, 2 or 4
    prefetch : blocks of keys by which loads into L2 run ahead of those into shared memory, 0 for
        none
    overhead : what a sequence costs beside its keys, in blocks of keys, when parts of equal cost
        are cut
    score_ahead : the second math warpgroup scores its block of keys before it attends to the
        first's, not after
    whole : sequences are not split, so that the results of one do not depend on the others of its
        batch
    """

    cluster: int = 1
    num_stages: int = 2
    prefetch: int = 0
    overhead: int = 3
    score_ahead: bool = False
    whole: bool = False

    def __str__(self) -> str:
        return (
            f"cluster={self.cluster} num_stages={self.num_stages} prefetch={self.prefetch}"
            f" overhead={self.overhead} score_ahead={self.score_ahead} whole={self.whole}"
        )

    @property
    def num_math_warpgroups(self) -> int:
        """Two: each sums one half of the output's columns, and scores every other block."""
        return 2


@dataclass(frozen=True)
class MlaSmemPlan:
    """Offsets in bytes of each buffer in dynamic shared memory."""

    queries: int
    keys: int  # num_stages blocks
    p: int  # of the first math warpgroup; that of the second lies over the last chunk of queries
    states: int  # maxima and sums that the math warpgroups exchange
    barriers: int
    announcement: int
    walkers: int  # of the producer's warps, which decode an FP8 cache
    scratch: int  # of the plan
    total_bytes: int


def num_tiles(problem: MlaDecode) -> int:
    """Tiles of 64 query rows of a sequence."""
    return -(-problem.num_rows // TILE_ROWS)


def num_chunks(problem: MlaDecode) -> int:
    """Chunks of 64 columns of a key."""
    return problem.head_dim_qk // CHUNK_COLUMNS


def group_chunks(problem: MlaDecode) -> int:
    """Chunks of a block of keys that arrive together: all, where tokens are decoded whole."""
    return num_chunks(problem) if problem.is_fp8 else GROUP_CHUNKS


def register_chunks(problem: MlaDecode) -> int:
    """Chunks of Q that the math warpgroups keep in registers: over one lies the second P, unless
    that lies over the last chunk of keys."""
    return 0 if problem.is_fp8 else REGISTER_CHUNKS


def registers(problem: MlaDecode) -> tuple[int, int]:
    """Of a thread of the producer, and of a math warpgroup."""
    return FP8_REGISTERS if problem.is_fp8 else REGISTER_SPLIT[2]


def num_barriers(problem: MlaDecode, schedule: MlaSchedule) -> int:
    """A stage's full ones, of each group of chunks, and empty ones, of both halves; and Q's.

    In sparse decode a stage has 8 bytes more, which say what keys there are.
    """
    groups = -(-num_chunks(problem) // group_chunks(problem))
    return schedule.num_stages * (groups + 2 + problem.sparse) + 2


def mla_smem_plan(problem: MlaDecode, schedule: MlaSchedule) -> MlaSmemPlan:
    """Where each buffer lies: swizzled tiles first, on 1024-byte boundaries."""
    sizes = {
        "queries": num_chunks(problem) * CHUNK_BYTES,
        "keys": schedule.num_stages * num_chunks(problem) * CHUNK_BYTES,
        "p": CHUNK_BYTES,
        "states": 4 * TILE_ROWS * 4,
        "barriers": 8 * num_barriers(problem, schedule),
        "announcement": ANNOUNCEMENT_BYTES,
        "walkers": LOADER_WARPS * WALKER_BYTES if problem.is_fp8 else 0,
        "scratch": 4 * (NUM_WARPS + 2),
    }
    offset, offsets = 0, {}
    for name, size in sizes.items():
        offsets[name] = offset
        offset += size
    return MlaSmemPlan(**offsets, total_bytes=offset)


def num_parts(problem: MlaDecode, num_sms: int) -> int:
    """Parts that the keys of all sequences are cut into: as many as run at once, at least one."""
    return max(num_sms // num_tiles(problem), 1)


def select_mla(problem: MlaDecode, *, batch_invariant: bool = False) -> MlaSchedule:
    """The schedule that measured best on an H100 for problems of this kind."""
    stages = 2 if problem.head_dim_qk > 320 else 4
    if problem.is_fp8:
        return MlaSchedule(num_stages=stages, score_ahead=True, whole=batch_invariant)
    if num_tiles(problem) % 2 == 0:
        ahead = num_tiles(problem) >= 4
        return MlaSchedule(2, stages, prefetch=1, score_ahead=ahead, whole=batch_invariant)
    return MlaSchedule(num_stages=stages, whole=batch_invariant)


def check_mla_schedule(problem: MlaDecode, schedule: MlaSchedule, target: Target = SM90A) -> None:
    """Raise ScheduleError, naming the rule and the remedy, unless `schedule` can run `problem`."""
    if not isinstance(schedule, MlaSchedule):
        raise ScheduleError(f"the schedule is a {type(schedule).__name__}, must be an MlaSchedule")
    for name, legal in (
        ("cluster", (1, 2)),
        ("num_stages", (2, 4)),
        ("prefetch", range(9)),
        ("overhead", range(1, 65)),
        ("score_ahead", (False, True)),
        ("whole", (False, True)),
    ):
        value = getattr(schedule, name)
        if type(value) is not type(legal[0]) or value not in legal:
            raise ScheduleError(f"{name} = {value!r} must be one of {', '.join(map(str, legal))}")
    if num_tiles(problem) % schedule.cluster:
        raise ScheduleError(
            f"cluster = {schedule.cluster} does not divide the {num_tiles(problem)} tiles of"
            f" {problem.num_rows} query rows: choose 1"
        )
    if problem.is_fp8 and (schedule.cluster > 1 or schedule.prefetch > 1):
        raise ScheduleError(
            f"cluster = {schedule.cluster}, prefetch = {schedule.prefetch}: blocks do not share the"
            " keys of an FP8 cache, and look one block of keys ahead: choose 1, and 0 or 1"
        )
    total = mla_smem_plan(problem, schedule).total_bytes
    if total > target.smem_per_block_bytes:
        raise ScheduleError(
            f"schedule needs {total} B of shared memory, {target.arch} allows"
            f" {target.smem_per_block_bytes}: lower num_stages ({schedule.num_stages}) to 2"
        )

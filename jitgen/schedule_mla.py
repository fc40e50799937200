"""Schedules of MLA decode: how a problem is mapped to the GPU. None changes bits but `tile_rows`,
`overhead`, `slack` and `whole`, which decide with the lengths where sequences are split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from .errors import ScheduleError
from .problem_mla import TOKEN_BYTES, MlaDecode
from .schedule import REGISTER_SPLIT
from .target import SM90A, Target

TILE_ROWS = 64  # of one wgmma: query rows of a thread block, at most
ROW_BYTES = 128  # of a chunk
BLOCK_KEYS = 64  # keys that a math warpgroup scores at a time
CHUNK_COLUMNS = 64  # of 16 bits: 128 bytes, the swizzle span
CHUNK_BYTES = 64 * ROW_BYTES
GROUP_CHUNKS = 2  # chunks of a block of keys that arrive together
REGISTER_CHUNKS = 1  # of Q that the math warpgroups keep in registers: over one lies the second P
# Of an FP8 cache, registers of a thread of each warpgroup: the producer's, that of scores, two of
# outputs; with 512 threads ptxas has 128 for each, and all are used.
FP8_REGISTERS = (40, 120, 176, 176)
ANNOUNCEMENT_BYTES = 4 * (3 * 6 + 2)  # segments that the producer tells of: mla_plan.cuh
# A tile, if they are few; of 132 parts 150 MB: beyond, keys lose 2%, below they gain 10%. Blocks of
# four tiles gain 2% beyond, too: L2 has to answer 20% less, and so the GPU takes less power.
EVICT_FIRST_BLOCKS, FEW_TILES, EVICT_ALWAYS = 16, 3, 65535
# Keys of a part, up to which parts of 32 rows win, and, for each tile of a sequence, parts that
# meet, or twice as many; beyond which it pays to score ahead, for one and for two tiles.
SHORT_KEYS, MEET_KEYS, AHEAD_KEYS = 320, 256, {1: 960, 2: 2048}
# Tile rows over an FP8 cache, and up to how many tiles of 64 rows and 64 keys a multiprocessor they
# win: at 4096 keys of 128 rows 18.6, 19.4, 24.6 us with 16, 32, 64; at 16384 34, 29, 32.
FP8_SHARES = {16: 1, 32: 6}
MAX_SMALL_TILES = 16  # each has a thread block at least
H100_SMS = 132
# Structures over an FP8 cache: what is said of a block of tokens (mla_codes.cuh), what comes with
# a P, what the warpgroups know of a tile (mla_decode_fp8.cu.j2).
TOKEN_BLOCK_BYTES, P_BLOCK_BYTES, TILE_STATE_BYTES = 1552, 264, 1584


@dataclass(frozen=True)
class MlaSchedule:
    """
    tile_rows : query rows of a thread block, 32 or 64, or 16 of an FP8 cache; with fewer, more
        blocks share the work of merging a sequence's parts, and read the same keys
    num_stages : blocks of 64 keys in shared memory, 2 or 4, or 3 of an FP8 cache
    meet : 2 if the thread blocks of parts 2 i and 2 i + 1 of a tile form a cluster: what they have
        of one sequence meets in shared memory, where each sequence has parts of its own; else 1
    overhead : what a sequence costs beside its keys, in blocks of keys, when parts of equal cost
        are cut
    slack : by fewer than how many blocks of keys a part may exceed an equal share, if sequences
        then need not be cut where others begin or end
    evict_first : blocks of keys of a part, up to which their lines are the first to leave L2, so
        that others stay, which may have to be written back; beyond, it costs more than it saves;
        EVICT_ALWAYS for all
    score_ahead : the second math warpgroup scores its block of keys before it attends to the
        first's, not after; with two stages only
    whole : sequences are not split, so that the results of one do not depend on the others of its
        batch

    Over an FP8 cache meet, evict_first and score_ahead are as their defaults.
    """

    tile_rows: int = TILE_ROWS
    meet: int = 1
    num_stages: int = 2
    overhead: int = 3
    slack: int = 8
    evict_first: int = 0
    score_ahead: bool = False
    whole: bool = False

    def __str__(self) -> str:
        return (
            f"tile_rows={self.tile_rows} meet={self.meet} num_stages={self.num_stages}"
            f" overhead={self.overhead} slack={self.slack} evict_first={self.evict_first}"
            f" score_ahead={self.score_ahead} whole={self.whole}"
        )


@dataclass(frozen=True)
class MlaSmemPlan:
    """The buffers in dynamic shared memory, one behind the other: their names and bytes."""

    sizes: tuple[tuple[str, int], ...]

    @property
    def offsets(self) -> dict[str, int]:
        """Where each begins, in bytes."""
        ends = list(accumulate((size for _, size in self.sizes), initial=0))
        return {name: ends[i] for i, (name, _) in enumerate(self.sizes)}

    @property
    def total_bytes(self) -> int:
        """Of all."""
        return sum(size for _, size in self.sizes)


def num_tiles(problem: MlaDecode, tile_rows: int = TILE_ROWS) -> int:
    """Tiles of query rows of a sequence."""
    return -(-problem.num_rows // tile_rows)


def num_chunks(problem: MlaDecode) -> int:
    """Chunks of 64 columns of a key."""
    return problem.head_dim_qk // CHUNK_COLUMNS


def registers(problem: MlaDecode) -> tuple[int, ...]:
    """Of a thread of each warpgroup, the producer's first."""
    producer, math = REGISTER_SPLIT[2]
    return FP8_REGISTERS if problem.is_fp8 else (producer, math, math)


def mla_smem_plan(problem: MlaDecode, schedule: MlaSchedule) -> MlaSmemPlan:
    """Where each buffer lies: swizzled tiles first, on 1024-byte boundaries."""
    plan = _fp8_smem_plan if problem.is_fp8 else _plain_smem_plan
    return MlaSmemPlan(tuple(plan(problem, schedule).items()))


def _plain_smem_plan(problem: MlaDecode, schedule: MlaSchedule) -> dict[str, int]:
    chunks, stages, meets = num_chunks(problem), schedule.num_stages, schedule.meet > 1
    stage_barriers = -(-chunks // GROUP_CHUNKS) + 2  # full ones of each group, empty of both halves
    barriers = stages * stage_barriers + 2 + 2 * meets  # Q's; of maxima, of sums and outputs
    return {
        "queries": chunks * CHUNK_BYTES,
        "keys": stages * chunks * CHUNK_BYTES,
        "p": CHUNK_BYTES,  # of the first math warpgroup; the second's is over Q. Outputs, too
        "states": 4 * TILE_ROWS * 4,  # maxima and sums that the math warpgroups exchange
        "barriers": 8 * barriers,
        **({"maxima": TILE_ROWS * 4} if meets else {}),  # of the cluster's other part
        "announcement": ANNOUNCEMENT_BYTES,
    }


def _fp8_smem_plan(problem: MlaDecode, schedule: MlaSchedule) -> dict[str, int]:
    stages = schedule.num_stages
    return {
        "queries": num_chunks(problem) * schedule.tile_rows * ROW_BYTES,
        "p": 2 * CHUNK_BYTES,
        "tokens": stages * BLOCK_KEYS * TOKEN_BYTES,  # as they are in the cache
        "token_blocks": stages * TOKEN_BLOCK_BYTES,
        "p_blocks": 2 * P_BLOCK_BYTES,
        "states": TILE_STATE_BYTES,
        "barriers": 8 * (3 * stages + 2 * 2 + 2),  # a stage's, each P's, a segment's
        "announcement": ANNOUNCEMENT_BYTES,
    }


def num_parts(tiles: int, num_sms: int, meet: int = 1) -> int:
    """Parts that the keys of all sequences are cut into for each of `tiles` tiles: as many as run
    at once in clusters of `meet`, at least one cluster."""
    return max(num_sms // (tiles * meet), 1) * meet


def select_mla(
    problem: MlaDecode,
    *,
    batch: int | None = None,
    max_keys: int | None = None,
    batch_invariant: bool = False,
) -> MlaSchedule:
    """The schedule that measured best on an H100 for problems of this kind.

    Parameters
    ----------
    batch : sequences of the call; None for many
    max_keys : that a sequence may have; None for many
    batch_invariant : as for `mla_decode`; the others do not matter then
    """
    if problem.is_fp8:
        tile_rows = _fp8_tile_rows(problem, None if batch_invariant else batch, max_keys)
        stages = 3 if tile_rows == TILE_ROWS else 4
        return MlaSchedule(tile_rows=tile_rows, num_stages=stages, whole=batch_invariant)
    if batch is None or batch_invariant:
        batch = max_keys = None
    rows = _tile_rows(problem, batch, max_keys)
    meet = _meet(problem, rows, batch, max_keys)
    tiles, stages = num_tiles(problem, rows), 2 if problem.head_dim_qk > 320 else 4
    return MlaSchedule(
        tile_rows=rows,
        meet=meet,
        num_stages=stages,
        evict_first=EVICT_FIRST_BLOCKS * tiles if tiles <= FEW_TILES else EVICT_ALWAYS,
        score_ahead=stages == 2 and _score_ahead(tiles, meet, batch, max_keys),
        whole=batch_invariant,
    )


def _tile_rows(problem: MlaDecode, batch: int | None, max_keys: int | None) -> int:
    """Parts of few keys have fewer rows, which leaves less for the merge."""
    few = 32
    parts = num_parts(num_tiles(problem, few), H100_SMS, 2)
    if batch is None or max_keys is None or problem.num_rows <= few or 2 * batch > parts:
        return TILE_ROWS
    most = SHORT_KEYS * (2 if num_tiles(problem) == 1 or _are_pairs(batch, parts) else 1)
    return few if batch * max_keys <= most * parts else TILE_ROWS


def _meet(problem: MlaDecode, tile_rows: int, batch: int | None, max_keys: int | None) -> int:
    """2 if hardly a multiprocessor is idle then, and what meetings save is more than what they
    cost."""
    tiles = num_tiles(problem, tile_rows)
    parts = num_parts(tiles, H100_SMS, 2)
    if batch is None or parts * tiles < 0.95 * H100_SMS:
        return 1
    if tiles == 1:
        return 2 if problem.num_rows > 16 or 4 * batch > parts else 1
    if tile_rows < TILE_ROWS:  # for few keys
        return 2
    if max_keys is None or 2 * batch > parts:
        return 1
    most = MEET_KEYS * tiles * (2 if _are_pairs(batch, parts) else 1)
    return 2 if batch * max_keys <= most * parts else 1


def _are_pairs(batch: int, parts: int) -> bool:
    """Whether each of so many sequences has two parts, as a rule."""
    return 0.9 * parts < 2 * batch <= parts


def _score_ahead(tiles: int, meet: int, batch: int | None, max_keys: int | None) -> bool:
    """Whether it pays: not for few keys of one or two tiles."""
    if batch is None or max_keys is None or tiles not in AHEAD_KEYS:
        return True
    return batch * max_keys > AHEAD_KEYS[tiles] * num_parts(tiles, H100_SMS, meet)


def _fp8_tile_rows(problem: MlaDecode, batch: int | None, max_keys: int | None) -> int:
    """As many as there are, at most; fewer, in MAX_SMALL_TILES tiles at most, where that occupies
    idle multiprocessors, or where the keys of each are few: it makes loads of queries and merges
    shorter."""
    share = math.inf
    if batch is not None and max_keys is not None:
        blocks = batch * problem.num_tokens * max(-(-max_keys // BLOCK_KEYS), 1)
        share = blocks * problem.num_rows / (TILE_ROWS * H100_SMS)
    for rows, most in FP8_SHARES.items():
        is_small = share <= most and num_tiles(problem, rows) <= MAX_SMALL_TILES
        if problem.num_rows <= rows or is_small:
            return rows
    return TILE_ROWS


def key_limits() -> tuple[int | None, ...]:
    """Values of `max_keys` among which are some for each schedule that `select_mla` chooses."""
    return (None, *(BLOCK_KEYS << i for i in range(16)))


def check_mla_schedule(problem: MlaDecode, schedule: MlaSchedule, target: Target = SM90A) -> None:
    """Raise ScheduleError, naming the rule and the remedy, unless `schedule` can run `problem`."""
    if not isinstance(schedule, MlaSchedule):
        raise ScheduleError(f"the schedule is a {type(schedule).__name__}, must be an MlaSchedule")
    fp8 = problem.is_fp8
    for name, legal, of_fp8 in (
        ("tile_rows", (32, 64), (16, 32, 64)),
        ("meet", (1, 2), (1,)),
        ("num_stages", (2, 4), (2, 3, 4)),
        ("overhead", range(1, 65), range(1, 65)),
        ("slack", range(1, 17), range(1, 17)),
        ("evict_first", (*range(65), EVICT_ALWAYS), (0,)),
        ("score_ahead", (False, True), (False,)),
        ("whole", (False, True), (False, True)),
    ):
        value, allowed = getattr(schedule, name), of_fp8 if fp8 else legal
        if type(value) is not type(allowed[0]) or value not in allowed:
            note = " over an FP8 cache" * (fp8 and of_fp8 != legal)
            choices = ", ".join(map(str, allowed))
            raise ScheduleError(f"{name} = {value!r} must be one of {choices}{note}")
    if schedule.meet > 1 and schedule.whole:
        raise ScheduleError(
            f"meet = {schedule.meet}: of sequences that are whole, no parts meet: choose 1"
        )
    if schedule.score_ahead and schedule.num_stages > 2:
        raise ScheduleError(
            f"score_ahead with num_stages = {schedule.num_stages}: nothing would keep the first"
            " warpgroup from writing p while the second still reads it: choose 2"
        )
    total = mla_smem_plan(problem, schedule).total_bytes
    if total > target.smem_per_block_bytes:
        fewer = 3 if fp8 else 2
        raise ScheduleError(
            f"schedule needs {total} B of shared memory, {target.arch} allows"
            f" {target.smem_per_block_bytes}: lower num_stages ({schedule.num_stages}) to {fewer}"
        )

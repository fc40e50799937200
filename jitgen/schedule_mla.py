"""Schedules of MLA decode: how a problem is mapped to the GPU. None changes bits but `tile_rows`,
`overhead`, `slack` and `whole`, which decide with the lengths where sequences are split."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .errors import ScheduleError
from .problem_mla import TOKEN_BYTES, MlaDecode
from .schedule import REGISTER_SPLIT
from .target import SM90A, Target

TILE_ROWS = 64  # of one wgmma: query rows of a thread block, at most
ROW_BYTES = 128  # of a chunk
BLOCK_KEYS = 64  # keys that a math warpgroup scores at a time
CHUNK_COLUMNS = 64  # of 16 bits: 128 bytes, the swizzle span
CHUNK_BYTES = 64 * ROW_BYTES
GROUP_CHUNKS = 2  # chunks of a block of keys that arrive together, of a plain cache
LOADER_WARPS = 4  # of the producer that decode an FP8 cache, each its share of every block of keys
TOKEN_BLOCK_BYTES = 1040
P_BLOCK_BYTES = 264
BATCH_TOKENS = 4  # that such a warp decodes at a time
FP8_REGISTERS = (88, 208)  # a thread of the producer, and of the math warpgroups: as REGISTER_SPLIT
REGISTER_CHUNKS = 1
ANNOUNCEMENT_BYTES = 4 * (3 * 6 + 2)  # segments that the producer tells of: mla_plan.cuh
EVICT_FIRST_BLOCKS = 16  # a tile; of 132 parts 150 MB: beyond, keys lose 2%, below they gain 10%
SHORT_KEYS = 12288  # of one sequence: up to there more blocks of fewer rows win
PROGRESS_BYTES = 104  # of a warp of the producer: mla_decode.cu.j2


@dataclass(frozen=True)
class MlaSchedule:
    """
    tile_rows : query rows of a thread block, 32 or 64, or 16 of an FP8 cache; with fewer, more
        blocks share the work of merging a sequence's parts, and read the same keys. Below 64 there
        is room in shared memory for tokens of an FP8 cache that wait to be decoded; with 64, half
        as many wait in registers
    cluster : thread blocks that work on neighbouring tiles of a sequence and share its keys, 1 or
        2; tokens of an FP8 cache are decoded by one of them, and sent to the other
    num_stages : blocks of 64 keys in shared memory, 2 or 4
    meet : 2 if the thread blocks of parts 2 i and 2 i + 1 of a tile form a cluster: what they have
        of one sequence meets in shared memory, where each sequence has parts of its own; else 1
    prefetch : blocks of keys by which loads into L2 run ahead of those into shared memory, 0 for
        none
    overhead : what a sequence costs beside its keys, in blocks of keys, when parts of equal cost
        are cut
    slack : by fewer than how many blocks of keys a part may exceed an equal share, if sequences
        then need not be cut where others begin or end
    evict_first : blocks of keys of a part, up to which their lines are the first to leave L2, so
        that others stay, which may have to be written back; beyond, it costs more than it saves
    score_ahead : the second math warpgroup scores its block of keys before it attends to the
        first's, not after
    whole : sequences are not split, so that the results of one do not depend on the others of its
        batch
    """

    tile_rows: int = TILE_ROWS
    cluster: int = 1
    meet: int = 1
    num_stages: int = 2
    prefetch: int = 0
    overhead: int = 3
    slack: int = 8
    evict_first: int = 0
    score_ahead: bool = False
    whole: bool = False

    def __str__(self) -> str:
        return (
            f"tile_rows={self.tile_rows} cluster={self.cluster} meet={self.meet}"
            f" num_stages={self.num_stages} prefetch={self.prefetch} overhead={self.overhead}"
            f" slack={self.slack} evict_first={self.evict_first} score_ahead={self.score_ahead}"
            f" whole={self.whole}"
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
    # (of an FP8 cache, both lie over their blocks of keys). Outputs on their way, too: then it may
    # lie over the queries.
    tokens: int  # a block's of an FP8 cache, as they are; see `stages_tokens`
    states: int  # maxima and sums that the math warpgroups exchange
    barriers: int
    maxima: int  # of the cluster's other part
    announcement: int
    walkers: int  # of the producer's warps, which decode an FP8 cache
    token_blocks: int
    p_blocks: int
    total_bytes: int


def num_tiles(problem: MlaDecode, tile_rows: int = TILE_ROWS) -> int:
    """Tiles of query rows of a sequence."""
    return -(-problem.num_rows // tile_rows)


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


def stages_tokens(problem: MlaDecode, schedule: MlaSchedule) -> bool:
    """Whether there is room for tokens of an FP8 cache as they are, beside the decoded ones: where
    tiles have few rows."""
    return problem.is_fp8 and schedule.tile_rows < TILE_ROWS


def own_tokens(schedule: MlaSchedule) -> int:
    """Of a block of keys of an FP8 cache, those that one thread block decodes."""
    return BLOCK_KEYS // schedule.cluster


def num_token_barriers(problem: MlaDecode, schedule: MlaSchedule) -> int:
    """One for each batch of tokens in shared memory."""
    return own_tokens(schedule) // BATCH_TOKENS if stages_tokens(problem, schedule) else 0


def num_barriers(problem: MlaDecode, schedule: MlaSchedule) -> int:
    """A stage's full ones, of each group of chunks, and empty ones, of both halves; Q's; tokens'.

    In sparse decode a stage has 8 bytes more, which say what keys there are.
    """
    groups = -(-num_chunks(problem) // group_chunks(problem))
    stages = schedule.num_stages * (groups + 2 + problem.sparse)
    return stages + 2 + num_meet_barriers(schedule) + num_token_barriers(problem, schedule)


def num_meet_barriers(schedule: MlaSchedule) -> int:
    """For maxima, and for sums and outputs, of the other part of a cluster."""
    return 2 if schedule.meet > 1 else 0


def mla_smem_plan(problem: MlaDecode, schedule: MlaSchedule) -> MlaSmemPlan:
    """Where each buffer lies: swizzled tiles first, on 1024-byte boundaries."""
    if problem.is_fp8:
        stages = schedule.num_stages
        sizes = {
            "queries": num_chunks(problem) * schedule.tile_rows * ROW_BYTES,
            "p": 2 * CHUNK_BYTES,
            "tokens": stages * BLOCK_KEYS * TOKEN_BYTES,
            "token_blocks": stages * TOKEN_BLOCK_BYTES,
            "p_blocks": 2 * P_BLOCK_BYTES,
            "states": 1584,
            "barriers": 8 * (3 * stages + 6),
            "announcement": ANNOUNCEMENT_BYTES,
            "walkers": 64,
        }
        offset, offsets = 0, {}
        for name, size in sizes.items():
            offsets[name] = offset
            offset += size
        rest = {f.name: 0 for f in fields(MlaSmemPlan) if f.name not in offsets}
        return MlaSmemPlan(**{**rest, **offsets, "total_bytes": offset})
    rows = schedule.tile_rows if problem.is_fp8 else TILE_ROWS
    is_full = problem.is_fp8 and rows == 32  # 16 leave more room, and 64 have no tokens waiting
    sizes = {
        "queries": num_chunks(problem) * rows * ROW_BYTES,
        "keys": schedule.num_stages * num_chunks(problem) * CHUNK_BYTES,
        "p": 0 if is_full else CHUNK_BYTES,
        "tokens": own_tokens(schedule) * TOKEN_BYTES if stages_tokens(problem, schedule) else 0,
        "states": 4 * TILE_ROWS * 4,
        "barriers": 8 * num_barriers(problem, schedule),
        "maxima": (schedule.meet - 1) * schedule.tile_rows * 4,
        "announcement": ANNOUNCEMENT_BYTES,
        "walkers": LOADER_WARPS * PROGRESS_BYTES if problem.is_fp8 else 0,
    }
    offset, offsets = 0, {}
    for name, size in sizes.items():
        offsets[name] = offset
        offset += size
    if is_full:
        offsets["p"] = offsets["queries"]
    return MlaSmemPlan(**offsets, token_blocks=0, p_blocks=0, total_bytes=offset)


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
    stages = 2 if problem.head_dim_qk > 320 else 4
    is_single = batch == 1 and not batch_invariant
    if problem.is_fp8:
        rows = problem.num_rows
        tile_rows = next((r for r in (16, 32) if rows <= r), TILE_ROWS)
        return MlaSchedule(
            tile_rows=tile_rows,
            num_stages=3 if tile_rows == TILE_ROWS else 4,
            whole=batch_invariant,
        )
    # Parts of one sequence have few keys: with tiles of fewer rows they leave less for the merge.
    is_short = max_keys is not None and max_keys <= SHORT_KEYS
    is_split = problem.num_queries == 1 and 32 < problem.num_rows <= (128 if is_short else 64)
    tile_rows = 32 if is_single and is_split else TILE_ROWS
    tiles = num_tiles(problem, tile_rows)
    return MlaSchedule(
        tile_rows=tile_rows,
        num_stages=stages,
        evict_first=EVICT_FIRST_BLOCKS * min(tiles, 4),
        score_ahead=num_tiles(problem) >= 4,
        whole=batch_invariant,
    )


def check_mla_schedule(problem: MlaDecode, schedule: MlaSchedule, target: Target = SM90A) -> None:
    """Raise ScheduleError, naming the rule and the remedy, unless `schedule` can run `problem`."""
    if not isinstance(schedule, MlaSchedule):
        raise ScheduleError(f"the schedule is a {type(schedule).__name__}, must be an MlaSchedule")
    for name, legal in (
        ("tile_rows", (16, 32, 64) if problem.is_fp8 else (32, 64)),
        ("cluster", (1, 2)),
        ("meet", (1, 2)),
        ("num_stages", (2, 3, 4)),
        ("prefetch", range(9)),
        ("overhead", range(1, 65)),
        ("slack", range(1, 17)),
        ("evict_first", range(65)),
        ("score_ahead", (False, True)),
        ("whole", (False, True)),
    ):
        value = getattr(schedule, name)
        if type(value) is not type(legal[0]) or value not in legal:
            raise ScheduleError(f"{name} = {value!r} must be one of {', '.join(map(str, legal))}")
    tiles = num_tiles(problem, schedule.tile_rows)
    if tiles % schedule.cluster:
        raise ScheduleError(
            f"cluster = {schedule.cluster} does not divide the {tiles} tiles of"
            f" {problem.num_rows} query rows: choose 1"
        )
    if schedule.meet > 1 and (
        schedule.cluster > 1 or schedule.tile_rows < TILE_ROWS or schedule.whole or problem.is_fp8
    ):
        raise ScheduleError(
            f"meet = {schedule.meet}: of tiles that share keys or have fewer than {TILE_ROWS} rows,"
            " of sequences that are whole, and of those over an FP8 cache, no parts meet: choose 1"
        )
    ahead = 0
    if problem.is_fp8 and (schedule.prefetch, schedule.evict_first) != (ahead, 0):
        raise ScheduleError(
            f"prefetch = {schedule.prefetch}, evict_first = {schedule.evict_first}: tokens of an"
            f" FP8 cache wait in shared memory with fewer than {TILE_ROWS} rows, and else are sent"
            f" for one block of keys ahead, and their lines stay in L2: choose {ahead} and 0"
        )
    if problem.is_fp8 and schedule.score_ahead:
        raise ScheduleError(
            "score_ahead = True: the math warpgroups have no registers left for it where the"
            " producer decodes an FP8 cache, and keys would wait for room: choose False"
        )
    if not problem.is_fp8 and schedule.tile_rows < TILE_ROWS and problem.num_queries > problem.num_tokens:
        raise ScheduleError(
            f"tile_rows = {schedule.tile_rows} takes one query token, not {problem.num_queries}: a"
            f" mask by rows would spill registers: choose {TILE_ROWS}"
        )
    total = mla_smem_plan(problem, schedule).total_bytes
    if total > target.smem_per_block_bytes:
        raise ScheduleError(
            f"schedule needs {total} B of shared memory, {target.arch} allows"
            f" {target.smem_per_block_bytes}: lower num_stages ({schedule.num_stages}) to 2"
        )

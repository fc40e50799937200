"""Quantizing a matrix and its transpose at once: problem, schedule, tile program and meaning.

    kernel ::= QuantizationKernel(problem, schedule, target, tensors, body)
    body   ::= ForTiles(rows, columns, op*)
    op     ::= LoadTile(tile, x)               zeros beyond the ends of x
             | MakeScales(sf, tile, block)     one of each block of the tile
             | StoreCodes(q, tile, sf)         the tile's elements that x has, by their scales
             | Transpose(tile, tile)

Two rules, each operation of float32, rounded to nearest even:

    divide       scale = max(amax, 448 * 2^-63) / 448, q = x / scale
    reciprocal   scale = max(amax, 1e-4) * (1 / 448),  q = x * (1 / scale), as DeepGEMM's casts on a
                 GPU; of reciprocal_ue8m0 the scale is rounded up to a power of two before

A block with a NaN or an infinity has a scale that is one too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .dtypes import BF16, E4M3, F32, DType
from .errors import ProblemError, ScheduleError, VerifyError
from .ir import MlaTensor
from .ir_mla import MlaParameter
from .limits import require
from .merge import NoSmem
from .numerics import AMAX_FLOOR, E4M3_MAX, NAN_F32, ceil_to_power_of_two, round_to
from .target import SM90A, Target

TILE = 128  # rows and columns of a tile, and columns of a block
NUM_THREADS = 256
MAX_RASTER_GROUP = 64

Array = NDArray[Any]
Rule = Literal["divide", "reciprocal", "reciprocal_ue8m0"]
RULES: tuple[Rule, ...] = get_args(Rule)
_NO_SMEM = NoSmem()
_SMALLEST_AMAX = np.float32(1e-4)  # of reciprocal


@dataclass(frozen=True)
class Quantization:
    """E4M3 codes of each matrix of x [g, m, n] and of its transpose, and their scales.

    rows : 1 or 128 rows of x share a scale, of 128 columns; 0: no codes of x
    columns : 1 or 128 columns of x, rows of the transpose, share a scale, of 128 rows of x; 0: no
        transpose. It has zeros up to a multiple of 128 columns
    """

    dtype: DType = BF16
    rows: int = 1
    columns: int = 0
    rule: Rule = "divide"

    @property
    def has_tile_scale(self) -> bool:
        """Whether a block is a tile, for the matrix or its transpose."""
        return TILE in (self.rows, self.columns)

    def __str__(self) -> str:
        made = f"in {self.rows}x{TILE}" if self.rows else ""
        if self.columns:
            made += f"{' and ' * bool(made)}transposed in {self.columns}x{TILE}"
        return f"quantization of {self.dtype} x[g, m, n] {made}, {self.rule}"


@dataclass(frozen=True)
class QuantizationSchedule:
    """raster_group : tile rows that walk together."""

    raster_group: int = 8

    def __str__(self) -> str:
        return f"raster_group={self.raster_group}"


@dataclass(frozen=True)
class LoadTile:
    """`tile` = the tile of x."""

    tile: str
    x: MlaTensor

    def __str__(self) -> str:
        return f"{self.tile} = load {self.x.name}[g, m:+{TILE}, n:+{TILE}]"


@dataclass(frozen=True)
class Transpose:
    """`tile` = the transpose of another."""

    tile: str
    src: str

    def __str__(self) -> str:
        return f"{self.tile} = transpose({self.src})"


@dataclass(frozen=True)
class MakeScales:
    """`sf` = a scale of each block of `rows` x TILE elements of `tile`."""

    sf: MlaTensor
    tile: str
    rows: int
    rule: Rule

    def __str__(self) -> str:
        return f"store {self.sf.name} = scale(amax({self.tile}, {self.rows}x{TILE}), {self.rule})"


@dataclass(frozen=True)
class StoreCodes:
    """`q` = the codes of `tile` by the scales `sf`."""

    q: MlaTensor
    tile: str
    sf: MlaTensor
    rule: Rule

    def __str__(self) -> str:
        return f"store {self.q.name} = e4m3({self.tile} / {self.sf.name})"


Op = LoadTile | Transpose | MakeScales | StoreCodes


@dataclass(frozen=True)
class ForTiles:
    """`body` for each tile of rows x columns of x; a thread block has one."""

    rows: int
    columns: int
    body: tuple[Op, ...]


@dataclass(frozen=True)
class QuantizationKernel:
    """A lowered kernel: what the interpreter runs, the template renders and the verifier checks."""

    name: str
    family: str
    problem: Quantization
    schedule: QuantizationSchedule
    target: Target
    tensors: tuple[MlaTensor, ...]
    body: ForTiles
    smem: NoSmem = _NO_SMEM
    num_threads: int = NUM_THREADS

    @property
    def parameters(self) -> tuple[MlaParameter, ...]:
        """The kernel's arguments, in order."""
        kinds = {"x": f"const {self.problem.dtype.cuda}*", "q": f"{E4M3.cuda}*", "sf": "float*"}
        pointers = [
            MlaParameter(t.name, f"{kinds[t.name.removesuffix('_t')]} {t.name}")
            for t in self.tensors
        ]
        return (*pointers, *(MlaParameter(name, f"u32 {name}") for name in ("m", "n", "stride")))

    def __str__(self) -> str:
        body = self.body
        return "\n".join(
            (
                f"kernel {self.name}({', '.join(map(str, self.tensors))})",
                f"  schedule {self.schedule}",
                f"  for tile g:1 m:{body.rows} n:{body.columns}:",
                *(f"    {op}" for op in body.body),
            )
        )


def check_quantization(problem: Quantization) -> None:
    """Raise ProblemError, naming the rule and what is legal, unless `problem` keeps all rules."""
    if problem.dtype not in (BF16, F32):
        name = getattr(problem.dtype, "name", repr(problem.dtype))
        raise ProblemError(f"x has dtype {name}, must be {BF16.name} or {F32.name}")
    for name in ("rows", "columns"):
        extent = getattr(problem, name)
        if type(extent) is not int or extent not in (0, 1, TILE):
            raise ProblemError(f"{name} = {extent!r} must be 0, 1 or {TILE}")
    if not problem.rows and not problem.columns:
        raise ProblemError("rows and columns are 0: nothing would be made")
    if problem.rule not in RULES:
        raise ProblemError(f"rule {problem.rule!r} must be one of {', '.join(RULES)}")


def quantization_tensors(problem: Quantization) -> tuple[MlaTensor, ...]:
    """x, and q, sf, q_t and sf_t, of which the problem may lack two.

    sf_t lies as [g, m / 128, n] where columns have scales of their own: neighbours are made
    together.
    """
    tensors = [MlaTensor("x", problem.dtype.short, ("g", "m", "n"))]
    if problem.rows:
        of_rows = "m" if problem.rows == 1 else f"ceil(m/{TILE})"
        tensors += [
            MlaTensor("q", E4M3.short, ("g", "m", "n")),
            MlaTensor("sf", F32.short, ("g", of_rows, f"ceil(n/{TILE})")),
        ]
    if problem.columns:
        blocks = f"ceil(m/{TILE})"
        shape = (blocks, "n") if problem.columns == 1 else (f"ceil(n/{TILE})", blocks)
        tensors += [
            MlaTensor("q_t", E4M3.short, ("g", "n", f"{TILE}*{blocks}")),
            MlaTensor("sf_t", F32.short, ("g", *shape)),
        ]
    return tuple(tensors)


def output_shapes(problem: Quantization, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors made of x [g, m, n] or [m, n], as they lie in memory."""
    *outer, m, n = shape
    blocks_m, blocks_n = math.ceil(m / TILE), math.ceil(n / TILE)
    shapes = {
        "q": (m, n),
        "sf": (m if problem.rows == 1 else blocks_m, blocks_n),
        "q_t": (n, TILE * blocks_m),
        "sf_t": (blocks_m, n) if problem.columns == 1 else (blocks_n, blocks_m),
    }
    made = [tensor.name for tensor in quantization_tensors(problem)[1:]]
    return {name: (*outer, *shapes[name]) for name in made}


def lower_quantization(
    problem: Quantization, schedule: QuantizationSchedule, target: Target = SM90A
) -> QuantizationKernel:
    """The tile program of `problem` under `schedule`.

    Raises
    ------
    ProblemError, ScheduleError : a rule is broken
    """
    check_quantization(problem)
    group = schedule.raster_group
    if type(group) is not int or not 1 <= group <= MAX_RASTER_GROUP:
        raise ScheduleError(f"raster_group = {group!r} must be in 1..{MAX_RASTER_GROUP}")
    tensors = quantization_tensors(problem)
    return QuantizationKernel(
        name=f"quantize_{problem.dtype}_r{problem.rows}_c{problem.columns}_{problem.rule}_g{group}",
        family="quantize",
        problem=problem,
        schedule=schedule,
        target=target,
        tensors=tensors,
        body=ForTiles(TILE, TILE, _body(problem, {t.name: t for t in tensors})),
    )


def _body(problem: Quantization, tensors: dict[str, MlaTensor]) -> tuple[Op, ...]:
    ops: list[Op] = [LoadTile("tile", tensors["x"])]
    for end, tile, block in (("", "tile", problem.rows), ("_t", "tile_t", problem.columns)):
        if not block:
            continue
        if end:
            ops.append(Transpose(tile, "tile"))
        q, sf = tensors[f"q{end}"], tensors[f"sf{end}"]
        ops.append(MakeScales(sf, tile, block, problem.rule))
        ops.append(StoreCodes(q, tile, sf, problem.rule))
    return tuple(ops)


def verify_quantization(kernel: QuantizationKernel) -> None:
    """Raise VerifyError, naming the op and the rule, unless `kernel` is sound: each tensor is made
    once, of x or of its transpose, codes by scales that are there before them."""
    problem, body = kernel.problem, kernel.body
    try:
        check_quantization(problem)
    except ProblemError as error:
        raise VerifyError(f"{kernel.name}: {error}") from error
    tensors = quantization_tensors(problem)
    require(kernel.tensors == tensors, kernel.name, f"takes {kernel.tensors}, not {tensors}")
    tile = body.rows, body.columns
    require(tile == (TILE, TILE), kernel.name, f"a tile must be {TILE}x{TILE}, is {tile}")
    require(kernel.num_threads == NUM_THREADS, kernel.name, f"needs {NUM_THREADS} threads a block")
    named = {tensor.name: tensor for tensor in tensors}
    tiles: dict[str, str] = {}  # to the suffix of what is made of them
    made: dict[str, str] = {}  # tensors to the tiles they are of
    for op in body.body:
        match op:
            case LoadTile():
                require(not tiles and op.x == named["x"], op, "must load x, once and first")
                tiles[op.tile] = ""
            case Transpose():
                require(tiles.get(op.src) == "", op, "must transpose the tile of x")
                require(op.tile not in tiles, op, "must not be another tile")
                tiles[op.tile] = "_t"
            case MakeScales() | StoreCodes():
                _verify_made(op, problem, named, tiles, made)
    missing = sorted(set(named) - set(made) - {"x"})
    require(not missing, kernel.name, f"does not make {', '.join(missing)}")


def _verify_made(
    op: MakeScales | StoreCodes,
    problem: Quantization,
    named: dict[str, MlaTensor],
    tiles: dict[str, str],
    made: dict[str, str],
) -> None:
    end = tiles.get(op.tile)
    require(end is not None, op, "must be of a tile that is there")
    require(op.rule == problem.rule, op, f"must go by the rule {problem.rule}")
    dst = op.sf if isinstance(op, MakeScales) else op.q
    kind = "sf" if isinstance(op, MakeScales) else "q"
    require(dst == named.get(f"{kind}{end}"), op, f"must make {kind}{end} of the problem")
    require(dst.name not in made, op, "must be made once")
    if isinstance(op, MakeScales):
        block = problem.columns if end else problem.rows
        require(op.rows == block, op, f"a block must be {block}x{TILE}")
    else:
        require(made.get(op.sf.name) == op.tile, op, "its scales must be of this tile, made before")
    made[dst.name] = op.tile


def interpret_quantization(
    kernel: QuantizationKernel, arrays: Mapping[str, Array]
) -> dict[str, Array]:
    """What is made of arrays by name, x [g, m, n] or [m, n], by name: each op on all tiles of a
    matrix at once."""
    x = arrays["x"]
    if x.ndim > 2:
        of_matrices = [interpret_quantization(kernel, {"x": matrix}) for matrix in x]
        shapes = output_shapes(kernel.problem, x.shape)
        return {
            tensor.name: np.array(
                [made[tensor.name] for made in of_matrices],
                E4M3.numpy if tensor.dtype == E4M3.short else np.float32,
            ).reshape(shapes[tensor.name])
            for tensor in kernel.tensors[1:]
        }
    shapes = output_shapes(kernel.problem, x.shape)
    tiles: dict[str, Array] = {}
    scales: dict[str, Array] = {}  # of each block, spread over its elements
    made: dict[str, Array] = {}
    for op in kernel.body.body:
        match op:
            case LoadTile():
                ends = [(0, -extent % TILE) for extent in x.shape]
                tiles[op.tile] = np.pad(x.astype(np.float32), ends)
            case Transpose():
                tiles[op.tile] = tiles[op.src].T
            case MakeScales():
                sf = _scales(tiles[op.tile], op.rows, op.rule)
                scales[op.sf.name] = sf.repeat(op.rows, axis=0).repeat(TILE, axis=1)
                shape = shapes[op.sf.name]
                by_column = op.sf.name == "sf_t" and op.rows == 1  # it lies the other way round
                made[op.sf.name] = np.ascontiguousarray(
                    sf.T[:, : shape[1]] if by_column else sf[: shape[0], : shape[1]]
                )
            case StoreCodes():
                rows, columns = shapes[op.q.name]
                codes = _codes(tiles[op.tile], scales[op.sf.name], op.rule)
                made[op.q.name] = np.ascontiguousarray(codes[:rows, :columns])
    return {name: made[name] for name in shapes}


def _scales(values: Array, rows: int, rule: Rule) -> Array:
    """One scale a block of rows x TILE."""
    m, n = values.shape
    amax = np.abs(values).reshape(m // rows, rows, n // TILE, TILE).max(axis=(1, 3), initial=0)
    with np.errstate(invalid="ignore"):
        if rule == "divide":
            sf = np.maximum(amax, np.float32(AMAX_FLOOR)) / np.float32(E4M3_MAX)
        else:
            sf = np.maximum(amax, _SMALLEST_AMAX) * (np.float32(1) / np.float32(E4M3_MAX))
    if rule == "reciprocal_ue8m0":
        sf = ceil_to_power_of_two(sf)
    return np.where(np.isnan(sf), NAN_F32, sf)


def _codes(values: Array, scales: Array, rule: Rule) -> Array:
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if rule == "divide":
            return round_to(values / scales, E4M3)
        return round_to(values * (np.float32(1) / scales), E4M3)


def quantization_context(kernel: QuantizationKernel) -> dict[str, Any]:
    """The template's variables beside the kernel."""
    problem = kernel.problem
    return {
        "dtype": problem.dtype.cuda,
        "parameters": [parameter.cuda for parameter in kernel.parameters],
        "constants": {
            "kTile": kernel.body.rows,
            "kBlockRows": problem.rows,
            "kBlockColumns": problem.columns,
            "kRule": RULES.index(problem.rule),
            "kRasterGroup": kernel.schedule.raster_group,
            "kBlocksPerSm": 4 if problem.dtype == BF16 else 2,
        },
    }


def num_quantization_blocks(kernel: QuantizationKernel, shape: tuple[int, ...]) -> int:
    """The grid of a launch for x of `shape`."""
    *outer, m, n = shape
    return math.prod(outer) * math.ceil(m / kernel.body.rows) * math.ceil(n / kernel.body.columns)

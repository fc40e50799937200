"""Problems: what the user fixed. A problem says what is computed, never how."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

from .dtypes import BF16, E4M3, F32, DType
from .errors import ProblemError
from .expr import Expr, acc, check_expr, gate, is_gated, operands, up

MAX_EXTENT = 2**31 - 1  # coordinates of a TMA box are int32
MAX_GROUPS = 512
K_UNIT = 128  # of layout k_grouped, that each group's k is a multiple of
TENSOR_NAMES = ("a", "b", "sfa", "sfb", "d", "sfd", "groups")  # not for an epilogue's operands

# How the groups' rows lie in A and D, and what the int32 tensor `groups` says of them:
#   ragged        A [m, k]; rows groups[g] .. groups[g + 1] are group g's
#   group_ends    A [m, k]; group g begins at the first multiple of `alignment` from groups[g - 1]
#                 on and ends at groups[g]
#   group_of_row  A [m, k]; row r is group groups[r]'s, or none's if that is -1
#   masked        A [num_groups, m, k]; the first groups[g] rows of A[g] are group g's
#   k_grouped     A [m, k], B [n, k], D [num_groups, m, n]; columns groups[g] .. groups[g + 1] of A
#                 and of B are group g's
Layout = Literal["ragged", "group_ends", "group_of_row", "masked", "k_grouped"]


@dataclass(frozen=True)
class ScaleBlock:
    """Granularity of scales: one float32 scale a block of `rows` x `k` elements of an operand."""

    rows: int
    k: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.k}"


D_SCALE = ScaleBlock(1, 128)


@dataclass(frozen=True)
class Gemm:
    """D = epilogue((A * sfa) @ (B * sfb)^T): A [m, k], B [n, k], both K-major; m is run-time.

    sfa is float32 [m, ceil(k / a_scale.k)],
    sfb float32 [ceil(n / b_scale.rows), ceil(k / b_scale.k)]: b_scale is 128x128 or 1x128.

    An epilogue of `gate` and `up` makes one column of D of two rows of B. D in E4M3 gets scales of
    its own, float32 [m, columns / 128]: amax / 448 of each 1x128 block; with ue8m0 rounded up to
    powers of two.
    """

    n: int
    k: int
    d_dtype: DType = BF16
    epilogue: Expr = acc
    a_dtype: DType = E4M3
    b_dtype: DType = E4M3
    a_scale: ScaleBlock = ScaleBlock(1, 128)
    b_scale: ScaleBlock = ScaleBlock(128, 128)
    ue8m0: bool = False

    @property
    def num_halves(self) -> int:
        """Rows of B that make a column of D."""
        return 2 if is_gated(self.epilogue) else 1

    @property
    def max_k(self) -> int:
        """Most positions of k that a tile sums over: k, where it is compiled in."""
        return self.k

    @property
    def columns(self) -> int:
        """Columns of D."""
        return self.n // self.num_halves

    @property
    def is_quantized(self) -> bool:
        """Whether D has scales."""
        return self.d_dtype == E4M3

    def __str__(self) -> str:
        scaled = f" scaled {D_SCALE}{' ue8m0' * self.ue8m0}" if self.is_quantized else ""
        k = self.k or "k"
        text = (
            f"gemm {self.a_dtype}[m, {k}] scaled {self.a_scale}"
            f" x {self.b_dtype}[{self.n}, {k}] scaled {self.b_scale}"
            f" -> {self.d_dtype}[m, {self.columns}]{scaled}"
        )
        return text if self.epilogue == acc else f"{text}, {self.epilogue}"


@dataclass(frozen=True)
class GroupedGemm(Gemm):
    """A Gemm for each group of rows, with a B of its own: B [num_groups, n, k], sfb accordingly.

    The rows of each group are known on the device only; `Layout` says how. Rows of no group are
    neither read into a result nor written. An epilogue's vectors are [num_groups, n]; its matrices
    have the rows of D.

    With layout k_grouped, groups share the rows, and k is theirs instead: D[g] += the product over
    the columns of A and B that are group g's, in float32; in bfloat16 D[g] is set to it. `k` is 0
    then, for it is known at run time only. See `of_k_groups`.

    alignment : of group_ends and k_grouped, a multiple of which each group begins at; 1 for other
        layouts
    """

    num_groups: int = field(default=1, kw_only=True)
    layout: Layout = field(default="ragged", kw_only=True)
    alignment: int = field(default=1, kw_only=True)

    @property
    def max_k(self) -> int:
        return MAX_EXTENT // K_UNIT * K_UNIT if is_k_grouped(self) else self.k

    def __str__(self) -> str:
        how = f"{self.layout} to {self.alignment}" if self.alignment > 1 else self.layout
        return f"{self.num_groups} groups, {how}, of {super().__str__()}"

    @property
    def of_one_group(self) -> Gemm:
        """What is computed for the rows of each group."""
        return Gemm(**{field.name: getattr(self, field.name) for field in fields(Gemm)})


def of_k_groups(
    n: int, num_groups: int, d_dtype: DType = F32, b_scale: ScaleBlock = ScaleBlock(1, 128)
) -> GroupedGemm:
    """The problem of weight gradients, D[g] += A[:, ks_g] @ B[:, ks_g]^T in float32, B [n, k]; or,
    with d_dtype bfloat16, D[g] = that."""
    return GroupedGemm(
        *(n, 0, d_dtype),
        b_scale=b_scale,
        num_groups=num_groups,
        layout="k_grouped",
        alignment=K_UNIT,
    )


def as_tuned(problem: Gemm) -> Gemm:
    """What schedules are chosen and measured for in the problem's place.

    It has the least epilogue of as many columns, and its groups' rows lie as in `ragged`: one after
    the other. Scales of D are not rounded.
    """
    plain = replace(problem, epilogue=gate * up if is_gated(problem.epilogue) else acc, ue8m0=False)
    if isinstance(plain, GroupedGemm) and not is_k_grouped(plain):
        return replace(plain, layout="ragged", alignment=1)
    return plain


def tuned_name(problem: Gemm) -> str:
    """A name of `as_tuned`, types and scales left out: of records' files and the tuner's jobs."""
    groups = f"g{problem.num_groups}-" if isinstance(problem, GroupedGemm) else ""
    return f"{groups}n{problem.n}-{'by-k' if is_k_grouped(problem) else f'k{problem.k}'}"


def is_masked(problem: Gemm) -> bool:
    """Whether A and D are a matrix for each group; else all groups share their m rows."""
    return isinstance(problem, GroupedGemm) and problem.layout == "masked"


def is_k_grouped(problem: Gemm) -> bool:
    """Whether groups have a part of k each, and D a matrix for each; A and B have one for all."""
    return isinstance(problem, GroupedGemm) and problem.layout == "k_grouped"


def adds_to_d(problem: Gemm) -> bool:
    """Whether D is added to, not set."""
    return is_k_grouped(problem) and problem.d_dtype == F32


@dataclass(frozen=True)
class Support:
    """The answer of `supports`: true or false, the broken rule, and the nearest legal problem."""

    reason: str = ""
    nearest: Gemm | None = None

    def __bool__(self) -> bool:
        return not self.reason


def supports(problem: Gemm) -> Support:
    """Whether jitgen can run `problem`; if not, the broken rule and the nearest legal problem."""
    try:
        check_problem(problem)
    except ProblemError as error:
        return Support(str(error), _nearest(problem))
    return Support()


def check_problem(problem: Gemm) -> None:
    """Raise ProblemError, naming the rule and what is legal, unless `problem` keeps all rules."""
    if not isinstance(problem, Gemm):
        raise ProblemError(f"a problem is a Gemm, got {type(problem).__name__}")
    check_expr(problem.epilogue)
    _check_extent("n", problem.n, *_unit_of_n(problem))
    if is_k_grouped(problem):
        _check_k_groups(problem)
    else:
        _check_extent("k", problem.k, 16, "rows of A and B are loaded in units of 16 bytes")
    for name, dtype in (("a", problem.a_dtype), ("b", problem.b_dtype)):
        if dtype != E4M3:
            raise ProblemError(f"{name} has dtype {_name(dtype)}, must be {E4M3.name}")
    if problem.d_dtype not in (BF16, F32, E4M3):
        raise ProblemError(
            f"d has dtype {_name(problem.d_dtype)}, must be {BF16.name}, {F32.name} or {E4M3.name}"
        )
    for name, block, legal in (
        ("a_scale", problem.a_scale, (ScaleBlock(1, 128),)),
        ("b_scale", problem.b_scale, legal_b_scales(problem)),
    ):
        if block not in legal:
            must = " or ".join(map(str, legal))
            raise ProblemError(f"{name} has one scale a {block} block, must be {must}")
    check_operand_names(operand.name for operand in operands(problem.epilogue))
    if problem.ue8m0 and not problem.is_quantized:
        raise ProblemError(f"ue8m0 is of the scales of D, which {problem.d_dtype.name} has not")
    if isinstance(problem, GroupedGemm):
        _check_groups(problem)


def legal_b_scales(problem: Gemm) -> tuple[ScaleBlock, ...]:
    """The granularity of sfb that a problem may have, its usual one first."""
    blocks, rows = ScaleBlock(128, 128), ScaleBlock(1, 128)
    if is_k_grouped(problem):
        return rows, blocks
    if isinstance(problem, GroupedGemm) or problem.num_halves > 1:
        return (blocks,)  # what a B of weights has, one of each group, or of gate and up
    return blocks, rows


def _check_k_groups(problem: Gemm) -> None:
    """What only a sum over parts of k, in D as it is, must be."""
    if problem.k != 0 or isinstance(problem.k, bool):
        raise ProblemError(f"k = {problem.k!r} of k_grouped is known at run time only: must be 0")
    if problem.d_dtype not in (F32, BF16) or problem.epilogue != acc:
        raise ProblemError(
            f"d has dtype {_name(problem.d_dtype)} and epilogue {problem.epilogue}: k_grouped adds"
            f" to D, which must be {F32.name}, or sets one of {BF16.name}, and has no epilogue"
        )


def _unit_of_n(problem: Gemm) -> tuple[int, str]:
    """What n must be a multiple of, and why."""
    if problem.num_halves > 1:
        return 2 * D_SCALE.k, "gate and up are whole 128x128 blocks of B"
    if problem.is_quantized:
        return D_SCALE.k, "D is quantized in blocks of 128 columns"
    return 8, "rows of D are stored in units of 16 bytes"


def check_operand_names(names: Iterable[str]) -> None:
    """Raise ProblemError if an epilogue operand is named like a tensor of the GEMM itself."""
    for name in names:
        if name in TENSOR_NAMES:
            raise ProblemError(f"epilogue operand {name}: the GEMM's own tensors have that name")


def _check_groups(problem: GroupedGemm) -> None:
    groups, alignment = problem.num_groups, problem.alignment
    if type(groups) is not int or not 1 <= groups <= MAX_GROUPS:
        raise ProblemError(f"num_groups = {groups!r} must be an int in 1..{MAX_GROUPS}")
    if groups * problem.n > MAX_EXTENT:
        raise ProblemError(
            f"num_groups * n = {groups * problem.n} rows of B must be {MAX_EXTENT} at most"
        )
    if problem.layout not in get_args(Layout):
        raise ProblemError(f"layout {problem.layout!r} must be one of {get_args(Layout)}")
    legal = {"group_ends": (1, 64, 128), "k_grouped": (K_UNIT,)}.get(problem.layout, (1,))
    if alignment not in legal:
        raise ProblemError(f"alignment = {alignment!r} of {problem.layout} must be one of {legal}")


def check_total_k(k: int) -> None:
    """Raise ProblemError unless k of all groups of k_grouped, known at run time only, is legal."""
    if not 0 <= k <= MAX_EXTENT or k % K_UNIT:
        raise ProblemError(
            f"k = {k} of all groups must be a multiple of {K_UNIT}: the nearest is"
            f" {-(-k // K_UNIT) * K_UNIT}"
        )


def check_rows(m: int) -> None:
    """Raise ProblemError unless m, known at run time only, is an extent that TMA can address."""
    if not 0 <= m <= MAX_EXTENT:
        raise ProblemError(f"m = {m} must be in 0..{MAX_EXTENT}")


def _check_extent(name: str, value: int, multiple: int, why: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ProblemError(f"{name} must be an int, got {value!r}")
    if not 0 < value <= MAX_EXTENT or value % multiple:
        raise ProblemError(
            f"{name} = {value} must be a positive multiple of {multiple} ({why}):"
            f" the nearest is {_nearest_multiple(value, multiple)}"
        )


def _name(dtype: object) -> object:
    """The dtype's name; what stands in its place if it is none."""
    return dtype.name if isinstance(dtype, DType) else repr(dtype)


def _nearest_multiple(value: int, multiple: int) -> int:
    """The nearest legal extent; upwards between two, so that padding never loses data."""
    return min(max(-(-value // multiple), 1), MAX_EXTENT // multiple) * multiple


def _nearest(problem: Gemm) -> Gemm | None:
    """The nearest legal problem, or None where an expression cannot be mended."""
    if (
        not isinstance(problem, Gemm)
        or not isinstance(problem.n, int)
        or not isinstance(problem.k, int)
    ):
        return None
    try:
        check_expr(problem.epilogue)
    except ProblemError:
        return None
    legal_scales = legal_b_scales(problem)
    if is_k_grouped(problem):
        d_dtype = problem.d_dtype if problem.d_dtype == BF16 else F32
        problem = replace(problem, d_dtype=d_dtype, epilogue=acc)
    fixed = replace(
        problem,
        n=_nearest_multiple(problem.n, _unit_of_n(problem)[0]),
        k=0 if is_k_grouped(problem) else _nearest_multiple(problem.k, 16),
        a_dtype=E4M3,
        b_dtype=E4M3,
        d_dtype=problem.d_dtype if problem.d_dtype in (BF16, F32, E4M3) else BF16,
        a_scale=ScaleBlock(1, 128),
        b_scale=problem.b_scale if problem.b_scale in legal_scales else legal_scales[0],
    )
    try:
        check_problem(fixed)
    except ProblemError:
        return None
    return fixed

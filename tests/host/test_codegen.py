"""The generated source: pure, readable, complete, and equal to the files in tests/golden."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import jitgen
from jitgen import (
    BF16,
    E4M3,
    F32,
    Gemm,
    GroupedGemm,
    ScaleBlock,
    Schedule,
    acc,
    cast,
    codegen,
    gate,
    gelu,
    matrix,
    maximum,
    per_row,
    relu,
    scalar,
    silu,
    up,
    vector,
)
from jitgen.codegen import constants, headers, render, render_expr
from jitgen.errors import VerifyError
from jitgen.expr import OPERATIONS, Apply, Expr, as_expr
from jitgen.ir import Evaluate, Store
from jitgen.kernel import Kernel
from jitgen.lower import lower
from jitgen.problem import of_k_groups
from jitgen.runtime.nvrtc import headers_used
from jitgen.schedule import num_sfb_rows, part_columns, slice_columns, split_blocks
from jitgen.tuning.space import candidates
from jitgen.verify import verify

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
PACKAGE = Path(jitgen.__file__).parent  # a wheel's, or the checkout's

EVERYTHING = (
    cast(maximum(gelu(acc * scalar("alpha") + vector("bias")), 0.5), BF16) * vector("gain", F32)
    - silu(relu(matrix("residual")))
    + matrix("wide", F32)
)
# The plain bf16 kernel, the smallest f32 one, a cluster along m without overlap, one along n,
# three of groups, the last with D in E4M3, and one that shares k: parts of 19, 19 and 18 K blocks,
# slices of 48, 48 and 32 columns. One with A and B swapped that shares k: slices of 16 and 8 rows.
# One of two math warpgroups in turns.
GOLDEN_KERNELS = {
    "bf16-n2112-k7168-128x128": (Gemm(2112, 7168), Schedule(128, 128, 5, 2)),
    "f32-n8-k16-64x16": (Gemm(8, 16, F32), Schedule(64, 16, 2, 1)),
    "bf16-bias-residual-256x96-cluster2x1-serial": (
        Gemm(576, 576, BF16, acc + vector("bias") + matrix("residual")),
        Schedule(256, 96, 3, 2, 2, 1, promotion="serial"),
    ),
    "f32-everything-192x96-cluster1x2": (
        Gemm(72, 144, F32, EVERYTHING),
        Schedule(192, 96, 3, 3, 1, 2, raster_group=16),
    ),
    "bf16-ragged-g32-n2112-k7168-128x128": (
        GroupedGemm(2112, 7168, num_groups=32),
        Schedule(128, 128, 5, 2),
    ),
    "bf16-masked-g3-bias-residual-n576-k576-64x96-cluster1x2": (
        GroupedGemm(
            *(576, 576, BF16, acc + vector("bias") + matrix("residual")),
            num_groups=3,
            layout="masked",
        ),
        Schedule(64, 96, 4, 1, 1, 2),
    ),
    "e4m3-ue8m0-swiglu-ragged-g8-n4096-k7168-128x256": (
        GroupedGemm(
            *(4096, 7168, E4M3, silu(gate) * up * per_row("weight")),
            ue8m0=True,
            num_groups=8,
        ),
        Schedule(128, 256, 3, 2, promotion="serial"),
    ),
    "f32-k-grouped-g4-n7168-128x128": (of_k_groups(7168, 4), Schedule(128, 128, 4, 2)),
    "bf16-bias-n2112-k7168-64x128-split3": (
        Gemm(2112, 7168, BF16, acc + vector("bias")),
        Schedule(64, 128, 5, 1, split_k=3),
    ),
    "bf16-bias-n2112-k7168-24x128-swap-split2": (
        Gemm(2112, 7168, BF16, acc + vector("bias")),
        Schedule(24, 128, 5, 2, split_k=2, swap_ab=True),
    ),
    "bf16-n2112-k7168-64x128-pingpong": (
        Gemm(2112, 7168),
        Schedule(64, 128, 5, 2, pingpong=True),
    ),
}
PROBLEMS = [
    Gemm(n, k, d_dtype, epilogue)
    for n, k, d_dtype, epilogue in (
        (8, 16, BF16, acc),
        (72, 128, F32, acc + vector("bias")),
        (576, 576, BF16, EVERYTHING),
        (2112, 7168, BF16, acc),
        (2112, 7168, F32, acc),
    )
] + [
    GroupedGemm(72, 144, F32, EVERYTHING, num_groups=512, layout="group_of_row"),
    GroupedGemm(576, 576, BF16, EVERYTHING, num_groups=7, layout="masked"),
    GroupedGemm(2112, 7168, num_groups=1, layout="group_ends", alignment=128),
    of_k_groups(576, 512),
    Gemm(576, 576, F32, b_scale=ScaleBlock(1, 128)),
]


def name_of(problem: Gemm) -> str:
    return f"n{problem.n}-k{problem.k}-{problem.d_dtype}"


def kernels_of(problem: Gemm) -> list[Kernel]:
    """One candidate of nearly every tile shape, with clusters and promotions in turn."""
    return [lower(problem, schedule) for schedule in list(candidates(problem))[::7]]


def constexprs(source: str) -> dict[str, int]:
    """The constants given as plain numbers, by name."""
    found = re.findall(r"^constexpr u32 (k\w+) = (\d+);$", source, re.MULTILINE)
    assert len(dict(found)) == len(found)
    return {name: int(value) for name, value in found}


# --- golden sources -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_KERNELS)
def test_render_equals_golden(name: str, request: pytest.FixtureRequest) -> None:
    source = render(lower(*GOLDEN_KERNELS[name]))
    path = GOLDEN / f"{name}.cu"
    if request.config.getoption("--update-golden", default=False):
        path.write_text(source)
    assert path.exists(), f"{path} is missing: run pytest tests/host --update-golden"
    if source != path.read_text():
        golden = path.read_text().splitlines()
        lines = source.splitlines()
        first = next(
            (i for i, (new, old) in enumerate(zip(lines, golden, strict=False)) if new != old),
            min(len(lines), len(golden)),
        )
        pytest.fail(
            f"{path.name} differs from line {first + 1}:\n"
            f"  golden    {''.join(golden[first : first + 1])}\n"
            f"  generated {''.join(lines[first : first + 1])}\n"
            "run pytest tests/host --update-golden if that is meant, and read the diff",
            pytrace=False,
        )


def test_golden_has_a_kernel_for_each_file() -> None:
    assert {path.stem for path in GOLDEN.glob("*.cu")} == set(GOLDEN_KERNELS)


# --- purity -------------------------------------------------------------------------------------

RENDER_ALL = """
import hashlib, sys
from jitgen import *
from jitgen.codegen import headers, render
from jitgen.lower import lower
from jitgen.schedule import num_sfb_rows
from jitgen.tuning.space import candidates
from jitgen.verify import verify
epilogue = gelu(acc * scalar("alpha") + vector("bias")) - matrix("residual") + matrix("wide", F32)
digest = hashlib.sha256()
for problem in (Gemm(72, 144, F32, epilogue), Gemm(2112, 7168)):
    for schedule in candidates(problem):
        digest.update(render(lower(problem, schedule)).encode())
for name, text in headers().items():
    digest.update(f"{name}\\n{text}".encode())
print(digest.hexdigest())
"""


def test_render_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    digests = []
    for seed, cwd in (("0", ROOT), ("1", tmp_path), ("4242", Path("/"))):
        env = {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": str(ROOT),
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "TZ": f"UTC+{seed[0]}",
        }
        done = subprocess.run(
            [sys.executable, "-c", RENDER_ALL],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout.strip())
    assert len(digests[0]) == hashlib.sha256().digest_size * 2
    assert len(set(digests)) == 1


def test_render_repeats_itself() -> None:
    one, other = (lower(*GOLDEN_KERNELS["f32-everything-192x96-cluster1x2"]) for _ in range(2))
    assert render(one) == render(other) == render(one)


def test_render_of_equal_problems_is_equal() -> None:
    """A cache that takes one for the other must be right to."""
    exprs = [acc * 0.0, acc * -0.0, acc + 0.0, acc + -0.0, acc * 1, acc * 1.0, acc * 1.5]
    schedule = Schedule(64, 64, 4, 1)
    sources: dict[Gemm, str] = {}
    for expr in exprs:
        problem = Gemm(72, 144, BF16, expr)
        source = render(lower(problem, schedule))
        assert sources.setdefault(problem, source) == source, str(expr)


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_render_differs_for_every_schedule(problem: Gemm) -> None:
    sources = [render(lower(problem, schedule)) for schedule in candidates(problem)]
    assert len(set(sources)) == len(sources)


def test_fingerprint_changes_with_device_code_and_with_what_prints_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fingerprint() -> str:
        codegen.fingerprint.cache_clear()
        return codegen.fingerprint()

    first = fingerprint()
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert fingerprint() == first
    with monkeypatch.context() as patch:
        patch.setattr(codegen, "headers", lambda: headers() | {"jitgen/new.cuh": ""})
        assert fingerprint() != first
    for name in ("jitgen.templates/gemm.cu.j2", "jitgen/lower.py"):
        package, _, file = name.rpartition("/")
        copy = tmp_path / package
        shutil.copytree(str(resources.files(package)), copy, symlinks=False)
        (copy / file).write_text((copy / file).read_text() + "//")

        def files(anchor: str, package: str = package, copy: Path = copy) -> Any:
            return copy if anchor == package else resources.files(anchor)

        with monkeypatch.context() as patch:
            patch.setattr(codegen, "resources", SimpleNamespace(files=files))
            assert fingerprint() != first, name
    assert fingerprint() == first


# --- form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_render_leaves_no_template_marks_paths_or_dates(problem: Gemm) -> None:
    for kernel in kernels_of(problem):
        source = render(kernel)
        for mark in ("${", "//%", "/*%", "%*/", "/*#", "{{", "}}", "{%", "Undefined", "None"):
            assert mark not in source, f"{mark} in {kernel.schedule}"
        assert not re.search(r"(?<![\w.])/(?:work|home|root|tmp|usr|mnt|Users)\b", source)
        assert str(ROOT) not in source
        assert not re.search(r"\b20\d\d-\d\d|\b\d\d:\d\d\b|__DATE__|__TIME__|__FILE__", source)
        assert source.isascii()


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_render_is_short_and_ends_with_a_newline(problem: Gemm) -> None:
    for kernel in kernels_of(problem):
        source = render(kernel)
        assert len(source.splitlines()) <= 455
        assert source.endswith("}\n")
        assert not source.endswith("\n\n")
        assert not re.search(r"[ \t]+$", source, re.MULTILINE)


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_render_reads_top_down(problem: Gemm) -> None:
    """Banner, includes, constants, static_asserts with reasons, then the one kernel."""
    for kernel in kernels_of(problem):
        source = render(kernel)
        lines = source.splitlines()
        assert lines[0] == f"// {kernel.problem}"
        assert lines[1] == f"// {kernel.schedule}"
        positions = [
            source.index('#include "'),
            source.index("constexpr u32 k"),
            source.index("static_assert("),
            source.index("__global__"),
        ]
        assert positions == sorted(positions)
        assert source.count("__global__") == 1
        assert len(re.findall(rf'extern "C" __global__ [^;{{]*?\b{kernel.name}\(', source)) == 1
        assert all('"' in line for line in re.findall(r"static_assert\(.*", source))


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_render_includes_only_its_headers(problem: Gemm) -> None:
    for kernel in kernels_of(problem):
        source = render(kernel)
        included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source, re.MULTILINE)
        assert included == sorted(set(included))
        assert set(included) <= set(headers())
        assert set(headers_used(source, headers())) <= set(headers())


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_render_gives_every_number_of_the_schedule_a_name(problem: Gemm) -> None:
    for group, candidate in enumerate(candidates(problem)):
        schedule = dataclasses.replace(candidate, raster_group=group % 1024 + 1)
        kernel = lower(problem, schedule)
        source, plan = render(kernel), kernel.smem
        (store,) = (stmt for stmt in kernel.body.body if isinstance(stmt, Store))
        found = constexprs(source)
        of_schedule = {
            "block_m": "kBlockM",
            "block_n": "kBlockN",
            "num_stages": "kNumStages",
            "num_math_warpgroups": "kNumMathWarpgroups",
            "cluster_m": "kClusterM",
            "cluster_n": "kClusterN",
            "raster_group": "kRasterGroup",
            "split_k": "kSplitK",
            "swap_ab": "kSwapAB",
        }
        numbers = {
            field.name: value
            for field in dataclasses.fields(schedule)
            if isinstance(value := getattr(schedule, field.name), int)
        }
        pingpong = numbers.pop("pingpong")  # told by kNumTurns
        assert set(numbers) == set(of_schedule), "name the new number's constant here"
        want = {of_schedule[name]: value for name, value in numbers.items()} | {
            "kN": problem.n,
            "kK": problem.max_k,
            "kNumTurns": schedule.num_math_warpgroups if pingpong else 1,
            "kPartColumns": part_columns(problem, schedule),
            "kStoreRows": store.box[0],
            "kBlockK": 128,
            "kPartBlocks": split_blocks(problem, schedule),
            "kSliceColumns": slice_columns(schedule),
            "kScaleN": problem.b_scale.rows,
            "kNumSfbRows": num_sfb_rows(problem, schedule.block_n),
            "kStoreColumns": store.box[1],
            "kStoreSpan": store.src.swizzle_bytes,
            "kSmemA": plan.a,
            "kSmemB": plan.b,
            "kSmemD": plan.d,
            "kSmemInbox": plan.inbox,
            "kSmemScales": plan.scales,
            "kSmemBarriers": plan.barriers,
            "kSmemBytes": plan.total_bytes,
        }
        assert {name: found.get(name) for name in want} == want, str(schedule)
        assert set(constants(kernel).items()) <= set(found.items())


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_render_uses_every_constant_that_it_defines(problem: Gemm) -> None:
    for kernel in kernels_of(problem):
        source = render(kernel)
        unused = [
            name for name in constexprs(source) if len(re.findall(rf"\b{name}\b", source)) < 2
        ]
        assert unused == []


def test_render_does_not_depend_on_the_schedule_below_the_constants() -> None:
    """A schedule is values, not text, but for cluster launches and the end of a swapped tile."""
    bodies: dict[tuple[bool, bool], set[str]] = {}
    for schedule in candidates(Gemm(2112, 7168)):
        kernel = lower(Gemm(2112, 7168), schedule)
        source = render(kernel).replace(kernel.name, "KERNEL")
        source = re.sub(r"^constexpr u32 k\w+ = \d+;$", "", source, flags=re.MULTILINE)
        body = source.replace(f"// {schedule}\n", "")
        bodies.setdefault((schedule.swap_ab, schedule.cluster_size > 1), set()).add(body)
    for swap_ab in (False, True):
        (alone,), (clustered,) = bodies.pop((swap_ab, False)), bodies.pop((swap_ab, True))
        assert clustered.replace("__cluster_dims__(kClusterSize, 1, 1) ", "") == alone
    assert not bodies


@pytest.mark.parametrize(
    ("k", "schedule", "want"),
    [
        (7168, Schedule(64, 128, 5, 1), (1, 56, 128)),
        (7168, Schedule(64, 128, 5, 1, split_k=3), (3, 19, 48)),
        (2192, Schedule(128, 96, 3, 2, split_k=4), (4, 5, 32)),
        (144, Schedule(192, 16, 2, 3, split_k=2), (2, 1, 16)),
        (16, Schedule(64, 16, 2, 1), (1, 1, 16)),
        (7168, Schedule(24, 128, 5, 2, split_k=2, swap_ab=True), (2, 28, 16)),
        (2192, Schedule(96, 128, 3, 2, split_k=5, swap_ab=True), (5, 4, 24)),
    ],
    ids=lambda v: str(v) if isinstance(v, Schedule) else "",
)
def test_constants_of_a_split(k: int, schedule: Schedule, want: tuple[int, int, int]) -> None:
    kernel = lower(Gemm(2112, k), schedule)
    found = constants(kernel)
    assert (found["kSplitK"], found["kPartBlocks"], found["kSliceColumns"]) == want
    assert found["kK"] == k
    columns = slice_columns(schedule)
    rows = schedule.block_n if schedule.swap_ab else schedule.block_m
    inbox_bytes = (schedule.split_k - 1) * rows * columns * 4
    assert found["kSmemScales"] - found["kSmemInbox"] == inbox_bytes
    assert columns % found["kStoreRows" if schedule.swap_ab else "kStoreColumns"] == 0


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_render_declares_the_parameters_in_order(problem: Gemm) -> None:
    for kernel in kernels_of(problem):
        source = render(kernel)
        signature = source[source.index(f"{kernel.name}(") + len(kernel.name) + 1 :]
        declared = [part.split()[-1] for part in signature[: signature.index(")")].split(",")]
        assert declared == [parameter.name for parameter in kernel.parameters]


# --- templates and headers ----------------------------------------------------------------------


def test_templates_contain_no_asm() -> None:
    templates = sorted((PACKAGE / "templates").glob("*.j2"))
    assert templates
    for path in templates:
        assert not re.search(r"\basm\b|__asm", path.read_text()), path.name


def test_headers_contain_no_template_marks() -> None:
    assert headers()
    for name, text in headers().items():
        assert re.fullmatch(r"jitgen/\w+\.cuh", name)
        assert "#pragma once" in text
        for mark in ("${", "//%", "/*%"):
            assert mark not in text, name


def test_headers_include_only_each_other() -> None:
    for name, text in headers().items():
        for included in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE):
            assert included in headers(), name


def test_headers_are_those_of_the_package() -> None:
    folder = PACKAGE / "templates" / "include"
    files = {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.cuh")
    }
    assert headers() == files


# --- expressions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (acc, "acc"),
        (acc + acc, "epilogue::add(acc, acc)"),
        (acc - acc, "epilogue::sub(acc, acc)"),
        (acc * acc, "epilogue::mul(acc, acc)"),
        (maximum(acc, acc), "epilogue::maximum(acc, acc)"),
        (relu(acc), "epilogue::relu(acc)"),
        (silu(acc), "epilogue::silu(acc)"),
        (gelu(acc), "epilogue::gelu(acc)"),
        (cast(acc, BF16), "epilogue::cast<bf16>(acc)"),
        (cast(acc, F32), "epilogue::cast<float>(acc)"),
    ],
    ids=str,
)
def test_render_expr_is_a_call_of_the_header(expr: Expr, text: str) -> None:
    assert render_expr(expr) == text


@pytest.mark.parametrize("op", OPERATIONS)
def test_render_expr_has_a_device_function_for_every_operation(op: str) -> None:
    arguments = (acc,) * OPERATIONS[op][0]
    assert render_expr(Apply(op, arguments)).startswith(f"epilogue::{op}(acc")
    text = headers()["jitgen/epilogue.cuh"]
    assert re.search(rf"\bfloat2 {op}\(|JITGEN_MAP\({op},", text)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 0.1, -3.5e38 / 2, 1e-45, 2.0**-126, 16777217.0])
def test_render_expr_gives_constants_bit_for_bit(value: float) -> None:
    bits = int(np.float32(value).view(np.uint32))
    text = render_expr(as_expr(value))
    assert [int(found, 16) for found in re.findall(r"0x([0-9a-f]+)u?", text)] == [bits]


def test_render_expr_reads_each_operand_where_it_is_declared() -> None:
    for expr, name in ((vector("x"), "x"), (matrix("y", F32), "y"), (scalar("z"), "z")):
        assert f"operands.operand_{name}" in render_expr(expr)
    assert re.search(r"\brow\b.*operand_y_stride\b.*\bcolumn\b", render_expr(matrix("y")))
    assert "row" not in render_expr(vector("x"))
    assert "column" not in render_expr(scalar("z"))


@pytest.mark.parametrize("expr", [Expr(), Apply("add", (acc, 3.0))], ids=["bare", "number"])  # type: ignore[arg-type]
def test_render_expr_rejects_unknown_nodes(expr: Any) -> None:
    with pytest.raises(TypeError, match="no rendering"):
        render_expr(expr)


def test_render_takes_the_epilogue_from_the_program() -> None:
    """The Kernel is the one source of truth: what Evaluate says is what is rendered."""
    kernel = lower(Gemm(72, 144), Schedule(64, 64, 4, 1))
    body = tuple(
        dataclasses.replace(stmt, expr=relu(acc)) if isinstance(stmt, Evaluate) else stmt
        for stmt in kernel.body.body
    )
    other = dataclasses.replace(kernel, body=dataclasses.replace(kernel.body, body=body))
    try:
        verify(other)
    except VerifyError:
        return  # refused, so that nobody renders it
    assert "epilogue::relu(acc)" in render(other)

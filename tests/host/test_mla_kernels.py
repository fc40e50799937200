"""Kernels of MLA decode: verifier, generated source, NVRTC, and the benchmark's figures."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jitgen import BF16, F16, JitForbiddenError, MlaDecode, MlaSchedule, VerifyError, configure
from jitgen.build import build, prebuild
from jitgen.codegen import headers, render
from jitgen.control import build_for_call
from jitgen.ir_mla import (
    Attend,
    Fill,
    ForKeys,
    LoadKeys,
    Mask,
    Merge,
    MlaKernel,
    MlaStmt,
    Soften,
)
from jitgen.lower_mla import lower_mla
from jitgen.problem_mla import HEAD_DIMS, PAGES
from jitgen.runtime import launch
from jitgen.runtime.driver import LoadedKernel
from jitgen.runtime.nvrtc import headers_used
from jitgen.runtime.store import KernelStore
from jitgen.schedule_mla import EVICT_ALWAYS, MlaSmemPlan, select_mla
from jitgen.tuning.bench_mla import (
    MlaRow,
    MlaShape,
    known_geomean,
    mla_baseline_meta,
    mla_baselines,
)
from jitgen.verify import verify
from tests.gpu.conftest import render_for_racecheck

GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "mla"
GOLDEN_KERNELS = {
    "bf16-h16-p64": (MlaDecode(16, causal=False), MlaSchedule()),
    "bf16-h64-p64-meet": (MlaDecode(64, causal=False), MlaSchedule(meet=2, evict_first=16)),
    "f16-h128-q2-d320-p16-ahead": (
        MlaDecode(128, 2, 320, 256, 16, F16),
        MlaSchedule(overhead=5, score_ahead=True),
    ),
    "fp8-h8-q2-p64": (
        MlaDecode(8, 2, cache="fp8"),
        MlaSchedule(tile_rows=16, num_stages=4),
    ),
    "fp8-sparse-sink-h128": (
        MlaDecode(128, causal=False, cache="fp8", sparse=True, sink=True),
        MlaSchedule(num_stages=3, overhead=5, slack=1, whole=True),
    ),
}
PROBLEMS = [
    MlaDecode(heads, queries, *head_dims, page)
    for heads, queries, head_dims, page in (
        (1, 1, HEAD_DIMS[0], 64),
        (16, 2, HEAD_DIMS[1], 16),
        (128, 1, HEAD_DIMS[2], 32),
        (128, 2, HEAD_DIMS[0], 128),
    )
]


def kernel_of(problem: MlaDecode = PROBLEMS[0]) -> MlaKernel:
    return lower_mla(problem, select_mla(problem))


# --- the verifier ---------------------------------------------------------------------------------


def test_verify_accepts_every_problem() -> None:
    for heads in (1, 16, 65, 128):
        for queries in (1, 2, 8):
            for head_dims in HEAD_DIMS:
                for page in PAGES:
                    verify(kernel_of(MlaDecode(heads, queries, *head_dims, page)))


Change = Callable[[MlaStmt], "MlaStmt | None"]


def changed(kernel: MlaKernel, kind: type, change: Change) -> MlaKernel:
    """The kernel with the ops of one kind changed, or without them."""

    def rewrite(stmts: tuple[MlaStmt, ...]) -> tuple[MlaStmt, ...]:
        out: list[MlaStmt] = []
        for stmt in stmts:
            if isinstance(stmt, ForKeys):
                stmt = replace(stmt, body=rewrite(stmt.body))
            made = change(stmt) if isinstance(stmt, kind) else stmt
            out += [] if made is None else [made]
        return tuple(out)

    return replace(kernel, body=replace(kernel.body, body=rewrite(kernel.body.body)))


def without(_: MlaStmt) -> None:
    """Drops the op."""


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (Mask, without, "must hold masked scores, holds scores"),
        (Soften, without, "must hold p, holds nothing"),
        (Attend, without, "leaves factor, p, smem_k unread"),
        (Merge, without, "must hold merged out, holds out"),
        (Merge, lambda op: replace(op, meet=3 - op.meet), "parts at a time first"),
        (Mask, lambda op: replace(op, causal=not op.causal), "is not the problem's mask"),
        (Fill, lambda op: replace(op, value=1.0), "begins? at 0"),
        (LoadKeys, lambda op: replace(op, box=(48, 64)), "do not make up blocks and pages"),
        (LoadKeys, lambda op: replace(op, box=(64, 32)), "not one swizzle span wide"),
        (ForKeys, lambda op: replace(op, step=32), "must step by 64"),
        (ForKeys, without, "must come after the loop"),
    ],
)
def test_verify_rejects(kind: type, change: Change, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify(changed(kernel_of(), kind, change))


def test_verify_rejects_another_split_plan_and_tensors() -> None:
    kernel = kernel_of()
    body = kernel.body
    for made, message in (
        (replace(kernel, body=replace(body, split=replace(body.split, overhead=9))), "schedule's"),
        (replace(kernel, body=replace(body, tiles=2)), "the schedule's is"),
        (
            replace(kernel, body=replace(body, split=replace(body.split, whole=True))),
            "the schedule's is",
        ),
        (replace(kernel, smem=MlaSmemPlan(kernel.smem.sizes[1:])), "must be MlaSmemPlan"),
        (replace(kernel, tensors=kernel.tensors[:-1]), "takes"),
        (replace(kernel, schedule=MlaSchedule(num_stages=3)), "must be one of 2, 4"),
    ):
        with pytest.raises(VerifyError, match=message):
            verify(made)


# --- the source -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_KERNELS)
def test_render_equals_golden(name: str, request: pytest.FixtureRequest) -> None:
    source = render(lower_mla(*GOLDEN_KERNELS[name]))
    path = GOLDEN / f"{name}.cu"
    if request.config.getoption("--update-golden", default=False):
        path.write_text(source)
    assert path.exists(), f"{path} is missing: run pytest tests/host --update-golden"
    assert source == path.read_text(), "run pytest tests/host --update-golden if that is meant"


def test_golden_has_a_kernel_for_each_file() -> None:
    assert {path.stem for path in GOLDEN.glob("*.cu")} == set(GOLDEN_KERNELS)


@pytest.mark.parametrize(
    "problem", [*PROBLEMS, *(problem for problem, _ in GOLDEN_KERNELS.values())], ids=str
)
def test_render_is_pure_and_uses_every_constant(problem: MlaDecode) -> None:
    kernel = kernel_of(problem)
    source = render(kernel)
    assert source == render(kernel_of(problem))
    text = source + "".join(headers_used(source, headers()).values())
    for name in re.findall(r"^constexpr u32 (k\w+) = \d+;$", source, re.MULTILINE):
        assert len(re.findall(rf"\b{name}\b", text)) > 1, f"{name} is not used"
    for parameter in kernel.parameters:
        assert len(re.findall(rf"\b{parameter.name}\b", source)) > 1, parameter.name


@pytest.mark.parametrize("name", GOLDEN_KERNELS)
def test_source_for_racecheck_knows_the_template(name: str) -> None:
    kernel = lower_mla(*GOLDEN_KERNELS[name])
    assert render_for_racecheck(kernel) != render(kernel)


def test_str_reads_as_a_program() -> None:
    text = str(kernel_of())
    assert "for keys of the segment by 64:" in text
    assert "out = out * factor + mma(p, smem_k[:, :512]^T)" in text


# --- compiling ------------------------------------------------------------------------------------

SCHEDULES = [
    MlaSchedule(),
    MlaSchedule(overhead=1, score_ahead=True, evict_first=EVICT_ALWAYS),
    MlaSchedule(meet=2, evict_first=32),
    MlaSchedule(score_ahead=True, whole=True),
    MlaSchedule(tile_rows=32, meet=2),
    MlaSchedule(meet=2, score_ahead=True),
]


@pytest.mark.parametrize(
    ("problem", "schedule"),
    [
        (replace(problem, dtype=(BF16, F16)[index % 2]), replace(schedule, num_stages=stages))
        for index, problem in enumerate(PROBLEMS)
        for schedule in SCHEDULES[index % 2 :: 2]
        for stages in (4 if problem.head_dim_qk == 320 else 2,)
    ],
    ids=str,
)
def test_nvrtc_compiles_without_spills_or_advisories(
    problem: MlaDecode, schedule: MlaSchedule, tmp_path: Path
) -> None:
    kernel = lower_mla(problem, schedule)
    entry = build(kernel, KernelStore(tmp_path))
    assert entry.resources.spill_bytes == 0
    assert entry.name == kernel.name


def test_prebuild_and_forbid_know_the_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = MlaDecode(2, 1, 320, 256)
    job = (problem, select_mla(problem))
    monkeypatch.setattr("jitgen.build.default_store", functools.partial(KernelStore, tmp_path))
    monkeypatch.setattr("jitgen.control._configured", None)
    configure(jit="forbid")
    with pytest.raises(JitForbiddenError, match=r"jitgen\.MlaDecode\(2, 1, 320, 256, 64, jitgen"):
        build_for_call(*job)
    (built,) = prebuild([job], root=tmp_path, num_processes=1)
    assert built.compiled
    (again,) = prebuild([job], root=tmp_path, num_processes=1)
    assert not again.compiled
    assert build_for_call(*job)[1].name == built.name


# --- launching ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_cooperative", "pdl"), [(False, False), (True, False), (True, True)])
def test_launch_is_cooperative_if_asked(
    is_cooperative: bool, pdl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, tuple[object, ...]]] = []

    class Driver:
        def cuLaunchKernel(self, *arguments: object) -> tuple[int]:
            calls.append(("plain", arguments))
            return (0,)

        def cuLaunchCooperativeKernel(self, *arguments: object) -> tuple[int]:
            calls.append(("cooperative", arguments))
            return (0,)

    monkeypatch.setattr(launch, "driver", Driver)
    monkeypatch.setattr(launch, "ensure_current", lambda ordinal: None)
    kernel = LoadedKernel("function", None, 1024, 0)
    prepared = launch.Launch(
        kernel, [launch.UInt32(7)], (), grid=132, num_threads=384, is_cooperative=is_cooperative
    )
    prepared(5, pdl=pdl)
    ((kind, arguments),) = calls
    assert kind == ("cooperative" if is_cooperative else "plain")
    assert arguments[:9] == ("function", 132, 1, 1, 384, 1, 1, 1024, 5)
    assert len(arguments) == (10 if is_cooperative else 11)  # no extra options


# --- the benchmark --------------------------------------------------------------------------------


def test_baselines_are_flashmlas_and_name_their_source() -> None:
    baselines = mla_baselines()
    assert len(baselines) == 144
    assert baselines[MlaShape(1, 1, 16, 32768)] == 53.63
    assert mla_baseline_meta()["gpu"] == "NVIDIA H100 80GB HBM3"
    assert "9241ae3" in mla_baseline_meta()["flashmla"]


def test_row_derives_figures_and_is_json() -> None:
    shape = MlaShape(16, 1, 16, 32768)
    row = MlaRow(shape, 200.0, 235.17)
    assert row.ratio == pytest.approx(1.17585)
    assert row.gb_per_s == pytest.approx(235.17 / 200 * 2570.66, rel=1e-3)  # the file's own figure
    assert row.tflops == pytest.approx(235.17 / 200 * 77.62, rel=1e-3)
    assert json.loads(json.dumps(row.to_json()))["derived"]["ratio"] == row.ratio
    assert MlaRow(shape, 1.0, None).ratio is None
    assert shape.problem == MlaDecode(16, causal=False)


def test_shapes_of_the_fp8_cache_count_its_bytes() -> None:
    fp8, sparse = mla_baselines("fp8"), mla_baselines("sparse")
    shape = MlaShape(16, 1, 16, 32768, "fp8")
    assert fp8[shape] == mla_baselines()[MlaShape(16, 1, 16, 32768)]
    assert shape.problem == MlaDecode(16, causal=False, cache="fp8")
    assert shape.num_bytes == 16 * (32768 * 656 + 16 * 1088 * 2)
    assert len(sparse) == 9
    few = MlaShape(64, 2, 128, 32768, "fp8", 2048)
    assert sparse[few] == 195.17
    assert str(few) == "b64-q2-h128-k32768-top2048"
    assert few.problem == MlaDecode(128, 2, causal=False, cache="fp8", sparse=True)
    assert few.flops == 2 * 64 * 2 * 128 * 2048 * 1088
    assert MlaRow(few, 195.17, 195.17).tflops == pytest.approx(375.69, rel=1e-2)


def test_geomean_is_of_what_is_known() -> None:
    assert known_geomean([2.0, None, 8.0]) == pytest.approx(4.0)
    assert known_geomean([None]) is None

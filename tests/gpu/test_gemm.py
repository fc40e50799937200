"""FP8 GEMM on the GPU equals the interpreter, bit for bit.

JITGEN_TEST_SEED repeats a run's draws.
"""

from __future__ import annotations

import itertools
import os
import random
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jitgen  # noqa: E402
from jitgen import Gemm, Schedule, control  # noqa: E402
from jitgen.build import prebuild  # noqa: E402
from jitgen.codegen import headers, render  # noqa: E402
from jitgen.lower import lower  # noqa: E402
from jitgen.runtime import driver  # noqa: E402
from jitgen.runtime.launch import MAX_IDLE_LAUNCHES  # noqa: E402
from jitgen.runtime.nvrtc import compile_cubin  # noqa: E402
from jitgen.schedule import max_stages  # noqa: E402
from jitgen.tuning.select import select  # noqa: E402
from jitgen.tuning.space import (  # noqa: E402
    PINGPONG_ROW_TILES,
    PROMOTIONS,
    ROW_TILES,
    VARIANTS,
    is_legal,
)

from . import draws  # noqa: E402

SEED = int(os.environ.get("JITGEN_TEST_SEED", secrets.randbits(31)))
NUM_DRAWS = 320

Inputs = dict[str, torch.Tensor]


def _all_draws() -> list[draws.Draw]:
    rng = random.Random(SEED)
    return [draws.draw(rng, index) for index in range(NUM_DRAWS)]


def _small_draws() -> list[draws.Draw]:
    """Every tile, promotion and cluster once, on problems small enough for a sanitizer."""
    rng = random.Random(SEED + 1)
    small = []
    problems = [
        Gemm(264, k, dtype, expr)
        for k in (144, 512, 1104, 1536)
        for dtype in (jitgen.BF16, jitgen.F32)
        for expr in draws.EPILOGUES.values()
    ]
    clusters = ((1, 1, 1), (2, 1, 1), (1, 2, 1), rng.choice(((2, 2, 1), (4, 1, 1), (1, 4, 1))))
    splits = ((1, 1, 2), (1, 1, rng.choice((3, 4, 5, 8))))
    for tile, (cluster_m, cluster_n, split_k) in itertools.product(_tiles(), clusters + splits):
        if tile.pingpong and split_k > 1:
            continue
        problem = rng.choice([p for p in problems if p.k >= 128 * split_k])
        clustered = replace(tile, cluster_m=cluster_m, cluster_n=cluster_n)
        widths = (32, 64, 96, 128)
        schedules = [
            replace(clustered, split_k=parts, **{"block_m" if tile.swap_ab else "block_n": width})
            for width in widths
            for parts in range(1, split_k + 1)
            if split_k == 1 or parts > 1
        ]
        schedule = rng.choice([s for s in schedules if is_legal(problem, s)])
        schedule = replace(schedule, num_stages=min(4, max_stages(problem, schedule)))
        name = next(name for name, expr in draws.EPILOGUES.items() if expr == problem.epilogue)
        layout = rng.choice(draws.SFA_LAYOUTS)
        # Turns are taken where a block has several tiles.
        m = 321 + 132 * schedule.block_m * schedule.pingpong
        small.append(draws.Draw(m, problem, schedule, layout, name, rng.getrandbits(31)))
    return small


def _tiles() -> list[Schedule]:
    """One schedule of every row tile, promotion and variant."""
    found = []
    for swap_ab, pingpong in VARIANTS:
        for rows, warpgroups in PINGPONG_ROW_TILES if pingpong else ROW_TILES:
            block_m, block_n = (8, rows) if swap_ab else (rows, 16)
            found += [
                Schedule(
                    *(block_m, block_n, 2, warpgroups),
                    promotion=promotion,
                    swap_ab=swap_ab,
                    pingpong=pingpong,
                )
                for promotion in PROMOTIONS
            ]
    return found


ALL_DRAWS, SMALL_DRAWS = _all_draws(), _small_draws()


@pytest.fixture(scope="module", autouse=True)
def kernels(request: pytest.FixtureRequest) -> None:
    """The kernels of the selected draws, compiled in parallel before the first test if many."""
    selected = []
    for item in request.session.items:
        index = getattr(item, "callspec", None) and item.callspec.params.get("index")
        if index is not None and item.path == request.path:
            selected.append((SMALL_DRAWS if "small" in item.name else ALL_DRAWS)[index])
    # Workers of xdist are parallel already; under a sanitizer one process is all that pays.
    if "PYTEST_XDIST_WORKER" not in os.environ and len(selected) > len(SMALL_DRAWS):
        prebuild([(d.problem, d.schedule) for d in selected])


@pytest.mark.parametrize("index", range(NUM_DRAWS))
def test_gemm_equals_interpreter(index: int) -> None:
    draws.run_and_compare(ALL_DRAWS[index])


@pytest.mark.parametrize("index", range(len(SMALL_DRAWS)))
def test_gemm_small_equals_interpreter(index: int) -> None:
    draws.run_and_compare(SMALL_DRAWS[index], num_runs=2, num_tiles=2)


@pytest.mark.parametrize(("n", "k"), draws.GRID_NK)
@pytest.mark.parametrize("m", [1, 64, 200, 1000])
def test_gemm_chooses_a_schedule_that_equals_interpreter(m: int, n: int, k: int) -> None:
    problem = Gemm(n, k)
    inputs = draws.make_inputs(
        draws.Draw(m, problem, Schedule(64, 64, 2, 1), "row", "plain", SEED + m)
    )
    d = jitgen.gemm(inputs["a"], inputs["b"], (inputs["sfa"], inputs["sfb"]))
    assert d.dtype == torch.bfloat16
    assert d.shape == (m, n)
    schedule = select(problem, m, driver.device(0).gpu)
    draws.compare_tiles(draws.Draw(m, problem, schedule, "row", "plain", SEED), inputs, d, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gemm_of_nan_gives_the_canonical_nan_as_predicted(dtype: torch.dtype) -> None:
    inputs = draws.make_inputs(
        draws.Draw(5, Gemm(64, 256), Schedule(64, 64, 2, 1), "row", "plain", SEED)
    )
    inputs["a"].view(torch.uint8)[2, 77] = 0x7F
    inputs["b"].view(torch.uint8)[9, 200] = 0xFF
    scales = (inputs["sfa"], inputs["sfb"])
    got = draws.to_numpy(jitgen.gemm(inputs["a"], inputs["b"], scales, out_dtype=dtype))
    host = {name: draws.to_numpy(t) for name, t in inputs.items()}
    expected = jitgen.gemm(
        host["a"], host["b"], (host["sfa"], host["sfb"]), out_dtype=str(dtype)[6:]
    )
    integer = np.uint16 if got.dtype.itemsize == 2 else np.uint32
    assert np.isnan(got.astype(np.float32)).sum() == 64 + 5 - 1
    np.testing.assert_array_equal(got.view(integer), expected.view(integer))


def test_gemm_of_no_rows_is_empty() -> None:
    inputs = draws.make_inputs(
        draws.Draw(1, Gemm(64, 256), Schedule(64, 64, 2, 1), "row", "plain", SEED)
    )
    d = jitgen.gemm(inputs["a"][:0], inputs["b"], (inputs["sfa"][:0], inputs["sfb"]))
    assert d.shape == (0, 64)
    assert d.device == inputs["a"].device


@pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_quantize_equals_numpy(block: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(SEED)
    x = torch.randn(259, 1000, device="cuda", generator=generator)
    x *= torch.exp(8 * torch.randn(259, 1, device="cuda", generator=generator))
    x[:128, :128] = 0
    x = x.to(dtype)
    q, scale = jitgen.quantize(x, block)
    expected_q, expected_scale = jitgen.quantize(draws.to_numpy(x), block)
    np.testing.assert_array_equal(draws.to_numpy(q).view(np.uint8), expected_q.view(np.uint8))
    np.testing.assert_array_equal(
        draws.to_numpy(scale).view(np.uint32), expected_scale.view(np.uint32)
    )


def test_gemm_runs_on_the_current_stream_and_in_a_new_thread() -> None:
    d = draws.Draw(333, Gemm(576, 1536), Schedule(128, 96, 3), "row", "plain", SEED)
    inputs = draws.make_inputs(d)
    a, scales = torch.zeros_like(inputs["a"].view(torch.uint8)), (inputs["sfa"], inputs["sfb"])
    expected = jitgen.gemm(inputs["a"], inputs["b"], scales)
    torch.cuda.synchronize()
    results = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()) as _:
            torch.cuda._sleep(20_000_000)  # what the stream still has to do before a is there
            a.copy_(inputs["a"].view(torch.uint8))
            results.append(jitgen.gemm(a.view(torch.float8_e4m3fn), inputs["b"], scales))
            torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(draws.bits(results[0]), draws.bits(expected))


def test_gemm_replays_in_a_cuda_graph() -> None:
    d = draws.Draw(129, Gemm(576, 1536), Schedule(64, 96, 4, 1), "row", "plain", SEED)
    inputs = draws.make_inputs(d)
    out = torch.empty(129, 576, dtype=torch.bfloat16, device="cuda")

    def call() -> None:
        jitgen.gemm(
            inputs["a"], inputs["b"], (inputs["sfa"], inputs["sfb"]), out=out, schedule=d.schedule
        )

    call()
    expected = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(draws.bits(out), draws.bits(expected))


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("m", [16, 200])
def test_dependent_launches_read_what_the_ones_before_wrote(
    m: int, in_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain: each GEMM adds to the result of the one before, into one of two buffers."""
    problem = Gemm(2112, 1536, epilogue=draws.EPILOGUES["residual"])
    d = draws.Draw(m, problem, Schedule(64, 64, 4, 1), "row", "residual", SEED)
    t = draws.make_inputs(d)
    buffers = [torch.empty(m, 2112, dtype=torch.bfloat16, device="cuda") for _ in range(2)]

    def chain() -> torch.Tensor:
        before = t["residual"].contiguous()
        for i in range(40):
            inputs = t | {"residual": before}
            before = _call(jitgen.gemm, d, inputs, out=buffers[i % 2])
        return before

    expected = chain().clone()
    monkeypatch.setattr(control, "pdl_enabled", True)
    for buffer in buffers:
        buffer.fill_(float("nan"))
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = chain()
        for buffer in buffers:
            buffer.fill_(float("nan"))
        for _ in range(5):
            graph.replay()
    else:
        got = chain()
    assert torch.equal(draws.bits(got.clone()), draws.bits(expected))


def _call(function: Callable[..., Any], d: draws.Draw, t: Inputs, **options: Any) -> Any:
    """gemm or bind of the draw's problem on these tensors."""
    scales = t["sfa"], t["sfb"]
    operands = {name: t[name] for name in t if name not in ("a", "b", "sfa", "sfb")}
    options["epilogue"] = d.problem.epilogue.bind(**operands)
    return function(t["a"], t["b"], scales, schedule=d.schedule, **options)


def _moving_draw() -> draws.Draw:
    """A call whose tensors are of every kind: maps, pointers with strides and without."""
    name = "bias-relu-residual"
    problem = Gemm(264, 1040, epilogue=draws.EPILOGUES[name])
    return draws.Draw(129, problem, Schedule(64, 96, 4, 1), "row", name, SEED)


def test_gemm_at_changing_addresses_equals_a_bound_call_on_static_buffers() -> None:
    d = _moving_draw()
    variants = [
        draws.make_inputs(replace(d, seed=SEED + i)) for i in range(2 * MAX_IDLE_LAUNCHES + 1)
    ]
    static = {name: t.clone() for name, t in variants[0].items()}
    out = torch.empty(129, 264, dtype=torch.bfloat16, device="cuda")
    bound = _call(jitgen.bind, d, static, out=out)
    expected = []
    for inputs in variants:
        for name, t in inputs.items():
            static[name].view(torch.uint8).copy_(t.view(torch.uint8))
        out.fill_(float("nan"))
        assert bound() is out
        expected.append(out.clone())
    draws.compare_tiles(replace(d, seed=SEED), variants[0], expected[0], 2)
    for _ in range(2):
        results = [_call(jitgen.gemm, d, inputs) for inputs in variants]
        outs = [torch.full_like(out, float("nan")) for _ in variants]
        for inputs, memory in zip(variants, outs, strict=True):
            _call(jitgen.gemm, d, inputs, out=memory)
        for got in (results, outs):
            pairs = zip(got, expected, strict=True)
            assert all(torch.equal(draws.bits(one), draws.bits(want)) for one, want in pairs)


def test_gemm_in_threads_at_changing_addresses() -> None:
    """More threads than launches that are kept, each on its stream and with its tensors."""
    d = _moving_draw()
    num_threads = 2 * MAX_IDLE_LAUNCHES
    variants = [draws.make_inputs(replace(d, seed=SEED + i)) for i in range(num_threads)]
    expected = [_call(jitgen.gemm, d, inputs) for inputs in variants]
    torch.cuda.synchronize()
    start = threading.Barrier(num_threads, timeout=60)
    right = []

    def work(inputs: Inputs, want: torch.Tensor) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            outs = [torch.full_like(want, float("nan")) for _ in range(50)]
            start.wait()
            for out in outs:
                _call(jitgen.gemm, d, inputs, out=out)
            right.append(all(torch.equal(draws.bits(out), draws.bits(want)) for out in outs))

    pairs = zip(variants, expected, strict=True)
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * num_threads


@pytest.mark.parametrize("function", ["gemm", "bind"])
def test_gemm_may_be_the_first_use_of_cuda_in_a_thread(function: str) -> None:
    d = _moving_draw()
    inputs = draws.make_inputs(d)
    expected = _call(jitgen.gemm, d, inputs)
    out = torch.full_like(expected, float("nan"))
    bound = _call(jitgen.bind, d, inputs, out=out)
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            _call(jitgen.gemm, d, inputs, out=out) if function == "gemm" else bound()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert errors == []
    assert torch.equal(draws.bits(out), draws.bits(expected))


def test_bind_replays_in_a_cuda_graph_and_keeps_its_tensors() -> None:
    d = _moving_draw()
    inputs = draws.make_inputs(d)
    expected = _call(jitgen.gemm, d, inputs)
    bound = _call(jitgen.bind, d, inputs, out=torch.full_like(expected, float("nan")))
    inputs.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bound()
    assert torch.isnan(out).all()
    graph.replay()
    assert torch.equal(draws.bits(out), draws.bits(expected))


def test_bind_runs_on_the_current_stream() -> None:
    d = draws.Draw(333, Gemm(576, 1536), Schedule(128, 96, 3), "row", "plain", SEED)
    inputs = draws.make_inputs(d)
    expected = _call(jitgen.gemm, d, inputs)
    codes = inputs["a"].view(torch.uint8)
    kept = codes.clone()
    bound = _call(jitgen.bind, d, inputs, out=torch.full_like(expected, float("nan")))
    codes.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what the stream still has to do before a is there
        codes.copy_(kept)
        out = bound()
    stream.synchronize()
    assert torch.equal(draws.bits(out), draws.bits(expected))


@pytest.mark.parametrize("function", [jitgen.gemm, jitgen.bind], ids=["gemm", "bind"])
def test_gemm_rejects_mixed_devices(function: Callable[..., Any]) -> None:
    inputs = draws.make_inputs(
        draws.Draw(5, Gemm(64, 256), Schedule(64, 64, 2, 1), "row", "plain", SEED)
    )
    scales = (inputs["sfa"], inputs["sfb"])
    out = jitgen.gemm(inputs["a"], inputs["b"], scales)  # from now on this signature is known
    with pytest.raises(jitgen.DeviceError, match="b is on cpu"):
        function(inputs["a"], inputs["b"].cpu(), scales, out=out)
    with pytest.raises(jitgen.DeviceError, match="d is on cpu"):
        function(inputs["a"], inputs["b"], scales, out=out.cpu())


def test_swapped_operands_are_another_call() -> None:
    inputs = draws.make_inputs(
        draws.Draw(5, Gemm(64, 256), Schedule(64, 64, 2, 1), "row", "plain", SEED)
    )
    x, y = torch.randn(2, 64, device="cuda").bfloat16()
    expr = jitgen.acc * jitgen.vector("x") + jitgen.vector("y")
    call = (inputs["a"], inputs["b"], (inputs["sfa"], inputs["sfb"]))
    one = jitgen.gemm(*call, out_dtype="float32", epilogue=expr.bind(x=x, y=y))
    other = jitgen.gemm(*call, out_dtype="float32", epilogue=expr.bind(y=x, x=y))
    plain = jitgen.gemm(*call, out_dtype="float32")
    assert torch.equal(one, plain * x.float() + y.float())
    assert torch.equal(other, plain * y.float() + x.float())


def test_compiler_reports_resources_of_a_source_it_has_seen() -> None:
    kernel = lower(Gemm(576, 1536), Schedule(64, 96, 4, 1))
    first, second = (
        compile_cubin(render(kernel), name="twice.cu", headers=headers()) for _ in range(2)
    )
    assert first.cubin == second.cubin
    assert second.resources.registers > 0

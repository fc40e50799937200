"""FP8 GEMM on the GPU equals the interpreter, bit for bit.

JITGEN_TEST_SEED repeats a run's draws.
"""

from __future__ import annotations

import itertools
import os
import random
import secrets
import threading
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jitgen  # noqa: E402
from jitgen import Gemm, Schedule  # noqa: E402
from jitgen.build import prebuild  # noqa: E402
from jitgen.codegen import headers, render  # noqa: E402
from jitgen.lower import lower  # noqa: E402
from jitgen.runtime import driver  # noqa: E402
from jitgen.runtime.nvrtc import compile_cubin  # noqa: E402
from jitgen.schedule import max_stages  # noqa: E402
from jitgen.tuning.model import choose  # noqa: E402
from jitgen.tuning.space import PROMOTIONS, ROW_TILES  # noqa: E402

from . import draws  # noqa: E402

SEED = int(os.environ.get("JITGEN_TEST_SEED", secrets.randbits(31)))
NUM_DRAWS = 320


def _all_draws() -> list[draws.Draw]:
    rng = random.Random(SEED)
    return [draws.draw(rng, index) for index in range(NUM_DRAWS)]


def _small_draws() -> list[draws.Draw]:
    """Every row tile, promotion and cluster once, on problems small enough for a sanitizer."""
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
    for (block_m, warpgroups), promotion, (cluster_m, cluster_n, split_k) in itertools.product(
        ROW_TILES, PROMOTIONS, clusters + splits
    ):
        problem = rng.choice([p for p in problems if p.k >= 128 * split_k])
        tile = Schedule(block_m, 16, 2, warpgroups, cluster_m, cluster_n, promotion=promotion)
        schedules = [
            replace(tile, block_n=block_n, split_k=parts)
            for block_n in (32, 64, 96, 128)
            for parts in range(1, split_k + 1)
            if split_k == 1 or parts > 1
        ]
        schedule = rng.choice([s for s in schedules if draws.is_legal(problem, s)])
        schedule = replace(schedule, num_stages=min(4, max_stages(problem, schedule)))
        name = next(name for name, expr in draws.EPILOGUES.items() if expr == problem.epilogue)
        layout = rng.choice(draws.SFA_LAYOUTS)
        small.append(draws.Draw(321, problem, schedule, layout, name, rng.getrandbits(31)))
    return small


ALL_DRAWS, SMALL_DRAWS = _all_draws(), _small_draws()


@pytest.fixture(scope="module", autouse=True)
def kernels(request: pytest.FixtureRequest) -> None:
    """The kernels of the selected draws, compiled in parallel before the first test if many."""
    selected = []
    for item in request.session.items:
        index = getattr(item, "callspec", None) and item.callspec.params.get("index")
        if index is not None:
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
    schedule = choose(problem, m, driver.device(0).num_sms)
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


def test_gemm_rejects_mixed_devices() -> None:
    inputs = draws.make_inputs(
        draws.Draw(5, Gemm(64, 256), Schedule(64, 64, 2, 1), "row", "plain", SEED)
    )
    with pytest.raises(jitgen.DeviceError, match="b is on cpu"):
        jitgen.gemm(inputs["a"], inputs["b"].cpu(), (inputs["sfa"], inputs["sfb"]))


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

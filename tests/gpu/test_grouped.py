"""Grouped FP8 GEMM on the GPU equals the interpreter, bit for bit, and leaves the rest alone.

JITGEN_TEST_SEED repeats a run's draws.
"""

from __future__ import annotations

import os
import random
import secrets
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

import jitgen  # noqa: E402
from jitgen import GroupedGemm, Masked, Ragged, Schedule  # noqa: E402

from . import grouped_draws as draws  # noqa: E402
from .draws import bits  # noqa: E402

SEED = int(os.environ.get("JITGEN_TEST_SEED", secrets.randbits(31)))
NUM_DRAWS, NUM_RESULT_DRAWS, NUM_SMALL_DRAWS, NUM_SMALL_RESULT_DRAWS = 336, 120, 28, 12


def rng_of(index: int) -> random.Random:
    """Draws are made one by one: to list the candidates of all would take each worker a minute."""
    return random.Random(f"{SEED} {index}")


@pytest.mark.parametrize("index", range(NUM_DRAWS))
def test_grouped_gemm_equals_interpreter(index: int) -> None:
    draws.run_and_compare(draws.draw(rng_of(index), index))


@pytest.mark.parametrize("index", range(NUM_RESULT_DRAWS))
def test_grouped_gemm_of_other_results_equals_interpreter(index: int) -> None:
    draws.run_and_compare(draws.draw_result(rng_of(index), index))


@pytest.mark.parametrize("index", range(NUM_SMALL_DRAWS))
def test_grouped_gemm_small_equals_interpreter(index: int) -> None:
    draws.run_and_compare(draws.draw(rng_of(index), index, small=True), num_runs=2)


@pytest.mark.parametrize("index", range(NUM_SMALL_RESULT_DRAWS))
def test_grouped_gemm_of_other_results_small_equals_interpreter(index: int) -> None:
    draws.run_and_compare(draws.draw_result(rng_of(index), index, small=True), num_runs=2)


@pytest.mark.parametrize(
    ("num_groups", "n", "k"), [(32, 4096, 7168), (8, 7168, 2048), (256, 512, 1536)]
)
@pytest.mark.parametrize("layout", draws.LAYOUTS)
def test_grouped_gemm_chooses_a_schedule_that_equals_interpreter(
    layout: str, num_groups: int, n: int, k: int
) -> None:
    problem = GroupedGemm(n, k, num_groups=num_groups, layout=layout)  # type: ignore[arg-type]
    d = draws.Draw(problem, Schedule(64, 64, 2, 1), "mixed", "plain", "row", SEED)
    inputs = draws.make_inputs(d)
    owned = inputs.pop("owned")
    out = torch.full((*owned.shape, n), float("nan"), dtype=torch.bfloat16, device="cuda")
    draws.run(d, inputs, out)
    assert torch.equal(torch.isnan(out).any(-1), ~owned)
    assert torch.equal(torch.isnan(out).all(-1), ~owned)
    draws.compare(d, inputs, out)


@pytest.mark.parametrize("layout", draws.LAYOUTS)
def test_grouped_gemm_replays_in_a_cuda_graph_with_other_counts(layout: str) -> None:
    problem = GroupedGemm(264, 576, num_groups=6, layout=layout)  # type: ignore[arg-type]
    d = draws.Draw(problem, Schedule(128, 96, 3, 2), "mixed", "plain", "row", SEED)
    inputs = draws.make_inputs(d)
    inputs.pop("owned")
    inputs["a"].copy_(torch.randn(inputs["a"].shape, device="cuda").to(torch.float8_e4m3fn))
    inputs["sfa"].fill_(1.0)
    shape = (*inputs["a"].shape[:-1], 264)
    out = torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")
    draws.run(d, inputs, out, schedule=d.schedule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draws.run(d, inputs, out, schedule=d.schedule)
    groups = inputs["groups"]
    for change in (groups.flip(0), torch.zeros_like(groups), groups // 2, groups.clone()):
        groups.copy_(change)
        out.fill_(float("nan"))
        graph.replay()
        replayed = out.clone()
        out.fill_(float("nan"))
        draws.run(d, inputs, out, schedule=d.schedule)
        assert torch.equal(bits(replayed), bits(out))
        draws.compare(d, inputs, out)


def test_grouped_gemm_does_not_wait_for_the_gpu() -> None:
    d = replace(draws.draw(random.Random(1), 0), counts="mixed")
    inputs = draws.make_inputs(d)
    owned = inputs.pop("owned")
    dtype = getattr(torch, d.problem.d_dtype.name)
    out = torch.full((*owned.shape, d.problem.n), float("nan"), dtype=dtype, device="cuda")
    draws.run(d, inputs, out, schedule=d.schedule)
    stream = torch.cuda.current_stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    draws.run(d, inputs, out, schedule=d.schedule)
    assert not stream.query()  # the call came back while the GPU was still asleep
    torch.cuda.synchronize()
    draws.compare(d, inputs, out)


def test_grouped_gemm_reports_faulty_counts_in_debug_mode() -> None:
    d = draws.Draw(
        GroupedGemm(72, 144, num_groups=4), Schedule(64, 48, 3, 1), "mixed", "plain", "row", SEED
    )
    inputs = draws.make_inputs(d)
    scales, m = (inputs["sfa"], inputs["sfb"]), len(inputs["a"])
    offsets = torch.tensor([0, m + 1, m, m, m], dtype=torch.int32, device="cuda")
    with pytest.raises(jitgen.ProblemError, match=rf"groups\[1\] = {m + 1} "):
        jitgen.grouped_gemm(inputs["a"], inputs["b"], scales, layout=Ragged(offsets), debug=True)


def test_grouped_gemm_rejects_what_is_not_on_the_gpu() -> None:
    d = draws.Draw(
        GroupedGemm(72, 144, num_groups=4, layout="masked"),
        *(Schedule(64, 48, 3, 1), "mixed", "plain", "row", SEED),
    )
    inputs = draws.make_inputs(d)
    scales = inputs["sfa"], inputs["sfb"]
    layout = Masked(inputs["groups"].cpu())
    with pytest.raises(jitgen.DeviceError, match="groups is on cpu"):
        jitgen.grouped_gemm(inputs["a"], inputs["b"], scales, layout=layout)

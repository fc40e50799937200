"""What `make sanitize` needs beside the tests."""

from __future__ import annotations

import os

import pytest

from jitgen import build
from jitgen.codegen import render
from jitgen.ir_mla import MlaKernel
from jitgen.kernel import Kernel
from jitgen.merge import MergeKernel

# What one lane of a warp does for all, behind __syncwarp, and what every lane may do instead.
EVERY_LANE = {
    "if (math.lane == 0) mbarrier_arrive(math.full_scales +": "mbarrier_arrive(math.full_scales +",
    "mbarrier_init(empty_scales + 8 * stage, kTileThreads / 32);": (
        "mbarrier_init(empty_scales + 8 * stage, kTileThreads);"
    ),
}
# Under racecheck a GEMM in clusters does not end if threads arrive at the cluster's barrier and
# leave without having waited there; MLA decode does.
EVERY_THREAD = {
    "if constexpr (kClusterSize > 1) cluster_arrive();": (
        "if constexpr (kClusterSize > 1) cluster_arrive(), cluster_wait();"
    ),
    "if constexpr (kShareTiles) cluster_wait();": "",
    "cluster_wait();  // the inboxes are ready": "",
}


# The same for MLA decode, where warpgroups also count each other in without waiting; (times in the
# source, what takes its place).
MLA_EVERY_LANE = {
    "if (lane == 0) mbarrier_arrive(q_empty);": (1, "mbarrier_arrive(q_empty);"),
    "mbarrier_init(q_empty, kMathThreads / 32);": (1, "mbarrier_init(q_empty, kMathThreads);"),
    ".empty(half), 4);": (1, ".empty(half), 128);"),
    "if (lane == 0) mbarrier_arrive(stage.empty(kHalf));": (
        1,
        "mbarrier_arrive(stage.empty(kHalf));",
    ),
    "named_barrier_arrive<": (4, "named_barrier_sync<"),
}
# And for MLA decode over an FP8 cache.
FP8_EVERY_LANE = {
    "if (lane == 0) mbarrier_arrive_expect_tx(stage.full(), total * kTokenBytes);": (
        1,
        "mbarrier_arrive_expect_tx(stage.full(), lane == 0 ? total * kTokenBytes : 0);",
    ),
    "if (lane == 0) mbarrier_arrive(stage.ready());": (1, "mbarrier_arrive(stage.ready());"),
    "if (lane == 0) mbarrier_arrive(shared.p_full(index));": (
        1,
        "mbarrier_arrive(shared.p_full(index));",
    ),
    "if (lane == 0) {\n                mbarrier_arrive(shared.p_empty(index));": (
        1,
        "{\n                mbarrier_arrive(shared.p_empty(index));",
    ),
    "if (lane == 0) mbarrier_arrive(shared.segment_empty());": (
        2,
        "mbarrier_arrive(shared.segment_empty());",
    ),
    "if (lane_index() == 0) mbarrier_arrive(shared.segment_empty());": (
        1,
        "mbarrier_arrive(shared.segment_empty());",
    ),
    "mbarrier_init(stage.full(), kLoaders);": (1, "mbarrier_init(stage.full(), 32 * kLoaders);"),
    "mbarrier_init(stage.ready(), 1);": (1, "mbarrier_init(stage.ready(), 32);"),
    "mbarrier_init(stage.empty(), kOutThreads / 32);": (
        1,
        "mbarrier_init(stage.empty(), kOutThreads);",
    ),
    "mbarrier_init(shared.p_full(i), kScoreThreads / 32);": (
        1,
        "mbarrier_init(shared.p_full(i), kScoreThreads);",
    ),
    "mbarrier_init(shared.p_empty(i), kOutThreads / 32);": (
        1,
        "mbarrier_init(shared.p_empty(i), kOutThreads);",
    ),
    "mbarrier_init(shared.segment_empty(), kMathWarps + 1 + kLoaders);": (
        1,
        "mbarrier_init(shared.segment_empty(), 32 * (kMathWarps + 1 + kLoaders));",
    ),
}


def render_for_racecheck(kernel: Kernel | MlaKernel | MergeKernel) -> str:
    """The kernel's source, in which every lane that used shared memory hands it back itself.

    racecheck (CUDA 13.0) does not follow an order through __syncwarp: where a stage is used again,
    it reports the lanes that did not arrive as racing with the next one's data. On an H100, a 64x64
    tile of 56 K blocks: 3 hazards; with this source none. The two smallest tests of MLA decode: 13,
    and none. A K-grouped GEMM in clusters, whose threads all wait: 10 s; before, no end in 350 s.
    """
    source = render(kernel)
    changes = {}
    if isinstance(kernel, Kernel):
        changes = {few: (1, all_) for few, all_ in (EVERY_LANE | EVERY_THREAD).items()}
    elif isinstance(kernel, MlaKernel):
        changes = FP8_EVERY_LANE if kernel.problem.is_fp8 else MLA_EVERY_LANE
    for one_lane, (count, every_lane) in changes.items():
        if source.count(one_lane) != count:
            raise AssertionError(f"the template has changed: it holds no {one_lane!r}")
        source = source.replace(one_lane, every_lane)
    return source


@pytest.fixture(autouse=True)
def sanitized(monkeypatch: pytest.MonkeyPatch) -> None:
    """For racecheck, kernels whose order it can follow; $JITGEN_TEST_SANITIZER names the tool."""
    if os.environ.get("JITGEN_TEST_SANITIZER") == "racecheck":
        monkeypatch.setattr(build, "render", render_for_racecheck)

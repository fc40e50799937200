"""nvidia-smi: what it tells, and what is said where there is none."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from jitgen.runtime import driver
from jitgen.tuning import machine


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Plays nvidia-smi; returns the command lines."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout="1755\n1200\n" if "clocks" in command[1] else "580.95.05\n")

    monkeypatch.setattr(subprocess, "run", run)
    machine.driver_release.cache_clear()
    return commands


def test_machine_asks_nvidia_smi_for_the_gpu_that_is_visible(
    smi: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (machine.driver_release(), machine.sm_clock_mhz()) == ("580.95.05", 1755)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    machine.sm_clock_mhz()
    assert ["--id" in str(command) for command in smi] == [False, False, True]
    assert smi[-1][-1] == "--id=3"


def test_machine_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(driver, "driver_version", lambda: "13.0")
    machine.driver_release.cache_clear()
    assert (machine.driver_release(), machine.sm_clock_mhz()) == ("CUDA 13.0", None)
    machine.driver_release.cache_clear()

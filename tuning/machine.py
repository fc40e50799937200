"""What nvidia-smi tells of this machine."""

from __future__ import annotations

import functools
import os
import subprocess

from ..runtime import driver


@functools.cache
def driver_release() -> str:
    """Such as "580.95.05"; where there is no nvidia-smi, the CUDA version that the driver runs."""
    return _query("driver_version") or f"CUDA {driver.driver_version()}"


def sm_clock_mhz() -> int | None:
    """The clock of the first GPU that this process sees, now; None if nvidia-smi does not tell."""
    clock = _query("clocks.sm")
    return int(clock) if clock.isdigit() else None


def _query(field: str) -> str:
    """A field of the first GPU that CUDA_VISIBLE_DEVICES leaves; "" if it cannot be had."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    command += [f"--id={gpu}"] if gpu else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()

"""What calls may compile, what a refusal says, and what is counted and logged."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from typer.testing import CliRunner

import jitgen
from jitgen import JitForbiddenError, JitgenError, Schedule, acc, build, calls, cli, control, vector
from jitgen.errors import CaptureError, CompileError
from jitgen.lower import kernel_name, lower
from jitgen.problem import Gemm
from jitgen.runtime import driver
from jitgen.runtime.driver import LoadedKernel
from jitgen.runtime.stats import Counters, Stats
from jitgen.runtime.store import KernelStore

from . import fake_gpu
from .fake_gpu import FakeGpu
from .test_store import CUBIN, KEY, RESOURCES, SOURCE, Compiler

ROOT = Path(__file__).parents[2]
PROBLEM, SCHEDULE = Gemm(72, 144), Schedule(64, 48, 3, 1)
NAME = kernel_name(PROBLEM, SCHEDULE)
LOAD = calls._load.__wrapped__

# A call that warns where the test does not expect it fails the test.
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for the kernel store of this test, and no mode set."""
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("JITGEN_JIT", raising=False)
    monkeypatch.setattr(control, "_configured", None)
    monkeypatch.setattr(control, "_places", {})
    monkeypatch.setattr(build, "_configured", None)
    build.default_store.cache_clear()
    yield tmp_path / "cache" / "kernels"
    build.default_store.cache_clear()


@pytest.fixture
def serve(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a function of jitgen on tensors of PROBLEM, on a fake GPU that loads real cubins."""
    torch = pytest.importorskip("torch")
    gpu: FakeGpu = fake_gpu.install(monkeypatch)

    def load(cubin: bytes, name: str, *, smem_bytes: int, ordinal: int) -> LoadedKernel:
        assert (cubin[:4], name) == (b"\x7fELF", NAME)
        return LoadedKernel(lower(PROBLEM, SCHEDULE), None, smem_bytes, 0)

    monkeypatch.setattr(driver, "load", load)
    monkeypatch.setattr(calls, "_load", functools.cache(lambda p, s, _: LOAD(p, s, 0)))
    a, b = (
        torch.from_numpy(rng.integers(0, 120, (rows, 144), np.uint8)).view(torch.float8_e4m3fn)
        for rows in (7, 72)
    )
    scales = torch.ones(7, 2), torch.ones(1, 2)
    out = torch.empty(7, 72, dtype=torch.bfloat16)

    def call(function: Any = jitgen.gemm, *, is_capturing: bool = False) -> int:
        """The number of launches so far."""
        gpu.is_capturing = is_capturing
        result = function(a, b, scales, out=out, schedule=SCHEDULE)
        if function is jitgen.bind:
            result()
        return len(gpu.launches)

    return call


def cubins(store: Path) -> list[Path]:
    return list(store.glob("??/*/kernel.cubin"))


# --- modes ----------------------------------------------------------------------------------------


def test_jit_mode_is_what_configure_says_or_else_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert control.jit_mode() == "allow"
    monkeypatch.setenv("JITGEN_JIT", "")
    assert control.jit_mode() == "allow"
    monkeypatch.setenv("JITGEN_JIT", "forbid")
    assert control.jit_mode() == "forbid"
    jitgen.configure(jit="warn")
    assert control.jit_mode() == "warn"


@pytest.mark.parametrize("mode", ["Forbid", "", "no", 1, []], ids=str)
def test_configure_rejects(mode: Any) -> None:
    jitgen.configure(jit="warn")
    with pytest.raises(JitgenError, match=r"^jit is .*, must be one of allow, warn, forbid$"):
        jitgen.configure(jit=mode)
    assert control.jit_mode() == "warn"


def test_configure_leaves_what_it_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "pdl_enabled", False)
    jitgen.configure(jit="warn")
    jitgen.configure(pdl=True)
    assert (control.jit_mode(), control.pdl_enabled) == ("warn", True)
    jitgen.configure()
    jitgen.configure(jit="allow")
    assert (control.jit_mode(), control.pdl_enabled) == ("allow", True)
    with pytest.raises(JitgenError, match=r"^pdl is 1, must be True or False$"):
        jitgen.configure(jit="forbid", pdl=1)  # type: ignore[arg-type]
    assert (control.jit_mode(), control.pdl_enabled) == ("allow", True)


def test_gemm_rejects_a_mode_of_the_environment(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITGEN_JIT", "off")
    with pytest.raises(JitgenError, match=r"^JITGEN_JIT is 'off', must be one of allow, warn"):
        serve()


def test_doctor_shows_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, word in (("forbid", "ok"), ("off", "no")):
        monkeypatch.setenv("JITGEN_JIT", mode)
        lines = CliRunner().invoke(cli.app, ["doctor"]).stdout.splitlines()
        (line,) = (line for line in lines if "JITGEN_JIT" in line)
        assert re.match(rf"{word}  JIT .*{mode}", line)


def test_gemm_compiles_silently_by_default(serve: Callable[..., Any], store: Path) -> None:
    before = jitgen.stats()
    assert [serve(), serve()] == [1, 2]
    assert len(cubins(store)) == 1
    after = jitgen.stats()
    assert after.compiles == before.compiles + 1
    assert after.compile_seconds > before.compile_seconds
    assert after.loads == before.loads + 1


def test_gemm_warns_once_of_a_kernel_that_it_compiles(serve: Callable[..., Any]) -> None:
    jitgen.configure(jit="warn")
    with pytest.warns(RuntimeWarning, match="compiling while serving") as caught:
        serve()
    (warning,) = caught
    for part in (NAME, str(PROBLEM), str(SCHEDULE), "jitgen prebuild"):
        assert part in str(warning.message)
    calls._calls.clear()
    calls._load.cache_clear()
    assert serve() == 2
    build.default_store.cache_clear()  # as in another process
    calls._load.cache_clear()
    assert serve(jitgen.bind) == 3


@pytest.mark.parametrize("function", [jitgen.gemm, jitgen.bind], ids=["gemm", "bind"])
def test_forbidden_call_names_the_command_that_makes_its_kernel(
    serve: Callable[..., Any], store: Path, function: Any
) -> None:
    jitgen.configure(jit="forbid")
    before = jitgen.stats()
    with pytest.raises(JitForbiddenError) as caught:
        serve(function)
    message = str(caught.value)
    for part in ('jit="forbid"', NAME, str(PROBLEM), str(SCHEDULE), str(store), "plan("):
        assert part in message
    assert list(store.rglob("*")) == []
    command = message[message.index("echo ") :]
    command = command.replace("jitgen", f"'{sys.executable}' -m jitgen", 1)
    made = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JITGEN_JIT": "forbid"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.startswith("kernels: 1 compiled")
    assert serve(function) == 1
    after = jitgen.stats()
    assert after.compiles == before.compiles
    assert (after.misses, after.disk_hits) == (before.misses + 1, before.disk_hits + 1)


def test_forbidden_call_names_the_python_that_makes_a_kernel_with_an_epilogue() -> None:
    jitgen.configure(jit="forbid")
    epilogue = acc + vector("bias")
    problem = Gemm(72, 144, jitgen.F32, epilogue)
    with pytest.raises(JitForbiddenError, match=re.escape(str(epilogue))) as caught:
        control.build_for_call(problem, SCHEDULE)
    made = str(caught.value)
    made = made[made.index("jitgen.build.prebuild(") :]
    (built,) = eval(made, {"jitgen": jitgen, "epilogue": epilogue})
    assert built.compiled
    kernel, entry = control.build_for_call(problem, SCHEDULE)
    assert (kernel.problem, entry.name) == (problem, kernel.name)


def test_forbidden_call_does_not_use_a_damaged_entry(
    serve: Callable[..., Any], store: Path
) -> None:
    build.build(lower(PROBLEM, SCHEDULE))
    (cubin,) = cubins(store)
    cubin.write_bytes(b"")
    build.default_store.cache_clear()
    jitgen.configure(jit="forbid")
    with (
        pytest.warns(RuntimeWarning, match="is damaged.*it is not used"),
        pytest.raises(CompileError, match="jitgen prebuild"),
    ):
        serve()


def test_forbidden_call_of_an_illegal_schedule_is_refused_for_that() -> None:
    jitgen.configure(jit="forbid")
    with pytest.raises(jitgen.ScheduleError, match="block_m = 100"):
        control.build_for_call(PROBLEM, Schedule(100, 64, 4, 1))


def test_forbidden_call_renders_once_and_takes_no_lock(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A miss takes 0.03 ms, a kernel's first 0.7, a process's first 70: shown, decides nothing."""
    jitgen.configure(jit="forbid")
    control._key.cache_clear()
    rendered = []
    render = build.render
    monkeypatch.setattr(build, "render", lambda kernel: rendered.append(kernel) or render(kernel))
    milliseconds = []
    for problem in (PROBLEM, Gemm(80, 144), Gemm(80, 144)):  # the first one loads NVRTC
        started = time.perf_counter()
        with pytest.raises(JitForbiddenError):
            control.build_for_call(problem, SCHEDULE)
        milliseconds.append(1e3 * (time.perf_counter() - started))
    print("ms of the process's first miss, of a kernel's first and second:", milliseconds)
    assert len(rendered) == 2
    assert list(store.rglob("*")) == []


def test_prebuild_compiles_in_every_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITGEN_JIT", "forbid")  # for the compile processes
    jitgen.configure(jit="forbid")
    plan = jitgen.plan(PROBLEM, [7], gpu="NVIDIA H100 80GB HBM3", num_sms=132)
    assert [built.compiled for built in plan.prebuild(num_processes=1)] == [True]
    control.build_for_call(PROBLEM, plan.schedule(7))


def test_prebuild_command_pins_a_schedule(tmp_path: Path, store: Path) -> None:
    problems = tmp_path / "problems.json"
    problems.write_text(json.dumps([{"n": 72, "k": 144, "m": [1, 4096]}]))
    arguments = ["prebuild", "--problems", str(problems), "--schedule"]
    done = CliRunner().invoke(cli.app, [*arguments, str(SCHEDULE)])
    assert done.stdout.startswith("kernels: 1 compiled"), done.output
    assert [entry.name for entry in KernelStore(store).entries()] == [NAME]
    refused = CliRunner().invoke(cli.app, [*arguments, "64x48 stage=3"])
    assert "use stages=" in refused.stderr


@pytest.mark.parametrize("function", [jitgen.gemm, jitgen.bind])
def test_call_under_capture_loads_no_kernel(serve: Callable[..., Any], function: Any) -> None:
    before = jitgen.stats()
    match = r"kernel for gemm .*make the call once before the capture"
    with pytest.raises(CaptureError, match=match):
        serve(function, is_capturing=True)
    assert jitgen.stats() == before
    assert serve(function) == 1
    assert serve(function, is_capturing=True) == 2


# --- counters -------------------------------------------------------------------------------------


def test_counters_are_complete_and_monotone_in_threads() -> None:
    total = Counters()
    parts = [Counters(total) for _ in range(4)]

    def count(part: Counters) -> None:
        last = Stats()
        for _ in range(500):
            part.add(compiles=1, compile_seconds=0.5)
            part.add(loads=1)
            now = total.stats
            assert now.compiles > last.compiles
            assert now.loads > last.loads
            assert now.compile_seconds == 0.5 * now.compiles  # of one moment
            last = now

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, parts * 2))
    assert [part.stats for part in parts] == [Stats(compiles=1000, loads=1000)] * 4
    assert total.stats == Stats(compiles=4000, loads=4000)


def test_stats_count_what_every_store_does(tmp_path: Path) -> None:
    before = jitgen.stats()
    for _ in range(2):
        opened = KernelStore(tmp_path / "kernels")
        for _ in range(2):
            opened.get_or_compile(KEY, Compiler(), name="kernel", source=SOURCE)
    after = jitgen.stats()
    grown = {
        name: getattr(after, name) - getattr(before, name)
        for name in ("compiles", "misses", "disk_hits", "memory_hits", "loads")
    }
    assert grown == {"compiles": 1, "misses": 1, "disk_hits": 1, "memory_hits": 2, "loads": 0}
    assert after.compile_seconds == before.compile_seconds + RESOURCES.compile_seconds


# --- log records ----------------------------------------------------------------------------------


def record(caplog: pytest.LogCaptureFixture, start: str) -> dict[str, Any]:
    """The fields of the one record that starts so."""
    (found,) = (record for record in caplog.records if record.getMessage().startswith(start))
    assert found.name == "jitgen"
    return vars(found)


def test_log_tells_of_compiles_and_loads(
    serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "jitgen")
    serve()
    serve()
    key = control._key(PROBLEM, SCHEDULE).digest
    for start in ("compiled", "loaded"):
        fields = record(caplog, start)
        assert (fields["kernel"], fields["key"], fields["levelname"]) == (NAME, key, "INFO")
        assert fields["seconds"] > 0
    assert record(caplog, "loaded")["gpu"] == 0
    assert len(caplog.records) == 2


def test_log_tells_of_heals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = jitgen.stats()
    root = tmp_path / "kernels"
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entry = KernelStore(root).get_or_compile(KEY, Compiler(), name="k", source=SOURCE)
        assert entry.path
        (entry.path / "kernel.cubin").write_bytes(CUBIN[1:])
    fields = record(caplog, "replaced the damaged k")
    assert (fields["kernel"], fields["key"], fields["levelname"]) == ("k", KEY.digest, "WARNING")
    assert jitgen.stats().heals == before.heals + 1


def test_log_tells_of_waits_for_another_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "jitgen")
    opened = KernelStore(tmp_path / "kernels")
    (tmp_path / "kernels" / "locks").mkdir()
    lock = filelock.FileLock(tmp_path / "kernels" / "locks" / f"{KEY.digest}.lock")
    with lock:
        waiter = threading.Thread(
            target=opened.get_or_compile,
            args=(KEY, Compiler()),
            kwargs={"name": "k", "source": SOURCE},
        )
        waiter.start()
        deadline = time.monotonic() + 60
        while not opened.stats.waits and time.monotonic() < deadline:
            time.sleep(0.01)
    waiter.join()
    assert opened.stats == Stats(compiles=1, misses=1, waits=1)
    fields = record(caplog, "waited")
    assert (fields["kernel"], fields["key"]) == ("k", KEY.digest)
    assert fields["seconds"] > 0


def test_log_prints_nothing_by_default() -> None:
    code = "import jitgen, logging; logging.getLogger('jitgen').warning('heard')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")

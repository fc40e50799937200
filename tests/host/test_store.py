"""The kernel store: round trips, damage, races, killed writers, folders that are not trusted."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import filelock
import platformdirs
import pytest

from jitgen.errors import CompileError, StoreError
from jitgen.runtime.entry import Entry
from jitgen.runtime.key import KernelKey, make_key
from jitgen.runtime.nvrtc import (
    Compiled,
    Resources,
    compile_cubin,
    compile_options,
    compiler_version,
)
from jitgen.runtime.stats import Stats
from jitgen.runtime.store import KernelStore
from jitgen.runtime.tiers import Tiers
from jitgen.target import SM90A

# A store that warns where the test does not expect it fails the test.
pytestmark = pytest.mark.filterwarnings("error")

RESOURCES = Resources(
    registers=168, spill_bytes=0, stack_bytes=0, static_smem_bytes=1024, compile_seconds=0.25
)
SOURCE = "// kernel é\n"
CUBIN = bytes(range(256)) * 16
LOG = "ptxas info    : Used 168 registers"


def key_of(source: str = SOURCE) -> KernelKey:
    return make_key(source, {}, ("-std=c++17",), "13.0.88", "sm_90a")


KEY = key_of()


class Compiler:
    """A stand-in for NVRTC that counts its calls."""

    def __init__(self, cubin: bytes = CUBIN, seconds: float = 0.0) -> None:
        self.calls = 0
        self.cubin = cubin
        self.seconds = seconds

    def __call__(self) -> Compiled:
        self.calls += 1
        time.sleep(self.seconds)
        return Compiled(self.cubin, LOG, RESOURCES)


def put(store: KernelStore, source: str = SOURCE, cubin: bytes = CUBIN) -> Entry:
    return store.get_or_compile(key_of(source), Compiler(cubin), name="gemm", source=source)


def never() -> Compiled:
    raise AssertionError("compiled again")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "kernels"


def folder_of(root: Path, key: KernelKey = KEY) -> Path:
    return root / key.digest[:2] / key.digest


# --- round trip ---------------------------------------------------------------------------------


def test_get_or_compile_publishes_what_another_store_loads(root: Path) -> None:
    first = put(KernelStore(root))
    store = KernelStore(root)
    second = store.get_or_compile(KEY, never, name="gemm", source=SOURCE)
    assert second == first
    assert second == Entry(KEY, "gemm", CUBIN, SOURCE, RESOURCES, LOG, folder_of(root))
    assert store.stats == Stats(disk_hits=1)


def test_entry_holds_plain_files_and_a_manifest(root: Path) -> None:
    folder = put(KernelStore(root)).path
    assert folder == folder_of(root)
    assert sorted(file.name for file in folder.iterdir()) == [
        "entry.json",
        "kernel.cu",
        "kernel.cubin",
    ]
    assert (folder / "kernel.cubin").read_bytes() == CUBIN
    assert (folder / "kernel.cu").read_text(encoding="utf-8") == SOURCE
    manifest = json.loads((folder / "entry.json").read_bytes())
    assert manifest["key"] == KEY.to_json()
    assert manifest["log"] == LOG
    assert manifest["resources"]["registers"] == 168


def test_published_files_are_private_whatever_the_umask(root: Path) -> None:
    umask = os.umask(0)
    try:
        put(KernelStore(root))
    finally:
        os.umask(umask)
    folder = folder_of(root)
    for path in (root, folder.parent, folder):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    assert KernelStore(root).get(KEY) is not None


def test_publish_leaves_nothing_behind(root: Path) -> None:
    put(KernelStore(root))
    assert list((root / "tmp").iterdir()) == []
    assert [file.suffix for file in (root / "locks").iterdir()] in ([], [".lock"])


def test_get_misses_then_hits_disk_then_memory(root: Path) -> None:
    put(KernelStore(root))
    store = KernelStore(root)
    assert store.get(key_of("// other\n")) is None
    entry = store.get(KEY)
    assert entry is store.get(KEY)
    assert store.stats == Stats(misses=1, disk_hits=1, memory_hits=1)


def test_get_or_compile_counts_one_outcome_per_call(root: Path) -> None:
    store = KernelStore(root)
    put(store)
    put(store)
    assert store.stats == Stats(compiles=1, misses=1, memory_hits=1)


def test_memory_tier_survives_the_loss_of_the_folder(root: Path) -> None:
    store = KernelStore(root)
    entry = put(store)
    shutil.rmtree(root)
    assert store.get(KEY) is entry
    assert put(store, "// next\n").path == folder_of(root, key_of("// next\n"))


def test_moved_store_keeps_its_entries(root: Path, tmp_path: Path) -> None:
    put(KernelStore(root))
    root.rename(tmp_path / "moved")
    entry = KernelStore(tmp_path / "moved").get(KEY)
    assert entry is not None
    assert entry.path == folder_of(tmp_path / "moved")


def test_entries_lists_disk_and_memory(root: Path) -> None:
    put(KernelStore(root), "// a\n")
    store = KernelStore(root)
    put(store, "// b\n")
    shutil.rmtree(folder_of(root, key_of("// b\n")))
    assert sorted(entry.source for entry in store.entries()) == ["// a\n", "// b\n"]
    assert [entry.source for entry in KernelStore(root).entries()] == ["// a\n"]


def test_entries_leaves_damaged_ones_out_with_a_warning(root: Path) -> None:
    put(KernelStore(root), "// a\n")
    put(KernelStore(root), "// b\n")
    (folder_of(root, key_of("// a\n")) / "kernel.cubin").unlink()
    with pytest.warns(RuntimeWarning, match=r"kernel\.cubin.*left out"):
        assert [entry.source for entry in KernelStore(root).entries()] == ["// b\n"]


def test_get_or_compile_passes_compile_errors_on_and_stores_nothing(root: Path) -> None:
    def fail() -> Compiled:
        raise CompileError("refused", "log")

    store = KernelStore(root)
    with pytest.raises(CompileError, match="refused"):
        store.get_or_compile(KEY, fail, name="gemm", source=SOURCE)
    assert list(store.entries()) == []
    assert put(store).cubin == CUBIN
    assert store.stats == Stats(misses=2, compiles=1)


def test_get_or_compile_rejects_source_of_another_key(root: Path) -> None:
    with pytest.raises(StoreError, match="source of gemm"):
        KernelStore(root).get_or_compile(KEY, never, name="gemm", source="// other\n")


def test_real_kernel_is_compiled_once_and_loaded_by_the_next_store(root: Path) -> None:
    source = '#include "value.cuh"\nextern "C" __global__ void k(int* x) { *x = VALUE; }\n'
    headers = {"value.cuh": "#define VALUE 1\n", "other.cuh": ""}
    key = make_key(source, headers, compile_options(), compiler_version(), SM90A.arch)
    compiled = compile_cubin(source, name="k.cu", headers=headers)
    KernelStore(root).get_or_compile(key, lambda: compiled, name="k", source=source)
    entry = KernelStore(root).get_or_compile(key, never, name="k", source=source)
    assert entry.cubin == compiled.cubin
    assert entry.resources == compiled.resources


# --- damage: a miss with a warning, healed by the next compile ----------------------------------


def flip_bit(folder: Path) -> None:
    data = bytearray((folder / "kernel.cubin").read_bytes())
    data[100] ^= 1
    (folder / "kernel.cubin").write_bytes(data)


def edit_manifest(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "entry.json").read_bytes()) | changes
        (folder / "entry.json").write_text(json.dumps(manifest))

    return edit


def drop_field(folder: Path) -> None:
    manifest = json.loads((folder / "entry.json").read_bytes())
    del manifest["log"]
    (folder / "entry.json").write_text(json.dumps(manifest))


def copy_from_another(*files: str) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        other = put(KernelStore(folder.parent.parent), "// other\n", b"other cubin").path
        assert other is not None
        for file in files:
            shutil.copyfile(other / file, folder / file)

    return copy


def to_symlink(*parts: str) -> Callable[[Path], None]:
    def link(folder: Path) -> None:
        path = folder.joinpath(*parts)
        path = Path(os.path.normpath(path))
        aside = folder.parent.parent.parent / "aside"
        path.rename(aside)
        path.symlink_to(aside)

    return link


def to_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit-flip": (flip_bit, "kernel.cubin has another SHA-256"),
    "truncated": (lambda f: os.truncate(f / "kernel.cubin", 1000), "another SHA-256"),
    "empty-cubin": (lambda f: os.truncate(f / "kernel.cubin", 0), "another SHA-256"),
    "no-cubin": (lambda f: (f / "kernel.cubin").unlink(), "No such file"),
    "no-source": (lambda f: (f / "kernel.cu").unlink(), "No such file"),
    "no-manifest": (lambda f: (f / "entry.json").unlink(), "No such file"),
    "nothing": (lambda f: [file.unlink() for file in f.iterdir()], "No such file"),
    "source-edited": (lambda f: (f / "kernel.cu").write_text("// x"), "kernel.cu has another"),
    "garbage": (lambda f: (f / "entry.json").write_bytes(b"\xff\0{"), "is damaged"),
    "empty-manifest": (lambda f: os.truncate(f / "entry.json", 0), "Expecting value"),
    "cut-manifest": (lambda f: os.truncate(f / "entry.json", 99), "is damaged"),
    "list": (lambda f: (f / "entry.json").write_text("[]"), "format version"),
    "nested": (lambda f: (f / "entry.json").write_text("[" * 200_000), "is damaged"),
    "wrong-sha": (edit_manifest(cubin_sha256="0" * 64), "kernel.cubin has another SHA-256"),
    "sha-of-other-type": (edit_manifest(cubin_sha256=None), "another SHA-256"),
    "format": (edit_manifest(format_version=1), "format version 2"),
    "unknown-field": (edit_manifest(more=1), "exactly the fields"),
    "missing-field": (drop_field, "exactly the fields"),
    "name": (edit_manifest(name=1), "is no text"),
    "log": (edit_manifest(log=None), "is no text"),
    "other-name": (edit_manifest(name="gemn"), "entry.json has another SHA-256 than it says"),
    "other-log": (edit_manifest(log="fine"), "entry.json has another SHA-256 than it says"),
    "other-registers": (
        edit_manifest(resources=RESOURCES.__dict__ | {"registers": 128}),
        "entry.json has another SHA-256 than it says",
    ),
    "no-key": (edit_manifest(key={}), "kernel key"),
    "other-key": (edit_manifest(key=key_of("// x").to_json()), "is that of kernel"),
    "resources": (edit_manifest(resources={"registers": 1}), "resources need"),
    "registers": (
        edit_manifest(resources=dict.fromkeys(RESOURCES.__dict__, "1")),
        "registers is '1'",
    ),
    "swapped-cubin": (copy_from_another("kernel.cubin"), "another SHA-256"),
    "swapped-entry": (
        copy_from_another("kernel.cubin", "kernel.cu", "entry.json"),
        "is that of kernel",
    ),
    "cubin-symlink": (to_symlink("kernel.cubin"), "kernel.cubin is a symlink"),
    "entry-symlink": (to_symlink(), "is a symlink"),
    "shard-symlink": (to_symlink(".."), "is a symlink"),
    "entry-is-file": (to_file, "is not a folder"),
    "entry-writable": (lambda f: f.chmod(0o770), r"written by others \(mode 770\)"),
    "shard-writable": (lambda f: f.parent.chmod(0o707), r"written by others \(mode 707\)"),
    "cubin-writable": (lambda f: (f / "kernel.cubin").chmod(0o620), r"written by others"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_entry_is_a_miss_and_heals(case: str, root: Path) -> None:
    put(KernelStore(root))
    damage, message = DAMAGE[case]
    damage(folder_of(root))

    store = KernelStore(root)
    with pytest.warns(RuntimeWarning, match=message):
        assert store.get(KEY) is None
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert put(store) == Entry(KEY, "gemm", CUBIN, SOURCE, RESOURCES, LOG, folder_of(root))
    assert len(caught) == 1
    assert store.stats == Stats(misses=2, compiles=1, heals=1)

    healed = KernelStore(root).get(KEY)
    assert healed is not None
    assert healed.cubin == CUBIN
    assert not folder_of(root).parent.is_symlink()
    assert not folder_of(root).is_symlink()
    assert list((root / "tmp").iterdir()) == []


def test_healing_a_symlink_leaves_its_target_alone(root: Path, tmp_path: Path) -> None:
    put(KernelStore(root))
    to_symlink()(folder_of(root))
    with pytest.warns(RuntimeWarning, match="symlink"):
        put(KernelStore(root))
    assert (tmp_path / "aside" / "kernel.cubin").read_bytes() == CUBIN


def test_entry_of_another_user_is_a_miss(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(KernelStore(root))
    store = KernelStore(root)
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.warns(RuntimeWarning, match=f"belongs to user {user - 1}, not to {user}"):
        assert store.get(KEY) is None


# --- roots that cannot be trusted or written ----------------------------------------------------


@pytest.mark.parametrize("mode", [0o770, 0o720, 0o777, 0o1777])
def test_store_rejects_a_root_that_others_may_write_to(mode: int, root: Path) -> None:
    root.mkdir()
    root.chmod(mode)
    with pytest.raises(StoreError, match=rf"mode {mode:o}\).*chmod go-w.*JITGEN_CACHE_DIR"):
        KernelStore(root)


def test_store_rejects_a_symlinked_root(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is a symlink"):
        KernelStore(root)


def test_store_rejects_a_root_of_another_user(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir(mode=0o700)
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(StoreError, match=f"belongs to user {user - 1}"):
        KernelStore(root)


def test_store_rejects_a_root_that_is_a_file(root: Path) -> None:
    root.write_bytes(b"")
    with pytest.raises(StoreError, match="is not a folder"):
        KernelStore(root)


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the file system read-only for this process; chmod would not stop root."""
    real_mkdir, real_open = os.mkdir, os.open

    def mkdir(path: str, *args: object, **kwargs: object) -> None:
        if os.path.lexists(path):
            real_mkdir(path)
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    def open_(path: str, flags: int, *args: object, **kwargs: object) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real_open(path, flags, *args, **kwargs)

    def start() -> None:
        monkeypatch.setattr(os, "mkdir", mkdir)
        monkeypatch.setattr(os, "open", open_)

    return start


def test_root_that_cannot_be_made_falls_back_to_memory(
    root: Path, read_only: Callable[[], None]
) -> None:
    read_only()
    with pytest.warns(RuntimeWarning, match=r"Read-only file system.*JITGEN_CACHE_DIR"):
        store = KernelStore(root)
    entry = put(store)  # without another warning
    assert put(store, "// next\n").path is None
    assert entry.path is None
    assert store.root is None
    assert store.get(KEY) is entry
    assert sorted(e.source for e in store.entries()) == sorted([SOURCE, "// next\n"])
    assert store.stats == Stats(compiles=2, misses=2, memory_hits=1)


@pytest.mark.parametrize("locking", [True, False], ids=["locking", "no-locking"])
def test_read_only_root_is_still_read(
    locking: bool, root: Path, read_only: Callable[[], None]
) -> None:
    put(KernelStore(root))
    read_only()
    store = KernelStore(root, locking=locking)
    assert put(store).path == folder_of(root)
    with pytest.warns(RuntimeWarning, match="Read-only file system"):
        assert put(store, "// next\n").path is None
    assert put(store, "// last\n").path is None  # without another warning
    assert store.stats == Stats(disk_hits=1, misses=2, compiles=2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_root_without_write_permission_falls_back_to_memory(root: Path) -> None:
    put(KernelStore(root))
    root.chmod(0o500)
    try:
        store = KernelStore(root)
        with pytest.warns(RuntimeWarning, match="Permission denied"):
            assert put(store, "// next\n").cubin == CUBIN
        assert store.get(KEY) is not None
    finally:
        root.chmod(0o700)


def test_full_disk_keeps_the_compiled_kernel(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = KernelStore(root)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert put(store).cubin == CUBIN
    assert list((root / "tmp").iterdir()) == []
    assert KernelStore(root).get(KEY) is None


@pytest.mark.parametrize("raises", [True, False], ids=["platformdirs-new", "platformdirs-old"])
def test_without_home_the_store_is_in_memory(
    raises: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def user_cache_dir(name: str) -> str:
        if raises:
            raise RuntimeError("could not determine the home directory")
        return f"~/.cache/{name}"

    monkeypatch.delenv("JITGEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", user_cache_dir)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="no home folder"):
        store = KernelStore()
    assert put(store).path is None
    assert list(tmp_path.iterdir()) == []


def test_default_root_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "cache"))
    assert Tiers.of().own == tmp_path / "cache" / "kernels"
    assert put(KernelStore()).path == folder_of(tmp_path / "cache" / "kernels")
    monkeypatch.delenv("JITGEN_CACHE_DIR")
    assert Tiers.of().own == Path(platformdirs.user_cache_dir("jitgen")) / "kernels"


# --- races --------------------------------------------------------------------------------------

PREAMBLE = f"""
import os, signal, sys, time
sys.path[:] = {sys.path!r}
from pathlib import Path
from jitgen.runtime.key import make_key
from jitgen.runtime.nvrtc import Compiled, Resources
from jitgen.runtime.store import KernelStore
root = Path(sys.argv[1])
source = {SOURCE!r}
key = make_key(source, {{}}, ("-std=c++17",), "13.0.88", "sm_90a")
done = Compiled({CUBIN!r}, "", Resources(168, 0, 0, 1024, 0.25))
"""

RACE = (
    PREAMBLE
    + """
def compile():
    with open(root.parent / "compiles", "a") as log:
        log.write("x")
    time.sleep(0.2)
    return done
print("ready", flush=True)
sys.stdin.readline()
store = KernelStore(root, locking=sys.argv[2] == "True")
entry = store.get_or_compile(key, compile, name="gemm", source=source)
assert entry.cubin == done.cubin and entry.path
print(store.stats.compiles, flush=True)
"""
)

HANG = (
    PREAMBLE
    + """
def compile():
    print("compiling", flush=True)
    time.sleep(60)
KernelStore(root).get_or_compile(key, compile, name="gemm", source=source)
"""
)

KILLED_WRITER = (
    PREAMBLE
    + """
os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
KernelStore(root).get_or_compile(key, lambda: done, name="gemm", source=source)
"""
)


def start(script: str, root: Path, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", script, str(root), *map(str, args)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("locking", [True, False], ids=["locking", "no-locking"])
def test_eight_processes_race_on_a_cold_key(locking: bool, root: Path, tmp_path: Path) -> None:
    processes = [start(RACE, root, locking) for _ in range(8)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=30) for process in processes]
    assert [stderr for _, stderr in outputs] == [""] * 8
    compiles = sum(int(stdout) for stdout, _ in outputs)
    assert compiles == len((tmp_path / "compiles").read_text())
    assert compiles == 1 if locking else 1 <= compiles <= 8
    assert put(KernelStore(root)).cubin == CUBIN
    assert list((root / "tmp").iterdir()) == []


def test_eight_threads_race_on_a_cold_key(root: Path) -> None:
    store, compiler, barrier = KernelStore(root), Compiler(seconds=0.1), threading.Barrier(8)

    def ask(_: int) -> Entry:
        barrier.wait()
        return store.get_or_compile(KEY, compiler, name="gemm", source=SOURCE)

    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(ask, range(8)))
    assert compiler.calls == 1
    assert all(entry is entries[0] for entry in entries)
    assert store.stats == Stats(compiles=1, misses=1, memory_hits=7)


def test_threads_compile_different_keys_at_the_same_time(root: Path) -> None:
    store, barrier = KernelStore(root), threading.Barrier(4, timeout=10)

    def compile() -> Compiled:
        barrier.wait()  # passes only if four compiles run at once
        return Compiler()()

    def ask(idx: int) -> Entry:
        source = f"// {idx}\n"
        return store.get_or_compile(key_of(source), compile, name="gemm", source=source)

    with ThreadPoolExecutor(4) as pool:
        assert len({entry.source for entry in pool.map(ask, range(4))}) == 4
    assert store.stats.compiles == 4


@pytest.mark.parametrize("damaged", [False, True], ids=["cold", "damaged"])
def test_stores_without_locks_race_and_each_uses_what_it_compiled(
    damaged: bool, root: Path
) -> None:
    if damaged:
        put(KernelStore(root))
        flip_bit(folder_of(root))
        warnings.filterwarnings("ignore", message="kernel store entry .* is damaged")
    barrier = threading.Barrier(8)

    def ask(idx: int) -> tuple[Compiler, Entry]:
        store = KernelStore(root, locking=False)
        compiler = Compiler(cubin=bytes([idx]))
        barrier.wait()
        return compiler, store.get_or_compile(KEY, compiler, name="gemm", source=SOURCE)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(ask, range(8)))
    assert all(entry.cubin == compiler.cubin for compiler, entry in results if compiler.calls)
    winner = KernelStore(root).get(KEY)
    assert winner is not None
    assert winner.cubin in {bytes([idx]) for idx in range(8)}
    assert list((root / "tmp").iterdir()) == []


def test_loser_of_a_race_keeps_its_result_and_the_winners_entry_stays(root: Path) -> None:
    def compile_slower_than_another() -> Compiled:
        put(KernelStore(root, locking=False), cubin=b"winner")
        return Compiler(b"loser")()

    store = KernelStore(root, locking=False)
    entry = store.get_or_compile(KEY, compile_slower_than_another, name="gemm", source=SOURCE)
    assert entry.cubin == b"loser"
    assert (folder_of(root) / "kernel.cubin").read_bytes() == b"winner"
    assert list((root / "tmp").iterdir()) == []


def test_writer_killed_before_the_rename_does_no_harm(root: Path) -> None:
    process = start(KILLED_WRITER, root)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == -signal.SIGKILL
    assert len(list((root / "tmp").iterdir())) == 1
    store = KernelStore(root)
    assert store.get(KEY) is None
    assert list(store.entries()) == []
    assert put(store).path == folder_of(root)
    assert store.stats == Stats(compiles=1, misses=2)


def test_lock_timeout_names_the_holder_and_a_killed_holder_blocks_nobody(root: Path) -> None:
    process = start(HANG, root)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "compiling\n"
        with pytest.raises(StoreError) as caught:
            put(KernelStore(root, lock_timeout_s=0.2))
        for part in (KEY.digest, f"process {process.pid} on ", "0.2 s", "JITGEN_CACHE_LOCKING=0"):
            assert part in str(caught.value)
        assert put(KernelStore(root, locking=False)).cubin == CUBIN
    finally:
        process.kill()
        process.communicate()
    shutil.rmtree(folder_of(root))
    assert put(KernelStore(root, lock_timeout_s=5)).cubin == CUBIN


def test_lock_timeout_in_a_thread_says_so(root: Path) -> None:
    store = KernelStore(root, lock_timeout_s=0.1)

    def compile_while_another_asks() -> Compiled:
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(put, store).exception()
        assert isinstance(error, StoreError)
        assert re.search("another thread of this process", str(error))
        return Compiler()()

    entry = store.get_or_compile(KEY, compile_while_another_asks, name="gemm", source=SOURCE)
    assert entry.cubin == CUBIN


def test_file_system_without_locks_is_an_error_with_a_remedy(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    with pytest.raises(StoreError, match=r"No locks available.*JITGEN_CACHE_LOCKING=0"):
        put(KernelStore(root))
    assert put(KernelStore(root, locking=False)).path == folder_of(root)


def test_stats_of_one_store_are_its_own(root: Path) -> None:
    first = KernelStore(root)
    put(first)
    assert KernelStore(root).stats == Stats()
    assert replace(first.stats, misses=0) == Stats(compiles=1)

"""Tiers of folders: what is found where, what is kept, what is trusted, what is counted."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import jitgen
from jitgen import build, cli, control
from jitgen.errors import StoreError
from jitgen.runtime import tiers as tiers_module
from jitgen.runtime.stats import Stats
from jitgen.runtime.store import KernelStore
from jitgen.runtime.tiers import Tiers

from .test_store import CUBIN, KEY, SOURCE, Compiler, flip_bit, folder_of, key_of, never, put

pytestmark = pytest.mark.filterwarnings("error")

OTHER_USER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(autouse=True)
def no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No tiers but those of the test."""
    for variable in [name for name in os.environ if name.startswith("JITGEN_CACHE_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(control, "_places", {})
    monkeypatch.setattr(control, "_configured", None)
    monkeypatch.setattr(build, "_configured", None)
    build.default_store.cache_clear()
    yield
    build.default_store.cache_clear()


@pytest.fixture
def tiers(tmp_path: Path) -> Tiers:
    """An empty own folder, a lower one with KEY, and an empty shared one."""
    put(KernelStore(tmp_path / "image" / "kernels"))
    return Tiers(
        tmp_path / "own" / "kernels",
        lower=(tmp_path / "image" / "kernels",),
        shared=tmp_path / "shared" / "kernels",
    )


def load(tiers: Tiers, source: str = SOURCE) -> tuple[Stats, Path | None]:
    """The counts of a new store that has to find the kernel, and where that is then."""
    store = KernelStore(tiers)
    entry = store.get_or_compile(key_of(source), never, name="gemm", source=source)
    assert (entry.cubin, entry.source) == (CUBIN, source)
    return store.stats, entry.path


# --- lower folders --------------------------------------------------------------------------------


def test_lower_hit_is_read_in_place(tiers: Tiers) -> None:
    stats, path = load(tiers)
    assert stats == Stats(lower_hits=1)
    assert path == folder_of(tiers.lower[0])
    assert tiers.own
    assert not folder_of(tiers.own).exists()
    store = KernelStore(tiers)
    assert store.peek(KEY) == store.get(KEY)
    assert store.stats == Stats(lower_hits=1, memory_hits=1)


def test_own_folder_goes_before_lower_ones_and_those_in_their_order(
    tiers: Tiers, tmp_path: Path
) -> None:
    first = tmp_path / "first" / "kernels"
    put(KernelStore(first), cubin=b"first")
    entry = KernelStore(replace(tiers, lower=(first, *tiers.lower))).get(KEY)
    assert entry
    assert entry.cubin == b"first"
    put(KernelStore(tiers.own), cubin=b"own")
    entry = KernelStore(replace(tiers, lower=(first, *tiers.lower))).get(KEY)
    assert entry
    assert entry.cubin == b"own"


def test_nothing_is_written_to_a_lower_folder(tiers: Tiers) -> None:
    (lower,) = tiers.lower
    os.utime(folder_of(lower), (1e9, 1e9))
    before = sorted((path, path.lstat().st_mtime_ns) for path in lower.rglob("*"))
    store = KernelStore(tiers)
    put(store)
    put(store, "// new\n")
    store.gc(1)
    store.clear()
    assert sorted((path, path.lstat().st_mtime_ns) for path in lower.rglob("*")) == before


def test_damaged_lower_entry_warns_and_is_compiled_into_the_own_folder(tiers: Tiers) -> None:
    flip_bit(folder_of(tiers.lower[0]))
    store = KernelStore(tiers)
    with pytest.warns(RuntimeWarning, match=r"image.* is damaged: .*SHA-256.*compiling it again"):
        assert put(store).path == folder_of(tiers.own or Path())
    assert load(tiers)[0] == Stats(disk_hits=1)


def test_damaged_own_entry_is_healed_from_a_lower_folder(tiers: Tiers) -> None:
    assert tiers.own
    put(KernelStore(tiers.own))
    flip_bit(folder_of(tiers.own))
    store = KernelStore(tiers)
    with pytest.warns(RuntimeWarning, match="own.* is damaged: .*it is not used"):
        store.get_or_compile(KEY, never, name="gemm", source=SOURCE)
    assert store.stats == Stats(lower_hits=1, heals=1)
    assert load(tiers)[0] == Stats(disk_hits=1)


@as_root
def test_lower_folder_may_be_roots_but_no_other_users(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lower,) = tiers.lower
    me = 4321
    assert tiers.own
    tiers.own.parent.mkdir()
    tiers.own.mkdir(0o700)
    os.chown(tiers.own, me, -1)
    monkeypatch.setattr(os, "geteuid", lambda: me)
    assert load(replace(tiers, shared=None))[0] == Stats(lower_hits=1)
    os.chown(folder_of(lower) / "kernel.cubin", OTHER_USER, -1)
    with pytest.warns(RuntimeWarning, match=f"kernel.cubin belongs to user {OTHER_USER}, not to"):
        assert KernelStore(replace(tiers, shared=None)).get(KEY) is None
    os.chown(lower, OTHER_USER, -1)
    with pytest.raises(StoreError, match=rf"belongs to user {OTHER_USER}.*or root's.*_LOWER"):
        KernelStore(tiers)


@pytest.mark.parametrize("damage", ["writable", "symlink", "file"])
def test_lower_folder_that_is_not_trusted_is_refused(
    damage: str, tiers: Tiers, tmp_path: Path
) -> None:
    (lower,) = tiers.lower
    if damage == "writable":
        lower.chmod(0o777)
    else:
        lower.rename(tmp_path / "aside")
        if damage == "symlink":
            lower.symlink_to(tmp_path / "aside")
        else:
            lower.touch()
    with pytest.raises(StoreError, match=r"is a symlink|is not a folder|mode 777"):
        KernelStore(tiers)


def test_lower_folder_that_cannot_be_read_warns(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lower,) = tiers.lower
    shard = folder_of(lower).parent
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != shard and allowed(path, mode))
    with pytest.warns(RuntimeWarning, match=r"no permission for .*chmod -R a\+rX"):
        KernelStore(tiers)
    shutil.rmtree(lower)
    with pytest.warns(RuntimeWarning, match=r"there is no such folder.*JITGEN_CACHE_LOWER"):
        store = KernelStore(tiers)
    assert put(store).cubin == CUBIN


@as_root
def test_image_baked_by_root_serves_another_user(tiers: Tiers) -> None:
    """As in a container: `prebuild` as root, `chmod -R a+rX`, then a user without a home."""
    (lower,) = tiers.lower
    script = f"""
import os, sys
sys.path[:] = {sys.path!r}
from pathlib import Path
from jitgen.runtime.key import make_key
from jitgen.runtime.store import KernelStore
key = make_key({SOURCE!r}, {{}}, ("-std=c++17",), "13.0.88", "sm_90a")
os.chdir("/")
os.setgid({OTHER_USER}), os.setuid({OTHER_USER})
store = KernelStore()
assert store.get(key).cubin, store.stats
print(store.stats.lower_hits, store.root)
"""
    for folder in (lower.parent, *lower.parent.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    subprocess.run(["chmod", "-R", "a+rX", lower], check=True)
    environment = {"JITGEN_CACHE_LOWER": str(lower.parent), "JITGEN_CACHE_DIR": "/nowhere/x"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "1 None\n", done.stderr
    assert "/nowhere" in done.stderr  # said once, and kernels stay in memory


# --- the shared folder ----------------------------------------------------------------------------


def test_shared_folder_gets_what_is_compiled_and_gives_it_to_others(
    tiers: Tiers, tmp_path: Path
) -> None:
    assert tiers.shared
    put(KernelStore(tiers), "// new\n")
    assert folder_of(tiers.shared, key_of("// new\n")).is_dir()
    other = replace(tiers, own=tmp_path / "other machine" / "kernels")
    stats, path = load(other, "// new\n")
    assert stats == Stats(shared_hits=1)
    assert path == folder_of(other.own or Path(), key_of("// new\n"))
    shutil.rmtree(tiers.shared)
    assert load(other, "// new\n")[0] == Stats(disk_hits=1)


def test_damaged_shared_entry_is_replaced(tiers: Tiers) -> None:
    assert tiers.shared
    without = replace(tiers, own=None, lower=())
    with pytest.warns(RuntimeWarning, match="no home"):
        put(KernelStore(without))
    flip_bit(folder_of(tiers.shared))
    with pytest.warns(RuntimeWarning, match="shared.* is damaged: .*compiling it again"):
        put(KernelStore(replace(tiers, lower=())))
    assert KernelStore(tiers.shared).verify().num_sound == 1


def test_shared_folder_that_cannot_be_written_warns_once(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    store = KernelStore(tiers)
    monkeypatch.setattr(tiers_module, "publish_entry", refuse)
    with pytest.warns(RuntimeWarning, match=r"shared.* cannot be written .*Stale") as caught:
        assert [put(store, f"// {idx}\n").cubin for idx in range(2)] == [CUBIN] * 2
    assert len(caught) == 1
    assert store.stats == Stats(compiles=2, misses=2)


def test_shared_folder_of_another_user_is_refused(tiers: Tiers) -> None:
    assert tiers.shared
    tiers.shared.mkdir(parents=True)
    tiers.shared.chmod(0o770)
    with pytest.raises(StoreError, match=r"mode 770.*JITGEN_CACHE_SHARED"):
        KernelStore(tiers)


def test_shared_use_is_marked_for_its_collector(tiers: Tiers) -> None:
    assert tiers.shared
    put(KernelStore(tiers.shared), "// used\n")
    put(KernelStore(tiers.shared), "// not used\n")
    for source in ("// used\n", "// not used\n"):
        os.utime(folder_of(tiers.shared, key_of(source)), (1e9, 1e9))
    load(tiers, "// used\n")
    assert KernelStore(tiers.shared).gc(1).num_evicted == 1
    assert folder_of(tiers.shared, key_of("// used\n")).is_dir()


# --- how they are named ---------------------------------------------------------------------------


def test_environment_names_every_tier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "LOWER": f"{tmp_path / 'a'}:{tmp_path / 'b'}:",
        "SHARED": str(tmp_path / "c"),
        "REMOTE": "s3://bucket/jitgen/",
        "REMOTE_WRITE": "1",
        "REMOTE_TIMEOUT": "0.5",
    }.items():
        monkeypatch.setenv(f"JITGEN_CACHE_{name}", value)
    assert Tiers.of() == Tiers(
        tmp_path / "own" / "kernels",
        (tmp_path / "a" / "kernels", tmp_path / "b" / "kernels"),
        tmp_path / "c" / "kernels",
        "s3://bucket/jitgen/kernels",
        True,
        0.5,
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("REMOTE", "/mnt/store", r"REMOTE is '/mnt/store': give a URL.*JITGEN_CACHE_SHARED"),
        ("REMOTE_WRITE", "yes", "REMOTE_WRITE is 'yes': give 0 or 1"),
        ("REMOTE_TIMEOUT", "0", "REMOTE_TIMEOUT is '0': give seconds"),
        ("REMOTE_TIMEOUT", "nan", "REMOTE_TIMEOUT is 'nan': give seconds"),
        ("REMOTE_TIMEOUT", "5s", "REMOTE_TIMEOUT is '5s': give seconds"),
        ("LOCKING", "false", "LOCKING is 'false': give 0 or 1"),
    ],
)
def test_environment_rejects(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"JITGEN_CACHE_{name}", value)
    with pytest.raises(StoreError, match=f"JITGEN_CACHE_{message}"):
        KernelStore()


def test_locking_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JITGEN_CACHE_LOCKING", "0")
    put(KernelStore(tmp_path / "kernels"))
    assert not (tmp_path / "kernels" / "locks").exists()
    put(KernelStore(tmp_path / "kernels", locking=True), "// next\n")
    assert (tmp_path / "kernels" / "locks").is_dir()


def test_configure_goes_before_the_environment_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITGEN_CACHE_SHARED", str(tmp_path / "shared"))
    first = build.default_store()
    jitgen.configure(jit="warn")
    assert build.default_store() is first
    jitgen.configure(cache_dir=str(tmp_path / "a"))
    jitgen.configure(cache_lower=str(tmp_path / "b"))
    assert control.jit_mode() == "warn"
    assert build.store_tiers() == Tiers(
        tmp_path / "a" / "kernels", (tmp_path / "b" / "kernels",), tmp_path / "shared" / "kernels"
    )
    with pytest.warns(RuntimeWarning, match="no such folder"):
        assert build.default_store().root == tmp_path / "a" / "kernels"
    with pytest.raises(StoreError, match="REMOTE is 'x'"):
        jitgen.configure(cache_remote="x")
    jitgen.configure(cache_lower="")
    assert build.store_tiers().lower == ()


def test_prebuild_processes_use_the_configured_tiers(tmp_path: Path) -> None:
    kernels = [(jitgen.Gemm(256, 512), jitgen.Schedule(64, 64, 4, 1))]
    jitgen.configure(cache_dir=str(tmp_path / "a"), cache_shared=str(tmp_path / "shared"))
    assert [done.compiled for done in build.prebuild(kernels, num_processes=1)] == [True]
    assert KernelStore(tmp_path / "shared" / "kernels").verify().num_sound == 1
    jitgen.configure(cache_dir=str(tmp_path / "b"))
    assert [done.compiled for done in build.prebuild(kernels, num_processes=1)] == [False]
    jitgen.configure(cache_dir=str(tmp_path / "c"), cache_lower=str(tmp_path / "a"))
    assert [done.compiled for done in build.prebuild(kernels, num_processes=1)] == [False]
    assert not list((tmp_path / "c" / "kernels").glob("??/*"))


def test_doctor_shows_every_tier(
    tiers: Tiers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITGEN_CACHE_LOWER", f"{tmp_path / 'image'}:{tmp_path / 'none'}")
    monkeypatch.setenv("JITGEN_CACHE_SHARED", str(tmp_path / "shared"))
    monkeypatch.setenv("JITGEN_CACHE_REMOTE", f"file://{tmp_path}/remote")
    output = " ".join(CliRunner().invoke(cli.app, ["doctor"]).output.split())
    assert f"ok lower store {tiers.lower[0]}, kernels: 1" in output
    assert f"no lower store lower kernel store {tmp_path}/none/kernels cannot be read" in output
    assert f"ok shared store {tiers.shared}, kernels: 0" in output
    assert f"ok remote store file://{tmp_path}/remote/kernels, empty, read" in output


def test_explain_finds_what_a_lower_folder_has(tiers: Tiers, monkeypatch: Any) -> None:
    monkeypatch.setenv("JITGEN_CACHE_LOWER", str(tiers.lower[0].parent))
    output = CliRunner().invoke(cli.app, ["cache", "explain", KEY.digest[:12]]).output
    assert str(folder_of(tiers.lower[0])) in output


def test_race_compiles_once_whatever_the_tiers(tiers: Tiers) -> None:
    stores = [KernelStore(tiers) for _ in range(4)]
    compiler = Compiler()
    for store in stores:
        store.get_or_compile(key_of("// x\n"), compiler, name="gemm", source="// x\n")
    assert compiler.calls == 1


def test_outage_warns_once_of_all_prebuild_processes(tmp_path: Path) -> None:
    kernels = [(jitgen.Gemm(256, k), jitgen.Schedule(64, 32, 4, 1)) for k in (512, 640, 768)]
    jitgen.configure(cache_dir=str(tmp_path / "a"), cache_remote="nosuch://bucket")
    with pytest.warns(RuntimeWarning, match="remote kernel store nosuch://.* cannot") as caught:
        assert len(build.prebuild(kernels, num_processes=2)) == 3
    assert len(caught) == 1

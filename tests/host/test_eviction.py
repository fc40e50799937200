"""The store's size cap: what goes, what stays, and that killed processes and damage do no harm."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

import pytest

from jitgen.errors import StoreError
from jitgen.runtime import store as store_module
from jitgen.runtime.eviction import IN_USE_S, LEFTOVER_S, default_max_bytes, list_usage
from jitgen.runtime.store import KernelStore

from .test_store import CUBIN, SOURCE, Compiler, folder_of, key_of, put

pytestmark = pytest.mark.filterwarnings("error")

SOURCES = [f"// {idx}\n" for idx in range(6)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "kernels"


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then), follow_symlinks=False)


def fill(root: Path) -> int:
    """Entries of SOURCES, the first the longest unused; the size of one."""
    for idx, source in enumerate(SOURCES):
        put(KernelStore(root, max_bytes=0), source)
        age(folder_of(root, key_of(source)), (len(SOURCES) - idx) * 2 * IN_USE_S)
    (size,) = {usage.num_bytes for usage in list_usage(root)}
    return size


def sources_left(root: Path) -> list[str]:
    return [source for source in SOURCES if folder_of(root, key_of(source)).is_dir()]


# --- what goes and what stays ---------------------------------------------------------------------


def test_list_usage_is_in_the_order_of_the_last_use(root: Path) -> None:
    size = fill(root)
    usages = list_usage(root)
    assert [usage.path for usage in usages] == [folder_of(root, key_of(s)) for s in SOURCES]
    assert usages[0].last_use == pytest.approx(time.time() - 12 * IN_USE_S, abs=60)
    assert size == sum(file.stat().st_size for file in usages[0].path.iterdir())


def test_gc_evicts_the_least_recently_used(root: Path) -> None:
    size = fill(root)
    collected = KernelStore(root).gc(4 * size)
    assert sources_left(root) == SOURCES[2:]
    assert (collected.num_evicted, collected.evicted_bytes) == (2, 2 * size)
    assert (collected.num_left, collected.left_bytes) == (4, 4 * size)
    assert list((root / "tmp").iterdir()) == []
    assert put(KernelStore(root), SOURCES[0]).cubin == CUBIN


def test_gc_takes_the_cap_of_the_store_and_zero_is_none(root: Path) -> None:
    size = fill(root)
    assert KernelStore(root, max_bytes=0).gc().num_left == 6
    assert KernelStore(root, max_bytes=6 * size).gc().num_left == 6
    assert KernelStore(root, max_bytes=6 * size - 1).gc().num_left == 5
    assert KernelStore(root, max_bytes=1).gc(0).num_left == 5


def test_load_marks_the_use(root: Path) -> None:
    size = fill(root)
    assert KernelStore(root).get(key_of(SOURCES[0])) is not None
    KernelStore(root).gc(2 * size)
    assert sources_left(root) == [SOURCES[0], SOURCES[5]]


def test_use_survives_a_move_of_the_store(root: Path, tmp_path: Path) -> None:
    size = fill(root)
    root.rename(tmp_path / "moved")
    KernelStore(tmp_path / "moved").gc(size)
    assert sources_left(tmp_path / "moved") == SOURCES[5:]


def test_mark_is_written_once_a_minute(root: Path) -> None:
    fill(root)
    folder = folder_of(root, key_of(SOURCES[0]))
    age(folder, 30)
    marked = folder.stat().st_mtime_ns
    KernelStore(root).get(key_of(SOURCES[0]))
    assert folder.stat().st_mtime_ns == marked
    age(folder, 90)
    KernelStore(root).get(key_of(SOURCES[0]))
    assert folder.stat().st_mtime_ns > marked


def test_entry_of_the_future_is_marked_and_then_evicted_in_turn(root: Path) -> None:
    fill(root)
    for source in SOURCES[:2]:
        age(folder_of(root, key_of(source)), -86400)
    KernelStore(root).get(key_of(SOURCES[0]))
    KernelStore(root).gc(1)
    assert sources_left(root) == SOURCES[:1]


def test_gc_keeps_what_any_process_used_in_the_last_minutes(root: Path) -> None:
    fill(root)
    age(folder_of(root, key_of(SOURCES[1])), IN_USE_S - 30)
    age(folder_of(root, key_of(SOURCES[4])), 0)
    collected = KernelStore(root).gc(1)
    assert sources_left(root) == [SOURCES[1], SOURCES[4]]
    assert collected.num_left == 2


def test_gc_keeps_what_this_process_loaded(root: Path) -> None:
    fill(root)
    store = KernelStore(root)
    store.get(key_of(SOURCES[0]))
    age(folder_of(root, key_of(SOURCES[0])), 3 * IN_USE_S)
    store.gc(1)
    assert sources_left(root) == SOURCES[:1]


def test_evicted_kernel_stays_in_the_memory_of_who_loaded_it(root: Path) -> None:
    fill(root)
    store = KernelStore(root)
    entry = store.get(key_of(SOURCES[0]))
    KernelStore(root).clear()
    assert store.get(key_of(SOURCES[0])) is entry


def test_publish_evicts_what_is_beyond_the_cap(root: Path) -> None:
    size = fill(root)
    store = KernelStore(root, max_bytes=4 * size)
    put(store, "// next\n")
    assert sources_left(root) == SOURCES[4:]  # 15/16 of the cap hold three entries
    put(store, "// last\n")
    assert sources_left(root) == SOURCES[5:]
    assert len(list_usage(root)) == 3


def test_publish_below_the_cap_evicts_nothing_and_looks_seldom(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    evict = store_module.evict
    monkeypatch.setattr(store_module, "evict", lambda *args: looks.append(args) or evict(*args))
    size = fill(root)
    store = KernelStore(root, max_bytes=160 * size)
    for idx in range(23):
        put(store, f"// more {idx:02d}\n")
    assert len(looks) == 3  # at the first, then after more than 10 each
    assert len(list_usage(root)) == 29


def test_store_of_one_process_stays_below_its_cap(root: Path) -> None:
    size = fill(root)
    cap = 20 * size
    for idx in range(60):
        put(KernelStore(root, max_bytes=cap), f"// {idx:03d}\n")
        age(folder_of(root, key_of(f"// {idx:03d}\n")), 2 * IN_USE_S)
        assert sum(usage.num_bytes for usage in list_usage(root)) <= cap


def test_gc_removes_leftovers_of_killed_writers_after_an_hour(root: Path) -> None:
    fill(root)
    for name, seconds in (("old", LEFTOVER_S + 60), ("new", LEFTOVER_S - 60)):
        (root / "tmp" / name).mkdir()
        (root / "tmp" / name / "kernel.cubin").write_bytes(CUBIN)
        age(root / "tmp" / name, seconds)
    assert KernelStore(root).gc(0).num_leftovers == 1
    assert [path.name for path in (root / "tmp").iterdir()] == ["new"]


def test_clear_removes_all_entries(root: Path) -> None:
    fill(root)
    age(folder_of(root, key_of(SOURCES[0])), 0)
    (root / "peers").mkdir()
    assert KernelStore(root).clear() == 6
    assert list_usage(root) == []
    assert (root / "peers").is_dir()
    assert KernelStore(root).clear() == 0


def test_gc_takes_damaged_entries_and_strangers_too(root: Path, tmp_path: Path) -> None:
    fill(root)
    shutil.rmtree(folder_of(root, key_of(SOURCES[0])))
    stranger = folder_of(root, key_of(SOURCES[0]))
    stranger.symlink_to(tmp_path / "aside")
    (tmp_path / "aside").mkdir()
    age(stranger, 20 * IN_USE_S)
    (stranger.parent / "file").write_bytes(b"x")
    age(stranger.parent / "file", 20 * IN_USE_S)
    KernelStore(root).gc(1)
    assert list_usage(root) == []
    assert (tmp_path / "aside").is_dir()


# --- caps and folders that cannot be used ---------------------------------------------------------


@pytest.mark.parametrize("text", ["2G", "-1", "1e9", " 5", "٣"])
def test_cap_rejects_what_is_no_number_of_bytes(
    text: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITGEN_CACHE_MAX_BYTES", text)
    with pytest.raises(StoreError, match=r"JITGEN_CACHE_MAX_BYTES is .*: give bytes, or 0"):
        KernelStore(root)


def test_cap_rejects_negative_bytes(root: Path) -> None:
    with pytest.raises(StoreError, match="max_bytes = -1"):
        KernelStore(root, max_bytes=-1)


def test_cap_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, cap in (("", 2 << 30), ("0", 0), ("12345", 12345)):
        monkeypatch.setenv("JITGEN_CACHE_MAX_BYTES", text)
        assert default_max_bytes() == cap
    monkeypatch.delenv("JITGEN_CACHE_MAX_BYTES")
    assert default_max_bytes() == 2 << 30


def test_read_only_store_is_loaded_and_not_maintained(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    fill(root)
    for name in ("utime", "rename"):  # chmod would not stop root
        monkeypatch.setattr(os, name, refuse)
    store = KernelStore(root)
    assert store.get(key_of(SOURCES[0])) is not None
    for work in (lambda: store.gc(1), store.clear):
        with pytest.raises(StoreError, match=r"cannot be written: .*Read-only"):
            work()
    assert sources_left(root) == SOURCES
    assert store.verify().num_sound == 6


def test_store_in_memory_cannot_be_maintained(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        store = KernelStore(tmp_path / "file" / "kernels")
    with pytest.raises(StoreError, match=r"no kernel store on disk.*JITGEN_CACHE_DIR"):
        store.gc()
    assert store.verify().num_sound == 0


# --- damage ---------------------------------------------------------------------------------------


def test_verify_removes_damaged_entries(root: Path) -> None:
    fill(root)
    (folder_of(root, key_of(SOURCES[1])) / "kernel.cubin").unlink()
    verified = KernelStore(root).verify()
    assert verified.num_sound == 5
    (damage,) = verified.damages
    assert key_of(SOURCES[1]).digest in damage
    assert sources_left(root) == [SOURCES[0], *SOURCES[2:]]
    assert KernelStore(root).verify().damages == ()
    assert put(KernelStore(root), SOURCES[1]).cubin == CUBIN


# --- many collectors ------------------------------------------------------------------------------


def test_eviction_between_the_look_and_the_read_is_a_miss(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root)
    read_bytes = Path.read_bytes

    def evict_first(path: Path) -> bytes:
        shutil.rmtree(path.parent, ignore_errors=True)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", evict_first)
    assert KernelStore(root).get(key_of(SOURCES[0])) is None


def test_two_collectors_do_not_evict_more_than_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = fill(root)
    rename = os.rename

    def lose_the_race(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        KernelStore(root).gc(4 * size)
        rename(source, target)

    monkeypatch.setattr(os, "rename", lose_the_race)
    collected = KernelStore(root).gc(4 * size)
    assert sources_left(root) == SOURCES[2:]
    assert (collected.num_evicted, collected.num_left) == (0, 4)


def test_compile_is_counted_once_after_an_eviction(root: Path) -> None:
    fill(root)
    KernelStore(root).gc(1)
    compiler = Compiler()
    store = KernelStore(root)
    for _ in range(2):
        store.get_or_compile(key_of(), compiler, name="gemm", source=SOURCE)
    assert compiler.calls == 1

"""The remote tier: round trips, damage, and a file system that fails, hangs or lies."""

from __future__ import annotations

import logging
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jitgen.runtime import remote as remote_module
from jitgen.runtime.entry import entry_files
from jitgen.runtime.stats import Stats
from jitgen.runtime.store import KernelStore
from jitgen.runtime.tiers import Tiers

from .test_store import CUBIN, KEY, SOURCE, Compiler, folder_of, key_of, never, put

fsspec = pytest.importorskip("fsspec")
pytestmark = pytest.mark.filterwarnings("error")

FILES = ("kernel.cubin", "kernel.cu", "entry.json")


class FakeFileSystem(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
    """A memory file system whose operations the test can break."""

    protocol = "faulty"
    cachable = False
    fault: Callable[[str, str, Any], Any] = staticmethod(lambda operation, path, value: value)
    calls: ClassVar[list[tuple[str, str]]] = []

    def cat_file(self, path: str, **options: Any) -> Any:
        return self._do("cat_file", path, lambda: super(FakeFileSystem, self).cat_file(path))

    def pipe_file(self, path: str, value: bytes, **options: Any) -> Any:
        return self._do(
            "pipe_file", path, lambda: super(FakeFileSystem, self).pipe_file(path, value)
        )

    def _do(self, operation: str, path: str, work: Callable[[], Any]) -> Any:
        self.calls.append((operation, path.rpartition("/")[2]))
        return self.fault(operation, path, work())


@pytest.fixture(autouse=True)
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeFileSystem]]:
    """The fake file system, whole, and its list of calls empty."""
    fsspec.register_implementation("faulty", FakeFileSystem, clobber=True)
    monkeypatch.setattr(FakeFileSystem, "calls", [])
    monkeypatch.setattr(remote_module, "PAUSE_S", 3600.0)
    yield FakeFileSystem
    FakeFileSystem.store.clear()


@pytest.fixture(params=["memory", "file", "faulty"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of its own in each file system."""
    if request.param == "file":
        return f"file://{tmp_path}/remote/kernels"
    return f"{request.param}://{uuid.uuid4().hex}/kernels"


def tiers(url: str, own: Path, *, write: bool = True, timeout_s: float = 10.0) -> Tiers:
    return Tiers(own, remote=url, remote_write=write, remote_timeout_s=timeout_s)


def files_at(url: str) -> dict[str, bytes]:
    """All files below a URL, by the ends of their paths."""
    fs, root = fsspec.core.url_to_fs(url)
    paths = fs.find(root)
    return {path.split("/kernels/")[1]: fs.cat_file(path) for path in paths}


# --- what works -----------------------------------------------------------------------------------


def test_compiled_kernel_reaches_another_machine(url: str, tmp_path: Path) -> None:
    first = KernelStore(tiers(url, tmp_path / "a"))
    entry = put(first)
    assert first.stats == Stats(compiles=1, misses=1, uploads=1)
    second = KernelStore(tiers(url, tmp_path / "b"))
    found = second.get_or_compile(KEY, never, name="gemm", source=SOURCE)
    assert second.stats == Stats(remote_hits=1)
    assert found.path == folder_of(tmp_path / "b")
    assert entry_files(found) == entry_files(entry)
    third = KernelStore(tiers("memory://nothing", tmp_path / "b"))
    assert third.get(KEY) == found
    assert third.stats == Stats(disk_hits=1)


def test_remote_has_the_layout_of_a_folder(url: str, tmp_path: Path) -> None:
    put(KernelStore(tiers(url, tmp_path / "a")))
    on_disk = {
        str(path.relative_to(tmp_path / "a")): path.read_bytes()
        for path in (tmp_path / "a").glob("??/*/*")
    }
    assert files_at(url) == on_disk


def test_what_another_store_made_is_uploaded_too(url: str, tmp_path: Path) -> None:
    files = entry_files(put(KernelStore(tmp_path / "a")))
    store = KernelStore(tiers(url, tmp_path / "b"))
    assert store.add(KEY.digest, files)
    assert not store.add(KEY.digest, files)
    assert store.stats == Stats(uploads=1)
    assert KernelStore(tiers(url, tmp_path / "c")).get(KEY)


def test_remote_is_not_written_unless_asked(url: str, tmp_path: Path) -> None:
    store = KernelStore(tiers(url, tmp_path / "a", write=False))
    put(store)
    assert store.stats == Stats(compiles=1, misses=1)
    fs, root = fsspec.core.url_to_fs(url)
    assert not fs.exists(root)


def test_remote_is_not_asked_for_what_is_near(faulty: type[FakeFileSystem], tmp_path: Path) -> None:
    put(KernelStore(tmp_path / "a"))
    store = KernelStore(tiers("faulty://x", tmp_path / "a"))
    assert store.get(KEY)
    assert store.peek(key_of("// other\n")) is None
    assert faulty.calls == []


def test_miss_costs_one_request_and_the_manifest_is_written_last(
    faulty: type[FakeFileSystem], tmp_path: Path
) -> None:
    put(KernelStore(tiers("faulty://x", tmp_path / "a")))
    assert faulty.calls[0] == ("cat_file", "entry.json")
    assert faulty.calls[1:] == [("pipe_file", file) for file in FILES]


def test_threads_fetch_once(faulty: type[FakeFileSystem], tmp_path: Path) -> None:
    put(KernelStore(tiers("faulty://x", tmp_path / "a")))
    faulty.calls.clear()
    store, barrier = KernelStore(tiers("faulty://x", tmp_path / "b")), threading.Barrier(8)

    def ask(_: int) -> bytes:
        barrier.wait()
        return store.get_or_compile(KEY, never, name="gemm", source=SOURCE).cubin

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {CUBIN}
    assert len(faulty.calls) == len(FILES)
    assert store.stats == Stats(remote_hits=1, memory_hits=7)


def test_without_own_folder_the_remote_feeds_memory(url: str, tmp_path: Path) -> None:
    put(KernelStore(tiers(url, tmp_path / "a")))
    with pytest.warns(RuntimeWarning, match="no home"):
        store = KernelStore(Tiers(None, remote=url))
    entry = store.get(KEY)
    assert entry
    assert entry.path is None
    assert store.get(KEY) is entry
    assert store.stats == Stats(remote_hits=1, memory_hits=1)


# --- damage ---------------------------------------------------------------------------------------


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "other"])
def test_damaged_remote_entry_is_compiled_again_and_replaced(
    file: str, damage: str, url: str, tmp_path: Path
) -> None:
    put(KernelStore(tiers(url, tmp_path / "a")))
    put(KernelStore(tiers(url, tmp_path / "a")), "// other\n", b"other")
    fs, root = fsspec.core.url_to_fs(url)
    path = f"{root}/{KEY.digest[:2]}/{KEY.digest}/{file}"
    data = fs.cat_file(path)
    other = key_of("// other\n").digest
    if damage == "gone":
        fs.rm_file(path)
    else:
        changed = {
            "flip": flip(data),
            "cut": data[: len(data) // 2],
            "empty": b"",
            "other": fs.cat_file(f"{root}/{other[:2]}/{other}/{file}"),
        }
        fs.pipe_file(path, changed[damage])
    store = KernelStore(tiers(url, tmp_path / "b"))
    if (file, damage) == ("entry.json", "gone"):  # half written, so not there
        assert put(store).cubin == CUBIN
    else:
        with pytest.warns(RuntimeWarning, match=r"kernels/.*is damaged: .*compiling it again"):
            assert put(store).cubin == CUBIN
    assert store.stats == Stats(compiles=1, misses=1, uploads=1)
    assert KernelStore(tiers(url, tmp_path / "c")).get(KEY) is not None


def test_corruption_on_the_way_is_a_miss(faulty: type[FakeFileSystem], tmp_path: Path) -> None:
    put(KernelStore(tiers("faulty://x", tmp_path / "a")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faulty, "fault", staticmethod(lambda op, path, value: value and flip(value)))
        with pytest.warns(RuntimeWarning, match="is damaged.*not used"):
            assert KernelStore(tiers("faulty://x", tmp_path / "b")).get(KEY) is None
    assert not list((tmp_path / "b").glob("??/*"))
    assert KernelStore(tiers("faulty://x", tmp_path / "b")).get(KEY)


# --- outages --------------------------------------------------------------------------------------


def fail(operation: str, path: str, value: Any) -> Any:
    raise OSError(5, "connection reset by peer")


def fail_oddly(operation: str, path: str, value: Any) -> Any:
    raise SystemExit("a plugin that ends the process")


def hang(operation: str, path: str, value: Any) -> Any:
    time.sleep(1.0)
    return value


def lie(operation: str, path: str, value: Any) -> Any:
    return "a text"


@pytest.mark.parametrize("fault", [fail, fail_oddly, hang, lie])
@pytest.mark.parametrize("when", ["cat_file", "pipe_file"])
def test_outage_costs_one_warning_and_kernels_are_compiled_here(
    fault: Callable[..., Any],
    when: str,
    faulty: type[FakeFileSystem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if (fault, when) == (lie, "pipe_file"):
        pytest.skip("what a write returns is not looked at")
    put(KernelStore(tiers("faulty://x", tmp_path / "a")), "// there\n")
    monkeypatch.setattr(
        faulty, "fault", staticmethod(lambda op, *args: fault(op, *args) if op == when else args[1])
    )
    store = KernelStore(tiers("faulty://x", tmp_path / "b", timeout_s=0.2))
    started = time.monotonic()
    # A missing file has no answer to lie about: ask for one that is there.
    sources = ["// there\n", "// b\n", "// c\n"] if when == "cat_file" else ["// b\n", "// c\n"]
    with pytest.warns(RuntimeWarning) as caught:
        assert {put(store, source).cubin for source in sources} == {CUBIN}
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("remote kernel store faulty://x cannot be used (")
    assert "kernels are compiled here, and it is asked again every" in message
    assert store.stats.compiles == len(sources)
    assert store.stats.outages == 1
    assert time.monotonic() - started < 5
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_remote_is_asked_again_after_the_pause_without_another_warning(
    faulty: type[FakeFileSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(KernelStore(tiers("faulty://x", tmp_path / "a")))
    monkeypatch.setattr(remote_module, "PAUSE_S", 0.0)
    store = KernelStore(tiers("faulty://x", tmp_path / "b"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faulty, "fault", staticmethod(fail))
        with pytest.warns(RuntimeWarning, match="connection reset"):
            assert store.get(KEY) is None
        assert store.get(KEY) is None
    assert store.get(KEY) is not None
    assert store.stats == Stats(misses=2, outages=2, remote_hits=1)


@pytest.mark.parametrize(
    ("url", "reason"),
    [("nosuch://bucket/kernels", "Protocol not known"), ("faulty://x", "fsspec is missing")],
)
def test_remote_that_cannot_be_opened_is_an_outage(
    url: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "fsspec is missing":
        monkeypatch.setitem(sys.modules, "fsspec", None)
    store = KernelStore(tiers(url, tmp_path / "a"))
    with pytest.warns(RuntimeWarning, match=reason):
        assert put(store).cubin == CUBIN


def test_many_threads_in_an_outage_warn_once(
    faulty: type[FakeFileSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faulty, "cat_file", fail)
    store = KernelStore(tiers("faulty://x", tmp_path / "a"))
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("always")
        sources = [f"// {idx}\n" for idx in range(16)]
        compilers = [Compiler() for _ in sources]

        def ask(source: str, compiler: Compiler) -> bytes:
            key = key_of(source)
            return store.get_or_compile(key, compiler, name="gemm", source=source).cubin

        assert set(pool.map(ask, sources, compilers)) == {CUBIN}
    assert len(caught) == 1

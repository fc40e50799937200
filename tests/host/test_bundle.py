"""Bundles: round trips, one file for the same kernels, and all that is refused."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from jitgen import cli
from jitgen.errors import StoreError
from jitgen.runtime import bundle as bundle_module
from jitgen.runtime.bundle import Imported, Toolchain, export_bundle, import_bundle
from jitgen.runtime.entry import DamagedError, Entry, entry_files
from jitgen.runtime.key import make_key
from jitgen.runtime.nvrtc import Compiled
from jitgen.runtime.stats import Stats
from jitgen.runtime.store import KernelStore, Verified

from .test_store import CUBIN, RESOURCES, folder_of, key_of, never, put

pytestmark = pytest.mark.filterwarnings("error")

SOURCES = [f"// {idx}\n" for idx in range(3)]
KEYS = [key_of(source) for source in SOURCES]
TOOLCHAIN = Toolchain("0.1.0", "sm_90a", "13.0.88", "0123456789abcdef")


def fill(root: Path, sources: list[str] = SOURCES) -> KernelStore:
    store = KernelStore(root)
    for source in sources:
        put(store, source, CUBIN + source.encode())
    return store


def export(store: KernelStore, path: Path) -> Path:
    export_bundle(path, TOOLCHAIN, store.entries())
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of three kernels."""
    return export(fill(tmp_path / "exporter"), tmp_path / "kernels.tar")


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    """An empty store."""
    return KernelStore(tmp_path / "importer")


def entries_on_disk(store: KernelStore) -> list[Path]:
    assert store.root
    return sorted(store.root.glob("??/*"))


# --- what works -----------------------------------------------------------------------------------


def test_import_gives_the_exporters_kernels(bundle: Path, store: KernelStore) -> None:
    assert import_bundle(bundle, TOOLCHAIN, store) == Imported(num_added=3, num_present=0)
    for key, source in zip(KEYS, SOURCES, strict=True):
        entry = store.get_or_compile(key, never, name="gemm", source=source)
        assert entry.cubin == CUBIN + source.encode()
    assert store.stats == Stats(disk_hits=3)
    assert store.verify().num_sound == 3


def test_import_keeps_sound_entries_and_heals_damaged_ones(
    bundle: Path, store: KernelStore, caplog: pytest.LogCaptureFixture
) -> None:
    assert store.root
    fill(store.root, SOURCES[:2])
    kept, damaged = folder_of(store.root, KEYS[0]), folder_of(store.root, KEYS[1])
    inode = kept.stat().st_ino
    (damaged / "kernel.cubin").write_bytes(b"")
    assert import_bundle(bundle, TOOLCHAIN, store) == Imported(num_added=2, num_present=1)
    assert kept.stat().st_ino == inode
    assert store.stats.heals == 1
    assert "replaced the damaged gemm" in caplog.text
    assert store.verify().damages == ()
    assert import_bundle(bundle, TOOLCHAIN, store) == Imported(num_added=0, num_present=3)


def test_bundles_of_the_same_kernels_are_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    other = export(fill(tmp_path / "other place", SOURCES[::-1]), tmp_path / "other.tar")
    assert other.read_bytes() == bundle.read_bytes()
    again = KernelStore(tmp_path / "importer")
    import_bundle(bundle, TOOLCHAIN, again)
    assert export(again, tmp_path / "again.tar").read_bytes() == bundle.read_bytes()


def test_bundle_is_a_plain_tar_that_names_no_machine(bundle: Path, tmp_path: Path) -> None:
    with tarfile.open(bundle) as tar:
        members = tar.getmembers()
        manifest = json.load(tar.extractfile("manifest.json") or io.BytesIO())
    digests = sorted(key.digest for key in KEYS)
    names = [f"{d}/{file}" for d in digests for file in ("entry.json", "kernel.cu", "kernel.cubin")]
    assert [member.name for member in members] == ["manifest.json", *names]
    for member in members:
        assert member.isreg()
        assert (member.mode, member.mtime, member.uid, member.gid) == (0o644, 0, 0, 0)
        assert (member.uname, member.gname) == ("", "")
    assert {field: manifest[field] for field in asdict(TOOLCHAIN)} == asdict(TOOLCHAIN)
    assert [kernel["key"] for kernel in manifest["kernels"]] == digests
    assert str(tmp_path).encode() not in bundle.read_bytes()


def test_bundle_of_no_kernels_is_a_bundle(tmp_path: Path, store: KernelStore) -> None:
    path = tmp_path / "none.tar"
    export_bundle(path, TOOLCHAIN, [])
    assert import_bundle(path, TOOLCHAIN, store) == Imported(0, 0)


def test_import_of_another_jitgen_version_with_the_same_templates_works(
    bundle: Path, store: KernelStore
) -> None:
    assert import_bundle(bundle, replace(TOOLCHAIN, jitgen_version="9"), store).num_added == 3


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["arch", "compiler_version", "template_fingerprint"])
def test_import_rejects_another_toolchain(field: str, bundle: Path, store: KernelStore) -> None:
    have = asdict(TOOLCHAIN)[field]
    with pytest.raises(StoreError) as caught:
        import_bundle(bundle, replace(TOOLCHAIN, **{field: "mine"}), store)
    assert f"its {field} is {have!r}, wanted is 'mine': " in str(caught.value)
    assert "export it" in str(caught.value)
    assert entries_on_disk(store) == []


def test_import_rejects_another_format(
    bundle: Path, store: KernelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "FORMAT_VERSION", 3)
    with pytest.raises(StoreError, match="its format_version is 2, wanted is 3: export it with"):
        import_bundle(bundle, TOOLCHAIN, store)


def test_import_rejects_what_cannot_be_read(tmp_path: Path, store: KernelStore) -> None:
    with pytest.raises(StoreError, match=r"cannot be read: .*No such file"):
        import_bundle(tmp_path / "none.tar", TOOLCHAIN, store)


def test_import_rejects_a_store_that_cannot_be_written(
    bundle: Path, store: KernelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"kernel store .* cannot be written: .*No space left"):
        import_bundle(bundle, TOOLCHAIN, store)
    assert store.root
    assert entries_on_disk(store) == list((store.root / "tmp").iterdir()) == []


@pytest.mark.parametrize("place", [".", "/", "missing/a.tar", "file/a.tar"])
def test_export_rejects_a_place_that_cannot_be_written(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        export(fill(tmp_path / "exporter"), Path(place))
    assert [*tmp_path.glob("*.part"), *tmp_path.glob(".*.part")] == []


def test_export_rejects_a_kernel_of_another_compiler(tmp_path: Path) -> None:
    mine = replace(TOOLCHAIN, compiler_version="13.1.2")
    with pytest.raises(StoreError, match=r"compiler_version 13\.0\.88, the bundle of 13\.1\.2"):
        export_bundle(tmp_path / "a.tar", mine, fill(tmp_path / "exporter").entries())


def test_export_rejects_a_kernel_that_was_removed_and_keeps_the_old_bundle(
    bundle: Path, tmp_path: Path
) -> None:
    before = bundle.read_bytes()
    store = KernelStore(tmp_path / "exporter")
    entries = list(store.entries())
    store.clear()
    with pytest.raises(StoreError, match="was removed from the store"):
        export_bundle(bundle, TOOLCHAIN, entries)
    assert bundle.read_bytes() == before


def test_add_rejects_an_entry_of_another_key(store: KernelStore) -> None:
    files = entry_files(Entry(KEYS[0], "gemm", CUBIN, SOURCES[0], RESOURCES, "", None))
    with pytest.raises(DamagedError, match="is that of kernel"):
        store.add(KEYS[1].digest, files)
    assert entries_on_disk(store) == []


# --- tampering ------------------------------------------------------------------------------------

Members = list[tuple[tarfile.TarInfo, bytes]]


def rewrite(path: Path, change: Callable[[Members], object]) -> None:
    """Let `change` edit the members of a bundle."""
    with tarfile.open(path) as tar:
        members: Members = [(m, (tar.extractfile(m) or io.BytesIO()).read()) for m in tar]
    change(members)
    blocks = [
        info.tobuf(tarfile.USTAR_FORMAT) + data.ljust(-(-len(data) // 512) * 512, b"\0")
        for info, data in members
    ]
    path.write_bytes(b"".join(blocks) + bytes(1024))


def edit_header(index: int, **fields: Any) -> Callable[[Members], object]:
    return lambda members: [setattr(members[index][0], *field) for field in fields.items()]


def edit_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Members], object]:
    def edit(members: Members) -> None:
        info, data = members[0]
        manifest = json.loads(data)
        change(manifest)
        data = json.dumps(manifest, indent=1, sort_keys=True).encode()
        info.size = len(data)
        members[0] = (info, data)

    return edit


def edit_kernel(**fields: Any) -> Callable[[Members], object]:
    return edit_manifest(lambda manifest: manifest["kernels"][0].update(fields))


def edit_file(**fields: Any) -> Callable[[Members], object]:
    return edit_manifest(
        lambda manifest: manifest["kernels"][0]["files"]["kernel.cubin"].update(fields)
    )


def replace_cubin(members: Members) -> None:
    """Another cubin of the same size, which the manifest agrees with and the entry does not."""
    data = bytes(len(members[3][1]))
    edit_file(sha256=bundle_module.sha256_hex(data))(members)
    members[3] = (members[3][0], data)


def move_kernel(members: Members) -> None:
    """The first kernel, complete and sound, in the place of a key that is not its own."""
    edit_kernel(key="0" * 64)(members)
    for info, _ in members[1:4]:
        info.name = f"{'0' * 64}/{info.name.partition('/')[2]}"


def repeat_kernel(members: Members) -> None:
    """The first kernel twice, in the manifest and in the archive."""
    edit_manifest(lambda manifest: manifest["kernels"].insert(0, manifest["kernels"][0]))(members)
    members[1:1] = members[1:4]


TAMPERINGS: dict[str, Callable[[Members], object]] = {
    "parent": edit_header(2, name="../../kernel.cu"),
    "absolute": edit_header(2, name="/tmp/kernel.cu"),
    "symlink": edit_header(2, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hardlink": edit_header(2, type=tarfile.LNKTYPE, linkname="manifest.json"),
    "device": edit_header(2, type=tarfile.CHRTYPE),
    "folder": edit_header(2, type=tarfile.DIRTYPE),
    "owner": edit_header(2, uid=1000, uname="someone"),
    "mode": edit_header(2, mode=0o4755),
    "time": edit_header(0, mtime=1),
    "no-manifest": lambda members: members.pop(0),
    "duplicate": lambda members: members.insert(2, members[1]),
    "duplicate-at-the-end": lambda members: members.append(members[1]),
    "swapped": lambda members: members.insert(4, members.pop(1)),
    "missing": lambda members: members.pop(),
    "another-cubin": replace_cubin,
    "another-key": move_kernel,
    "manifest-list": lambda members: members.__setitem__(0, (members[0][0], b"[]")),
    "manifest-deep": lambda members: members.__setitem__(0, (members[0][0], b"[" * 100_000)),
    "manifest-field": edit_manifest(lambda manifest: manifest.update(more=1)),
    "manifest-no-field": edit_manifest(lambda manifest: manifest.pop("kernels")),
    "kernel-twice": edit_manifest(lambda m: m["kernels"].insert(0, m["kernels"][0])),
    "kernel-and-files-twice": repeat_kernel,
    "kernel-unlisted": edit_manifest(lambda manifest: manifest["kernels"].pop()),
    "kernel-name": edit_kernel(name="other"),
    "kernel-key": edit_kernel(key="../../../evil"),
    "kernel-key-long": edit_kernel(key="0" * 999),
    "kernel-key-type": edit_kernel(key=1),
    "kernel-files": edit_kernel(files=[]),
    "file-negative": edit_file(size=-512),
    "file-huge": edit_file(size=1 << 40),
    "file-size-type": edit_file(size=True),
    "file-hash": edit_file(sha256="0" * 64),
    "file-field": edit_file(path="/tmp"),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_import_rejects_a_tampered_bundle(tampering: str, bundle: Path, store: KernelStore) -> None:
    rewrite(bundle, TAMPERINGS[tampering])
    with pytest.raises(StoreError, match=r"is damaged: .*; copy or export it again"):
        import_bundle(bundle, TOOLCHAIN, store)
    assert entries_on_disk(store) == []


@pytest.mark.parametrize("offset", ["after the manifest", "after a file", "in the end"])
def test_import_rejects_a_byte_that_belongs_to_nothing(
    offset: str, bundle: Path, store: KernelStore
) -> None:
    with tarfile.open(bundle) as tar:
        first, second = tar.getmembers()[:2]
    offsets = {
        "after the manifest": first.offset_data + first.size,
        "after a file": second.offset_data + second.size,
        "in the end": -1,
    }
    data = bytearray(bundle.read_bytes())
    assert data[offsets[offset]] == 0
    data[offsets[offset]] = 1
    bundle.write_bytes(data)
    with pytest.raises(StoreError, match="there is something"):
        import_bundle(bundle, TOOLCHAIN, store)
    assert entries_on_disk(store) == []


@pytest.mark.parametrize("change", [-1, 1, 512], ids=["cut", "byte-more", "block-more"])
def test_import_rejects_another_size_before_it_reads_on(
    change: int, bundle: Path, store: KernelStore
) -> None:
    data = bundle.read_bytes()
    bundle.write_bytes(data[:change] if change < 0 else data + bytes(change))
    size = len(data)
    match = f"it has {size + change} bytes, its manifest.json describes {size};"
    with pytest.raises(StoreError, match=re.escape(match)):
        import_bundle(bundle, TOOLCHAIN, store)


def test_import_rejects_a_file_beyond_the_limit(
    bundle: Path, store: KernelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(CUBIN + SOURCES[0].encode())
    monkeypatch.setattr(bundle_module, "MAX_FILE_BYTES", size - 1)
    with pytest.raises(StoreError, match=rf"kernel\.cubin of gemm has {size} bytes"):
        import_bundle(bundle, TOOLCHAIN, store)


def test_rewrite_without_a_change_is_the_same_bundle(bundle: Path) -> None:
    before = bundle.read_bytes()
    rewrite(bundle, lambda members: None)
    assert bundle.read_bytes() == before


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("bundle")
    return export(fill(folder / "exporter"), folder / "kernels.tar").read_bytes()


def mutate(data: bytes, seed: int) -> bytes:
    """One to three flips, cuts, repeats or overwrites."""
    rng = random.Random(seed)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(changed))
        end = start + rng.choice([1, 64, 512, 4096])
        match rng.randrange(5):
            case 0 | 1:
                changed[start] ^= 1 << rng.randrange(8)
            case 2:
                del changed[start : rng.choice([end, len(changed)])]
            case 3:
                changed[start:start] = changed[start:end]
            case 4:
                changed[start:end] = rng.randbytes(len(changed[start:end]))
        if not changed:
            break
    return bytes(changed)


@given(seed=st.integers(0, 2**32))
def test_mutated_bundle_is_refused_whole_or_gives_the_same_kernels(sound: bytes, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.tar"
        path.write_bytes(mutate(sound, seed))
        store = KernelStore(Path(folder) / "importer")
        try:
            import_bundle(path, TOOLCHAIN, store)
        except StoreError:
            assert entries_on_disk(store) == []
            return
        for key, source in zip(KEYS, SOURCES, strict=True):
            entry = store.get(key)
            assert entry
            assert (entry.cubin, entry.source) == (CUBIN + source.encode(), source)


# --- killed ---------------------------------------------------------------------------------------

KILLED_IMPORT = """
import os, signal, sys
from pathlib import Path
from jitgen.runtime.bundle import Toolchain, import_bundle
from jitgen.runtime.store import KernelStore, Verified

calls, rename = [], os.rename
def rename_until_killed(*paths):
    calls.append(paths)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*paths)
os.rename = rename_until_killed
import_bundle(Path(sys.argv[1]), Toolchain(*sys.argv[3:]), KernelStore(Path(sys.argv[2])))
"""


def test_killed_import_leaves_a_sound_store_and_runs_again(
    bundle: Path, store: KernelStore
) -> None:
    command = [sys.executable, "-c", KILLED_IMPORT, str(bundle), str(store.root)]
    done = subprocess.run([*command, *asdict(TOOLCHAIN).values()], check=False)
    assert done.returncode == -signal.SIGKILL
    assert store.verify() == Verified(num_sound=1, damages=())
    assert import_bundle(bundle, TOOLCHAIN, store) == Imported(num_added=2, num_present=1)
    assert store.verify().num_sound == 3


# --- command line ---------------------------------------------------------------------------------

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line with the store of `user`."""

    def run(user: str, *arguments: object) -> Any:
        monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / user))
        return CliRunner().invoke(cli.app, [str(part) for part in arguments])

    return run


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"n": 256, "k": 512, "m": [16, 128]}]))
    return path


GPU = ("--gpu", "NVIDIA H200", "--num-sms", 132)


def test_cli_bundle_of_problems_saves_every_compile(
    run: Run, problems: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "kernels.tar"
    options = ("--problems", problems, *GPU)
    assert run("a", "prebuild", *options).exit_code == 0
    assert run("a", "show", "--n", 512, "--k", 512).exit_code == 0  # not of the problems
    exported = run("a", "cache", "export", bundle, *options)
    assert exported.exit_code == 0, exported.output
    count = re.match(r"kernels: (\d+) exported", exported.stdout)
    assert count
    imported = run("b", "cache", "import", bundle)
    assert imported.exit_code == 0, imported.output
    assert imported.stdout == (
        f"kernels: {count[1]} added, 0 already there, {tmp_path / 'b' / 'kernels'}\n"
    )
    again = run("b", "prebuild", *options)
    assert again.stdout.startswith(f"kernels: 0 compiled, {count[1]} already there")
    old = make_key("// old\n", {}, (), "12.0.1", "sm_90a")  # of another compiler: left out
    KernelStore(tmp_path / "a" / "kernels").get_or_compile(
        old, lambda: Compiled(CUBIN, "", RESOURCES), name="old", source="// old\n"
    )
    everything = run("a", "cache", "export", bundle, "--all")
    assert everything.stdout.startswith(f"kernels: {int(count[1]) + 1} exported")


def test_cli_export_names_the_first_missing_kernel_and_how_to_make_it(
    run: Run, problems: Path, tmp_path: Path
) -> None:
    result = run("a", "cache", "export", tmp_path / "k.tar", "--problems", problems, *GPU)
    assert result.exit_code == 1
    assert re.fullmatch(
        r"error: kernel gemm\S+ is not in the store: first `jitgen prebuild --problems"
        rf" {problems} --gpu 'NVIDIA H200' --num-sms 132`\n",
        result.stderr,
    )
    assert not (tmp_path / "k.tar").exists()


@pytest.mark.parametrize("options", [(), ("--all", "--problems", "list.json")])
def test_cli_export_rejects_none_and_both(options: tuple[str, ...], run: Run) -> None:
    assert run("a", "cache", "export", "k.tar", *options).exit_code == 2


def test_cli_import_rejects_other_templates_in_one_line(
    run: Run, bundle: Path, tmp_path: Path
) -> None:
    result = run("a", "cache", "import", bundle)  # of TOOLCHAIN, whose templates are none
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "its template_fingerprint is '0123456789abcdef', wanted is " in line

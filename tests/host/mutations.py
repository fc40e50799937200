"""Random faults of a store's folder, its file system and its clock, one after the other.

    python tests/host/mutations.py FOLDER SEED COUNT

After each fault every kernel is asked for. It must come right: from disk, or compiled again with a
warning, or the store must refuse with an error of its own. When the fault is over, the store must
be whole again after one more use.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import random
import shutil
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from jitgen.errors import StoreError
from jitgen.runtime.eviction import list_usage
from jitgen.runtime.store import KernelStore

sys.path.insert(0, str(Path(__file__).parent))
from storms import ask, check, key_of, sources

KEYS = 4
FILES = ("kernel.cubin", "kernel.cu", "entry.json")
STRANGER = 54321


class Store:
    """The folder under attack, and picks of what is in it."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.root, self.rng = root, rng
        self.aside = root.parent / "aside"

    def entry(self) -> Path:
        digest = key_of(self.rng.choice(sources(KEYS))).digest
        return self.root / digest[:2] / digest

    def file(self) -> Path:
        return self.entry() / self.rng.choice(FILES)

    def anything(self) -> Path:
        entry = self.entry()
        return self.rng.choice([self.root, entry.parent, entry, entry / self.rng.choice(FILES)])


# --- faults of the contents -----------------------------------------------------------------------


def flip_bit(store: Store) -> None:
    file = store.file()
    data = bytearray(file.read_bytes())
    data[store.rng.randrange(len(data))] ^= 1 << store.rng.randrange(8)
    file.write_bytes(data)


def truncate(store: Store) -> None:
    file = store.file()
    os.truncate(file, store.rng.randrange(file.stat().st_size))


def append(store: Store) -> None:
    with store.file().open("ab") as stream:
        stream.write(store.rng.randbytes(store.rng.randrange(1, 100)))


def overwrite(store: Store) -> None:
    file = store.file()
    size = file.stat().st_size
    file.write_bytes(store.rng.choice([bytes(size), store.rng.randbytes(size), b""]))


def edit_manifest(store: Store) -> None:
    """Another value in a field, anywhere in the manifest."""
    file = store.entry() / "entry.json"
    data = json.loads(file.read_text())
    at = data
    while True:
        name = store.rng.choice(list(at))
        if not isinstance(at[name], dict) or store.rng.random() < 0.3:
            break
        at = at[name]
    value = store.rng.choice([None, 0, -1, 2.5, "", "x", [], {}, [[]], True, "0" * 64, 2**70])
    if store.rng.random() < 0.2:
        del at[name]
    else:
        at[name] = value
    file.write_text(json.dumps(data))


def delete(store: Store) -> None:
    path = store.anything()
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def swap(store: Store) -> None:
    """Two files, or two entries, change places."""
    one, other = store.entry(), store.entry()
    name = store.rng.choice(["", *FILES])
    if one != other:
        (one / name).rename(store.aside)
        (other / name).rename(one / name)
        store.aside.rename(other / name)


# --- faults of kind, owner and mode ---------------------------------------------------------------


def to_symlink(store: Store) -> None:
    """To a copy, to nothing, to itself, or to what never ends."""
    path = store.anything()
    path.rename(store.aside)
    path.symlink_to(store.rng.choice([store.aside, Path("/none"), path, Path("/dev/zero")]))


def to_another_kind(store: Store) -> None:
    """A pipe, which nobody writes to, a folder for a file, or a file for a folder."""
    path = store.anything()
    was_folder = path.is_dir()
    path.rename(store.aside)
    if store.rng.random() < 0.5:
        os.mkfifo(path, 0o600)
    elif was_folder:
        path.touch(0o600)
    else:
        path.mkdir(0o700)


def to_hard_link(store: Store) -> None:
    """A file of another entry under this one's name."""
    one, other = store.file(), store.entry()
    if one.parent != other:
        one.unlink()
        os.link(other / store.rng.choice(FILES), one)


def change_owner(store: Store) -> None:
    if os.geteuid() == 0:
        os.chown(store.anything(), STRANGER, -1)
    else:
        change_mode(store)


def change_mode(store: Store) -> None:
    path = store.anything()
    path.chmod(stat.S_IMODE(path.stat().st_mode) | store.rng.choice([0o020, 0o002, 0o022, 0o1002]))


def litter(store: Store) -> None:
    """Things that no store makes, where it works; and something to write."""
    digest = store.entry().name
    if store.rng.random() < 0.7:
        shutil.rmtree(store.root / digest[:2])
    names = ["tmp", "locks", "stats.jsonl", f"locks/{digest}.lock", f"locks/{digest}.holder"]
    names += [f"tmp/{digest}.1.00000000", f"{digest[:2]}/stranger", "ff", "zz"]
    path = store.root / store.rng.choice(names)
    if not path.parent.is_dir():  # litter too
        path.parent.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    kind = store.rng.randrange(3)
    if kind == 0:
        path.write_bytes(store.rng.randbytes(50))
    elif kind == 1:
        path.mkdir(0o700)
    else:
        path.symlink_to("/none")


# --- faults of the file system and of the clock, which end ----------------------------------------


@contextlib.contextmanager
def failing_calls(store: Store) -> Iterator[None]:
    """Some calls of the system fail: a full disk, a read-only one, a broken one, a lost mount."""
    number = store.rng.choice([errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE, errno.EDQUOT])
    names = ("mkdir", "rename", "fsync", "utime", "open", "unlink")
    share = store.rng.choice([1.0, 0.5, 0.1])
    broken = names if share == 1.0 else store.rng.sample(names, store.rng.randrange(1, 6))

    def faulty(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            reads = name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not reads and store.rng.random() < share:
                raise OSError(number, os.strerror(number), str(args[0]))
            return function(*args, **options)

        return call

    with contextlib.ExitStack() as patches:
        for name in broken:
            patches.enter_context(mock.patch.object(os, name, faulty(name, getattr(os, name))))
        if store.rng.random() < 0.7:  # so that there is something to write
            shutil.rmtree(store.entry(), ignore_errors=True)
        yield


@contextlib.contextmanager
def failing_reads(store: Store) -> Iterator[None]:
    number = store.rng.choice([errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
    read = Path.read_bytes

    def faulty(path: Path) -> bytes:
        if store.rng.random() < 0.3:
            raise OSError(number, os.strerror(number), str(path))
        return read(path)[: store.rng.choice([None, None, 10])]

    with mock.patch.object(Path, "read_bytes", faulty):
        yield


@contextlib.contextmanager
def jumping_clock(store: Store) -> Iterator[None]:
    """Years forth or back, for the machine, for the file system, or for both; and a collection."""
    jump = store.rng.choice([-1, 1]) * 10 ** store.rng.uniform(0, 9)
    now = time.time
    for usage in list_usage(store.root):
        if store.rng.random() < 0.5:
            os.utime(usage.path, (0, max(0.0, now() + jump)))
    jumps = mock.Mock(side_effect=lambda: now() + store.rng.choice([0, jump]))
    with mock.patch.object(time, "time", jumps):
        with contextlib.suppress(StoreError):
            KernelStore(store.root).gc(store.rng.choice([1, 5000, 0]))
        yield


LASTING = [flip_bit, truncate, append, overwrite, edit_manifest, delete, swap, to_symlink]
LASTING += [to_another_kind, to_hard_link, change_owner, change_mode, litter]
PASSING = [failing_calls, failing_reads, jumping_clock]


def run(root: Path, rng: random.Random, count: int) -> None:
    store = Store(root / "kernels", rng)
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for idx in range(count):
        fault = rng.choice([*LASTING, *PASSING])
        use(store)  # whole
        with contextlib.ExitStack() as passing:
            if fault in PASSING:
                passing.enter_context(fault(store))
            else:
                fault(store)
            outcomes[fault.__name__][use(store)] += 1
        repair(store)
        use(store)
        check("it is not whole again", use(store) == "hits", idx, fault.__name__)
    for name, outcome in sorted(outcomes.items()):
        print(f"{name:<16}", ", ".join(f"{what} {n}" for what, n in sorted(outcome.items())))
    total = sum(outcomes.values(), collections.Counter[str]())
    print(f"{count} faults: {dict(total)}; crashes 0, wrong kernels 0")


def use(store: Store) -> str:
    """Ask for every kernel, as a new process would; what came of it. All else is an error."""
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        try:
            opened = KernelStore(store.root, lock_timeout_s=5)
            for source in store.rng.sample(sources(KEYS), KEYS):
                ask(opened, source)
        except StoreError as error:
            check("an error without a remedy", len(str(error)) > 40, str(error))
            return "refused with an error"
    stats = opened.stats
    check("a hit and a miss", stats.disk_hits + stats.compiles == KEYS, stats)
    if any(not issubclass(message.category, RuntimeWarning) for message in messages):
        raise ValueError(f"another warning: {messages[0].message}")
    if stats.heals:
        check("a heal without a word", bool(messages), stats)
        return "healed with a warning"
    if stats.compiles:
        return "missed with a warning" if messages else "missed"
    return "hits with a warning" if messages else "hits"


def repair(store: Store) -> None:
    """What its owner does after a refusal: make the folder one of his own again."""
    path = store.root
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
    elif path.stat().st_uid != os.geteuid() or stat.S_IMODE(path.stat().st_mode) & 0o022:
        os.chown(path, os.geteuid(), -1)
        path.chmod(0o700)
    if store.aside.is_dir() and not store.aside.is_symlink():
        shutil.rmtree(store.aside)
    store.aside.unlink(missing_ok=True)


def main(folder: str, seed: str, count: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    run(Path(folder), random.Random(int(seed)), int(count))


if __name__ == "__main__":
    main(*sys.argv[1:])

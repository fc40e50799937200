"""Storms on a kernel store: many processes, many kills. What breaks ends the script with an error.

    python tests/host/storms.py crowd FOLDER SEED PROCESSES KEYS ROUNDS LOCKING
    python tests/host/storms.py churn FOLDER SEED PROCESSES ROUNDS
    python tests/host/storms.py kills FOLDER SEED KILLS

A stand-in for the compiler makes cubins that tell which kernel they are of.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jitgen.runtime.bundle import Toolchain, export_bundle, import_bundle
from jitgen.runtime.entry import Entry
from jitgen.runtime.eviction import list_usage
from jitgen.runtime.key import KernelKey, make_key
from jitgen.runtime.nvrtc import Compiled, Resources
from jitgen.runtime.store import KernelStore

RESOURCES = Resources(168, 0, 0, 1024, 0.25)
TOOLCHAIN = Toolchain("0.1.0", "sm_90a", "13.0.88", "0123456789abcdef")
LOG = "ptxas info    : Used 168 registers"


def sources(num_keys: int) -> list[str]:
    return [f"// kernel {idx}\n" for idx in range(num_keys)]


def key_of(source: str) -> KernelKey:
    return make_key(source, {}, (), "13.0.88", "sm_90a")


def cubin_of(source: str) -> bytes:
    return f"cubin of {source}".encode() * 100


def compiled(source: str) -> Compiled:
    return Compiled(cubin_of(source), LOG, RESOURCES)


def check_is_right(entry: Entry, source: str) -> None:
    """Raise ValueError if it is not, in all that it holds, the kernel of `source`."""
    have = (entry.source, entry.cubin, entry.key, entry.name, entry.resources, entry.log)
    if have != (source, cubin_of(source), key_of(source), "gemm", RESOURCES, LOG):
        raise ValueError(f"a wrong kernel was loaded: {have!r:.300}, wanted that of {source!r}")


def ask(store: KernelStore, source: str, compile: Callable[[], Compiled] | None = None) -> Entry:
    """The kernel of `source`, which is checked."""
    entry = store.get_or_compile(
        key_of(source), compile or (lambda: compiled(source)), name="gemm", source=source
    )
    check_is_right(entry, source)
    return entry


def in_child(work: Callable[..., None], *args: Any) -> int:
    """The process that does the work; its exit code is 1, with a traceback, if that fails."""
    pid = os.fork()
    if pid:
        return pid
    try:
        warnings.simplefilter("error")
        work(*args)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


# --- crowd: everybody wants every kernel of a cold folder -----------------------------------------


def crowd(
    root: Path, rng: random.Random, processes: int, keys: int, rounds: int, locking: bool
) -> None:
    """With locks one compile a key; without, at most one a process and key; and never an error."""
    most = 0
    for round_ in range(rounds):
        folder, log = root / f"{round_}", root / f"{round_}.log"

        def work(seed: float, folder: Path = folder, log: Path = log) -> None:
            order = sources(keys)
            random.Random(seed).shuffle(order)
            store = KernelStore(folder, locking=locking)
            with log.open("a", buffering=1) as lines:
                for source in order:

                    def compile(source: str = source) -> Compiled:
                        lines.write(f"{os.getpid()} {source}")
                        time.sleep(0.001)
                        return compiled(source)

                    ask(store, source, compile)

        children = [in_child(work, rng.random()) for _ in range(processes)]
        failed = [child for child in children if os.waitpid(child, 0)[1]]
        compiles = collections.Counter(log.read_text().splitlines())
        by_key = collections.Counter(line.partition(" ")[2] for line in compiles.elements())
        most = max(most, *by_key.values())
        check("processes failed", not failed, round_, failed)
        check("a process compiled a key twice", set(compiles.values()) == {1}, round_)
        check("a key was not compiled", len(by_key) == keys, round_)
        check("a key was compiled twice", not locking or most == 1, round_, by_key)
        left = list((folder / "tmp").iterdir())
        check("something is left in tmp", not left, round_, left)
        store = KernelStore(folder)
        for source in sources(keys):
            check_is_right(store.get(key_of(source)) or missing(source), source)
        shutil.rmtree(folder)
    print(f"rounds {rounds}, processes {processes}, keys {keys}, most compiles of a key {most}")


# --- churn: everybody publishes and collects ------------------------------------------------------


def churn(root: Path, rng: random.Random, processes: int, rounds: int) -> None:
    """Never an error, a wrong kernel or a leftover."""

    def work(seed: float) -> None:
        mine = random.Random(seed)
        for _ in range(rounds):
            collect(root, root, mine)

    children = [in_child(work, rng.random()) for _ in range(processes)]
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    check("processes failed", not failed, failed)
    left = list((root / "tmp").iterdir())
    check("something is left in tmp", not left, left)
    print(f"processes {processes}, rounds {rounds}, kernels left {len(list_usage(root))}")


# --- kills: a process dies in the middle of whatever it does --------------------------------------

FUNCTIONS = ("open", "mkdir", "rename", "fsync", "utime", "unlink", "rmdir", "lstat", "write")
KEYS = 8


def kills(root: Path, rng: random.Random, count: int) -> None:
    """Half at a random time, half at a random call of the system; then every kernel is sound."""
    bundle = root / "bundle.tar"
    filled = KernelStore(root / "exporter")
    for source in sources(KEYS):
        ask(filled, source)
    export_bundle(bundle, TOOLCHAIN, filled.entries())
    folder = root / "kernels"
    died = collections.Counter[str]()
    for idx in range(count):
        work = rng.choice([write, collect, import_all])
        seed = rng.random()
        by_call = idx % 2 == 0
        limit = rng.randrange(1, 400) if by_call else 0
        child = in_child(endless, work, folder, bundle, seed, limit)
        if not by_call:
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        check("a process failed", os.WIFSIGNALED(status), idx, work.__name__)
        died[work.__name__] += 1
        store = KernelStore(folder, max_bytes=0)
        for source in sources(KEYS):  # whole or missing: a warning of damage is an error here
            if entry := store.get(key_of(source)):
                check_is_right(entry, source)
        if idx % 10 == 9:  # and who comes next fills the store, and waits for no lock of the dead
            later = KernelStore(folder, lock_timeout_s=5)
            for source in sources(KEYS):
                ask(later, source)
            check("not all is there", sum(1 for _ in later.entries()) == KEYS, idx)
    left = list((folder / "tmp").iterdir())
    for path in left:
        os.utime(path, (1e9, 1e9), follow_symlinks=False)
    check("leftovers stay", KernelStore(folder).gc(0).num_leftovers == len(left), count)
    print(f"kills {count}: {dict(died)}, leftovers collected {len(left)}, wrong kernels 0")


def endless(
    work: Callable[[Path, Path, random.Random], None],
    folder: Path,
    bundle: Path,
    seed: float,
    limit: int,
) -> None:
    """Work until killed; at the `limit`-th call of the system if that is not 0."""
    if limit:
        kill_at_call(limit)
    rng = random.Random(seed)
    while True:
        work(folder, bundle, rng)


def kill_at_call(limit: int) -> None:
    """Have this process kill itself before the `limit`-th of its calls of FUNCTIONS."""
    left = [limit]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in FUNCTIONS:
        setattr(os, name, counted(getattr(os, name)))


def write(folder: Path, bundle: Path, rng: random.Random) -> None:
    store = KernelStore(folder, max_bytes=4000)
    for source in rng.sample(sources(KEYS), 3):
        ask(store, source)


def collect(folder: Path, bundle: Path, rng: random.Random) -> None:
    write(folder, bundle, rng)
    for usage in list_usage(folder):  # make every entry look long unused
        with contextlib.suppress(FileNotFoundError):
            os.utime(usage.path, (1e9, 1e9))
    store = KernelStore(folder)
    if rng.random() < 0.2:
        store.clear()
    store.gc(rng.choice([1, 4000, 20000]))
    store.verify()


def import_all(folder: Path, bundle: Path, rng: random.Random) -> None:
    store = KernelStore(folder)
    if rng.random() < 0.5:
        store.clear()
    import_bundle(bundle, TOOLCHAIN, store)


# --- all ------------------------------------------------------------------------------------------


def check(fault: str, is_fine: bool, *details: object) -> None:
    if not is_fine:
        raise ValueError(f"{fault}: {details}")


def missing(source: str) -> Entry:
    raise ValueError(f"the kernel of {source!r} is missing")


def main(storm: str, folder: str, seed: str, *numbers: str) -> None:
    warnings.simplefilter("error")
    root, rng = Path(folder), random.Random(int(seed))
    root.mkdir(parents=True, exist_ok=True)
    if storm == "crowd":
        processes, keys, rounds, locking = map(int, numbers)
        crowd(root, rng, processes, keys, rounds, bool(locking))
    elif storm == "churn":
        churn(root, rng, *map(int, numbers))
    else:
        kills(root, rng, int(numbers[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])

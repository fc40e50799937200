"""The process that measures: a kernel that kills it or hangs costs one schedule, not the search."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any

from ..errors import CandidateError, DeviceError, JitgenError
from .keys import TunedProblem, TunedSchedule
from .tune import Measurer

START_TIMEOUT_S = 180.0  # torch is imported, and a context made
CALL_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 10.0


class IsolatedMeasurer:
    """A Measurer whose methods run in a process of their own, made anew when it is lost.

    Parameters
    ----------
    make : makes the Measurer there; it can be pickled
    start_timeout_s, call_timeout_s : after which the process is taken to hang, and killed
    """

    def __init__(
        self,
        make: Callable[[], Measurer],
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        call_timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        self._make = make
        self._start_timeout_s = start_timeout_s
        self._call_timeout_s = call_timeout_s
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def check(self, problem: TunedProblem, m: int, schedule: TunedSchedule) -> None:
        """As the Measurer's; CandidateError too if its process dies or hangs."""
        self._call("check", problem, m, schedule)

    def time(
        self, problem: TunedProblem, m: int, schedules: Sequence[TunedSchedule], num_calls: int
    ) -> list[list[float]]:
        """As the Measurer's; CandidateError too if its process dies or hangs."""
        times: list[list[float]] = self._call("time", problem, m, schedules, num_calls)
        return times

    def __enter__(self) -> IsolatedMeasurer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def _call(self, method: str, *arguments: object) -> Any:
        connection = self._connection or self._start()
        try:
            return self._exchange(connection, (method, arguments), self._call_timeout_s)
        except _LostError as error:
            raise CandidateError(f"the process that measures {error}") from None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        self._connection = connection
        self._process = context.Process(target=_serve, args=(theirs, self._make), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        try:
            self._exchange(connection, None, self._start_timeout_s)
        except _LostError as error:
            raise DeviceError(f"the process that measures {error} at its start") from None
        return connection

    def _exchange(self, connection: Connection, message: object, timeout_s: float) -> Any:
        """What the process answers; _LostError if it does not."""
        try:
            connection.send(message)
            if not connection.poll(timeout_s):
                self._stop(grace_s=0.0)
                raise _LostError(f"did not answer for {timeout_s:g} s")
            is_last, error, value = connection.recv()
        except (EOFError, ConnectionError):
            raise _LostError(f"died with exit code {self._stop()}") from None
        if is_last:
            self._stop()
        if error is not None:
            raise error
        return value

    def _stop(self, grace_s: float = EXIT_TIMEOUT_S) -> int | None:
        """End the process, by force if it takes too long; its exit code."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if process is None or connection is None:
            return None
        connection.close()
        process.join(grace_s)
        if process.is_alive():
            process.kill()
            process.join(EXIT_TIMEOUT_S)
        return process.exitcode


class _LostError(Exception):
    """The process is no more; the text says how it ended."""


def _serve(connection: Connection, make: Callable[[], Measurer]) -> None:
    """Answer calls until the other end of the pipe is closed, or something may be broken.

    An answer: whether it is the last one, the error, the value. The first message asks for a start.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with contextlib.suppress(EOFError, ConnectionError):
        connection.recv()
        try:
            measurer = make()
        except Exception as error:
            known = error if isinstance(error, JitgenError) else DeviceError(_describe(error))
            connection.send((True, known, None))
            return
        connection.send((False, None, None))
        while True:
            method, arguments = connection.recv()
            answer: tuple[bool, JitgenError | None, Any]
            try:
                answer = False, None, getattr(measurer, method)(*arguments)
            except JitgenError as error:
                # A failure of the device may be what every later call would see.
                is_last = isinstance(error, DeviceError)
                answer = is_last, CandidateError(str(error)) if is_last else error, None
            except Exception as error:
                answer = True, CandidateError(_describe(error)), None
            connection.send(answer)
            if answer[0]:
                return


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

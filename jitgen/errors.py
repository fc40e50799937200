"""Every error that jitgen raises on purpose: it names the rule, what was got, and the remedy."""


class JitgenError(Exception):
    """Base of all errors raised by jitgen."""


class ProblemError(JitgenError, ValueError):
    """The problem, or a tensor given for it, breaks a rule: dtype, shape, stride, layout."""


class ScheduleError(JitgenError, ValueError):
    """The schedule cannot run this problem on this target."""


class VerifyError(JitgenError):
    """A lowered kernel breaks a rule of the tile IR: a fault of jitgen, not of its user."""


class DeviceError(JitgenError, RuntimeError):
    """The machine cannot do what was asked: no GPU, the wrong architecture, a driver failure."""


class CompileError(JitgenError, RuntimeError):
    """NVRTC refused a kernel, or its log holds an advisory, a spill or a stack frame.

    Attributes
    ----------
    log : str
        The compiler's log, complete.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(f"{message}\n{log}" if log else message)
        self.log = log


class JitForbiddenError(CompileError):
    """A call needs a kernel that is not in the store, and `jitgen.configure(jit="forbid")` holds.

    The message names the kernel's problem and schedule, and what makes it.
    """


class CaptureError(JitgenError, RuntimeError):
    """A stream is being captured into a CUDA graph, and a call needs a kernel not loaded yet.

    Loading it would invalidate the capture, which goes on without that call.
    """


class StoreError(JitgenError, RuntimeError):
    """The kernel store or a file of tuning records cannot be used: permissions, locks, format."""


class CandidateError(JitgenError, RuntimeError):
    """A schedule is out of the tuner's race: refused, wrong, or its process died or hung."""


def one_line(error: Exception) -> str:
    """What the error says, on one line and without a compiler's log."""
    log = error.log if isinstance(error, CompileError) else ""
    return " ".join(str(error).removesuffix(log).split())

"""The public interfaces of other libraries, on jitgen's kernels: one import line is another one."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn


def refuse(module: str, name: str, reasons: Mapping[str, str]) -> Callable[..., NoReturn]:
    """In the place of a function that jitgen has not: it may be imported, and raises when called.

    Raises
    ------
    AttributeError : `reasons` does not know the name either
    """
    if name not in reasons:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def raise_when_called(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{module}.{name}: {reasons[name]}")

    return raise_when_called

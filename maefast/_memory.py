"""Memory that is free again, given back."""

from __future__ import annotations

import contextlib
import ctypes


def release_freed() -> None:
    """To the system what the C library keeps of freed memory: else it counts as this process's until it is used."""
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)

"""Whether a step with static shapes runs now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0


def recording() -> bool:
    """Whether the code that asks runs inside a `graphed_step`, where sizes must be the same in every call."""
    return _depth > 0


@contextmanager
def static() -> Iterator[None]:
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1

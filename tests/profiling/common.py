"""What tests of measured times share."""

from __future__ import annotations

import functools
from collections.abc import Callable


def patient(test: Callable) -> Callable:
    """Up to three attempts: what a busy machine does to a moment is no fault of what is tested."""

    @functools.wraps(test)
    def attempts(*args, **kwargs):
        for _ in range(2):
            try:
                return test(*args, **kwargs)
            except AssertionError:
                continue
        return test(*args, **kwargs)

    return attempts

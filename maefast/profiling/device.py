"""What a GPU did: kernels of each op, and where the host waited for the device."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable

import torch
from torch.autograd import DeviceType

_SYNC = "synchronizing CUDA operation"


def kernels(profiler: torch.profiler.profile) -> dict[int, list[tuple[str, int]]]:
    """(name, nanoseconds) of the kernels and copies that each op launched, by its correlation."""
    found = defaultdict(list)
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation():
            found[event.linked_correlation_id()].append((event.name(), event.duration_ns()))
    return dict(found)


def waits(run: Callable[[], object]) -> dict[str, int]:
    """How often a call of `run` makes the host wait for the CUDA device, by the line of Python that does. A
    `torch.cuda.synchronize()` is not among them."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return dict(Counter(f"{w.filename}:{w.lineno}" for w in seen if _SYNC in str(w.message)))

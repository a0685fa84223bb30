"""Tests marked `gpu` skip, saying so, where torch sees no CUDA device; float32 is float32 in all of them."""

from __future__ import annotations

import gc

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The slow ones first, so that of two processes none ends alone with one.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch sees none here")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What thousands of collected tests hold is there to the end: a collection of garbage (the benchmarks ask for one
    before every case, torch.compile too) need not walk it, for half a second each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def exact_float32():
    """No TF32: cuDNN's convolutions use it by default, and 10 bits cannot be compared at 1e-5. Whoever switches it on
    switches it on for one test."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value

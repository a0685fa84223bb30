"""The clocks: what waits for the device is never captured, and a capture that fails leaves the process as it was."""

from __future__ import annotations

import dataclasses
import time
import types
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

pytest.importorskip("rich")

from maefast.bench import timing
from maefast.bench.micro import suite
from maefast.bench.micro.op import BOTH
from maefast.bench.micro.shapes import PRESETS
from maefast.ops import _checks

CASES = list(suite.cases(suite.FAMILIES, PRESETS["toy"]["cpu"], [torch.float32], "cpu"))


def without_data(value):
    """The same inputs as tensors that have no values, so that whoever reads one is found out."""
    if isinstance(value, torch.Tensor):
        fake = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
        return fake.requires_grad_(value.requires_grad)
    if dataclasses.is_dataclass(value):
        made = object.__new__(type(value))
        for name, item in vars(value).items():
            object.__setattr__(made, name, without_data(item))
        return made
    return {name: without_data(item) for name, item in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("case", [case for case in CASES if case.op.name != "resize"], ids=str)
def test_what_waits_for_the_device_is_flagged(case, monkeypatch):
    """Every variant without values: exactly those with the flag read one back. On a GPU that is a wait. (The peer of
    `resize` is Pillow, which takes no tensors; it is of the host alone.)"""
    monkeypatch.setattr(_checks, "holds", lambda condition, message: None)  # no wait on a GPU
    sets = suite._input_sets(case, most=1)  # untouched: with more, the first one is run to see how long it takes
    grads = [torch.randn_like(case.op.eager(sets[0])) if case.direction == BOTH else None]
    names = [name for name, reason in suite.variants(case, ("eager", "tuned")).items() if reason is None]
    with FakeTensorMode():
        fake = [without_data(sets[0])], [without_data(grads[0])]
        for name in names:
            try:
                suite._call(case, name, *fake)(0)
                waited = False
            except (DataDependentOutputException, DynamicOutputShapeException):
                waited = True
            assert waited == suite.waits(case.op, name), name


class Stub:
    """As much of torch.cuda as the clock uses, with a capture whose end may raise, as a real one's does."""

    def __init__(self, fails: bool = False, waits: bool = False):
        self.fails, self.waits = fails, waits
        self.streams, self.captures, self.debug = ["default"], 0, ["default"]
        self.default_generators = [self.Generator()]

    class Generator:
        state = "capturing"

        def clone_state(self):
            return types.SimpleNamespace(state="own")

        def graphsafe_set_state(self, other):
            self.state = other.state

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1.0

    def Stream(self):
        return types.SimpleNamespace(wait_stream=lambda other: None)

    def CUDAGraph(self):
        def begin():
            self.captures += 1

        def end():
            if self.fails:
                raise RuntimeError("operation failed due to a previous error during capture")

        return types.SimpleNamespace(capture_begin=begin, capture_end=end, replay=lambda: None)

    @contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    def current_stream(self):
        return types.SimpleNamespace(wait_stream=lambda other: None)

    def current_device(self):
        return 0

    def get_sync_debug_mode(self):
        return self.debug[-1]

    def set_sync_debug_mode(self, mode):
        self.debug.append(mode)

    def call(self, i):
        if self.waits and self.debug[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def synchronize(self):
        pass

    def empty_cache(self):
        pass


def clock(monkeypatch, stub: Stub, **options) -> timing.GraphSampler:
    monkeypatch.setattr(timing, "torch", types.SimpleNamespace(cuda=stub))
    return timing.sampler(stub.call, 2, "cuda", **options)


def test_the_warm_up_of_slow_calls_is_short(monkeypatch):
    """Three calls, of which the first does not count; without the bound every set of inputs would be tried."""
    monkeypatch.setattr(timing, "ENOUGH", 0.01)
    calls = []

    def call(i):
        calls.append(i)
        time.sleep(0.03 if len(calls) == 1 else 0.006)

    made = timing.HostSampler(call, 16, target=12e-3)
    assert 3 <= len(calls) <= 9  # until `warmup` is over: the first call takes most of it
    assert made.inner in (1, 2)
    calls.clear()
    timing.HostSampler(call, 16, warmup=0)
    assert calls == [0, 1, 2]


def test_fast_calls_try_every_set():
    calls = []
    timing.HostSampler(calls.append, 16, warmup=0)
    assert set(calls) == set(range(16))


def test_rounds_end_by_time_but_never_before_the_least():
    clocks = {name: lambda: time.sleep(2e-3) or 2e-3 for name in "ab"}
    lengths = {name: len(found) for name, found in timing.interleave(clocks, 500, seconds=0.04, least=3).items()}
    assert lengths["a"] == lengths["b"]
    assert 3 <= lengths["a"] <= 12
    assert len(timing.interleave(clocks, 500, seconds=0.0, least=3)["a"]) == 3
    assert len(timing.interleave(clocks, 2, seconds=0.0, least=3)["a"]) == 2
    assert len(timing.interleave(clocks, 4)["a"]) == 4


def test_a_capture_that_fails_leaves_the_process_as_it_was(monkeypatch):
    stub = Stub(fails=True)
    made = clock(monkeypatch, stub)
    assert "RuntimeError" in made.note
    assert stub.captures == 1
    assert stub.streams == ["default"]
    assert stub.default_generators[0].state == "own"
    assert made() == pytest.approx(1e-3 / (made.inner * 2))


def test_what_waits_is_never_captured(monkeypatch):
    flagged = Stub(fails=True)
    assert "waits for the device" in clock(monkeypatch, flagged, waits=True).note
    found_out = Stub(fails=True, waits=True)
    assert "not captured" in clock(monkeypatch, found_out).note
    for stub in (flagged, found_out):
        assert stub.captures == 0
        assert stub.debug[-1] == "default"


def test_what_does_not_wait_is_captured(monkeypatch):
    stub = Stub()
    assert clock(monkeypatch, stub).note is None
    assert stub.captures == 1
    assert stub.default_generators[0].state == "capturing"  # untouched


@pytest.mark.gpu
def test_after_a_failed_capture_on_a_gpu():
    """The capture itself, past the guard: it fails, and the next draw and the next capture work."""
    x = torch.arange(8.0, device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        timing.capture(lambda i: (torch.rand(2, device="cuda"), x.nonzero()), 1)
    assert torch.cuda.current_stream() == stream
    assert torch.rand(4, device="cuda").std() > 0
    torch.rand(4, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    out = []
    graph = timing.capture(lambda i: out.append(x + i), 2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out[1], x + 1)


@pytest.mark.gpu
def test_the_guard_finds_a_wait_on_a_gpu():
    x = torch.arange(8.0, device="cuda")
    made = timing.sampler(lambda i: x.nonzero(), 1, "cuda")
    assert "not captured" in made.note
    assert torch.cuda.get_sync_debug_mode() == 0
    assert timing.sampler(lambda i: x + 1, 1, "cuda").note is None

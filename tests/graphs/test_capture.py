"""What the recorder asks of CUDA, and in which order, with CUDA played by a script."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from maefast.graphs.capture import Recorder, recorder


class Script:
    """Notes the calls; `invalid`: the capture is broken by then, so its end raises."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.invalid = self.capturing = False


@pytest.fixture
def cuda(monkeypatch):
    script = Script()

    class Graph:
        def register_generator_state(self, generator):
            script.calls.append("register")

        def capture_begin(self, pool, capture_error_mode):
            script.calls.append(f"begin {pool} {capture_error_mode}")
            script.invalid, script.capturing = False, True

        def capture_end(self):
            script.calls.append("end")
            was, script.capturing = script.capturing, False
            if script.invalid or not was:
                raise RuntimeError("operation failed due to a previous error during capture")

        def replay(self):
            script.calls.append("replay")

        def reset(self):
            script.calls.append("reset")

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            script.calls.append("wait")

    @contextlib.contextmanager
    def entered(stream):
        script.calls.append("enter")
        try:
            yield
        finally:
            script.calls.append("leave")

    pools = iter([(0, n) for n in range(1, 9)])
    for name, what in {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "stream": entered,
        "current_stream": Stream,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "graph_pool_handle": lambda: next(pools),
    }.items():
        monkeypatch.setattr(torch.cuda, name, what)
    for name, word in (("_cuda_endAllocateToPool", "close"), ("_cuda_releasePool", "release")):
        call = lambda index, pool, word=word: script.calls.append(f"{word} {pool}")  # noqa: E731
        monkeypatch.setattr(torch._C, name, call, raising=False)
    return script


@pytest.fixture
def made(cuda):
    return Recorder(torch.device("cpu"), torch.Generator())


def test_only_cuda_has_graphs():
    assert recorder(torch.device("cpu"), None) is None


def test_running_on_the_stream_of_the_capture(cuda, made):
    assert made.run(lambda: cuda.calls.append("work") or 5) == 5
    assert cuda.calls == ["wait", "enter", "work", "leave", "wait"]


def test_recording(cuda, made):
    assert made.record(lambda: cuda.calls.append("work") or 5) == 5
    made.replay()
    begin = "begin (0, 1) thread_local"
    assert cuda.calls == ["enter", "register", begin, "work", "end", "leave", "replay"]
    assert gc.isenabled()


def test_a_capture_that_could_be_ended(cuda, made):
    """Python raised, CUDA did not mind."""

    def work():
        assert not gc.isenabled()
        raise KeyError("nothing")

    with pytest.raises(KeyError):
        made.record(work)
    assert cuda.calls == ["enter", "register", "begin (0, 1) thread_local", "end", "reset", "leave"]
    assert gc.isenabled()
    assert made.graph is None


def test_a_capture_that_was_invalidated(cuda, made):
    """Its pool is closed, and a capture of next to nothing frees the generators."""

    def work():
        cuda.invalid = True
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        made.record(work)
    again = ["register", "begin (0, 2) thread_local", "end", "reset"]
    assert cuda.calls == [
        *["enter", "register", "begin (0, 1) thread_local", "end", "close (0, 1)", "release (0, 1)", "reset"],
        *again,
        "leave",
    ]
    cuda.calls.clear()
    made.record(lambda: None)  # and can record
    assert cuda.calls == ["enter", "register", "begin (0, 3) thread_local", "end", "leave"]


def test_a_capture_whose_end_raises(cuda, made):
    def work():
        cuda.invalid = True

    with pytest.raises(RuntimeError, match="previous error"):
        made.record(work)
    assert cuda.calls.count("end") == 3  # its own, once more, and that of the small capture
    assert cuda.calls[-5:] == ["register", "begin (0, 2) thread_local", "end", "reset", "leave"]
    assert gc.isenabled()

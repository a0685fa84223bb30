"""CUDA graphs: recording a function, replaying it, and leaving the process usable when the recording fails.

`recorder` is the only way from `graphed_step` to CUDA, so that its logic can be tested with another recorder.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


class GraphCaptureError(RuntimeError):
    """A step could not be captured as a graph. Nothing of it has run: parameters, optimiser, buffers and random
    generators are as before the call, and the process can go on without a graph."""


def recorder(device: torch.device, generator: torch.Generator | None) -> Recorder | None:
    """What records on `device`; None where there are no graphs."""
    return Recorder(device, generator) if device.type == "cuda" else None


class Recorder:
    """One CUDA graph on a stream of its own.

    Args:
        device: a CUDA device. generator: what the function draws from besides the device's default generator.
    """

    def __init__(self, device: torch.device, generator: torch.Generator | None) -> None:
        self.device, self.generator = device, generator
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, function: Callable[[], T]) -> T:
        """Run now, on the stream that will record: autograd's accumulators remember the stream they were made on."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], T]) -> T:
        """Record what `function` would launch, and launch nothing. Its result is filled by each `replay`."""
        torch.cuda.synchronize(self.device)
        gc.collect()
        torch.cuda.empty_cache()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        collecting = gc.isenabled()
        gc.disable()  # what is collected may free memory or events, which a capture forbids
        try:
            with torch.cuda.stream(self.stream):
                try:
                    self._begin(graph, pool)
                    result = function()
                    graph.capture_end()
                except BaseException:
                    self._abandon(graph, pool)
                    raise
        finally:
            if collecting:
                gc.enable()
        self.graph = graph
        return result

    def replay(self) -> None:
        self.graph.replay()

    def forget(self) -> None:
        if self.graph is not None:
            torch.cuda.synchronize(self.device)  # its memory may be taken by others from here on
        self.graph = None

    def _begin(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        # thread_local: a loader's thread may pin memory meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
        """End a capture that failed. On one that was invalidated capture_end raises before it has closed the memory
        pool and, up to torch 2.11, leaves the generators marked as capturing, so that they refuse to draw."""
        try:
            graph.capture_end()
        except RuntimeError:
            index = torch.cuda.current_device()
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(index, pool)
                torch._C._cuda_releasePool(index, pool)
            graph.reset()
            self._capture_nothing()
        else:
            graph.reset()

    def _capture_nothing(self) -> None:
        """A capture that ends well takes the mark from the generators."""
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scratch = torch.zeros((), device=self.device)
            graph = torch.cuda.CUDAGraph()
            self._begin(graph, torch.cuda.graph_pool_handle())
            scratch.zero_()
            graph.capture_end()
            graph.reset()


# What torch says -> what to do about it.
HINTS = (
    (
        "CPU tensor is pinned",
        "something is copied from the host: a mask whose samples keep different numbers of tokens, a mask drawn on the"
        " host (masking.block), or torch.tensor(...) inside the step",
    ),
    (
        "enerator",
        "a random generator is used that the graph does not know: give it as `generator`, or draw from the default one",
    ),
    (
        "captur",
        "something waits for the device or reads from it: .item(), .tolist(), bool(tensor), nonzero, indexing by a"
        " boolean mask; or a loss of an earlier step that was not captured is still alive with its graph",
    ),
)


def explain(error: BaseException) -> str:
    """Why a capture failed, and where, in a sentence or two."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    hint = next((f"; {hint}" for words, hint in HINTS if words in text), "")
    return f"the step cannot be captured as a CUDA graph: {text}{_place(error)}{hint}"


def _place(error: BaseException) -> str:
    """The last line that is not torch's own."""
    here, library = Path(__file__).parent, Path(torch.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if library not in path.parents and here not in path.parents:
            return f" ({path.name}:{frame.lineno}: {frame.line})"
    return ""

"""A stand-in for a CUDA graph on a CPU: what is recorded are calls of torch's operators on fixed memory, not Python.

Recording leaves no trace, as on CUDA: what operators wrote is put back, and so are the random generators.
A replay runs the same operators on the same tensors and writes into the same results, so whatever Python had computed
(numbers, shapes, choices) is as it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORBIDDEN = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


class Tape(TorchDispatchMode):
    """Records calls. Reading from a tensor is an error, as it is while capturing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.written: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        if name in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing ({name})")
        places = [argument.alias_info for argument in function._schema.arguments]
        values = [*args, *(kwargs.get(a.name) for a in function._schema.arguments[len(args) :])]
        for place, value in zip(places, values):
            if place is not None and place.is_write:
                for tensor in tree_leaves(value):
                    if isinstance(tensor, Tensor):
                        self._keep(tensor)
        out = function(*args, **kwargs)
        if not function.is_view:
            self.calls.append((function, args, kwargs, out))
        self.made += [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.written:
            self.written[storage.data_ptr()] = (storage, storage.clone())

    def undo(self) -> None:
        for storage, content in self.written.values():
            storage.copy_(content)

    def replay(self) -> None:
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class FakeRecorder:
    """The interface of `maefast.graphs.capture.Recorder`."""

    def __init__(self, device: torch.device, generator: torch.Generator | None) -> None:
        self.generators = [torch.default_generator, *([] if generator is None else [generator])]
        self.tape: Tape | None = None
        self.events: list[str] = []

    def run(self, function: Callable):
        self.events.append("run")
        return function()

    def record(self, function: Callable):
        self.events.append("record")
        states = [generator.get_state() for generator in self.generators]
        tape = Tape()
        try:
            with tape:
                out = function()
        finally:
            tape.undo()
            for generator, state in zip(self.generators, states):
                generator.set_state(state)
        self.tape = tape
        return out

    def replay(self) -> None:
        self.events.append("replay")
        with torch.no_grad():
            self.tape.replay()

    def forget(self) -> None:
        self.tape = None

"""What a step is called with: tensors, which have fixed shapes, and constants, which stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Slot:
    """Stands for tensor number `index` in the structure of the arguments."""

    index: int

    def __repr__(self) -> str:
        return "<tensor>"


class Arguments:
    """The arguments of one call, taken apart.

    Attributes:
        tensors: all of them, in order. names: what messages call each.
        structure: the arguments with `Slot`s for tensors.
    """

    def __init__(self, batches: list[tuple[tuple, dict]]) -> None:
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self.structure = []
        for i, (args, keywords) in enumerate(batches):
            where = f"micro-batch {i}, " if len(batches) > 1 else ""
            inner = [self._take(value, f"{where}input {j}") for j, value in enumerate(args)]
            named = {name: self._take(value, f"{where}{name}") for name, value in keywords.items()}
            self.structure.append((tuple(inner), named))

    def _take(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            if value.requires_grad:
                raise ValueError(f"{name} requires a gradient; a step differentiates by the model's parameters only")
            self.tensors.append(value)
            self.names.append(name)
            return Slot(len(self.tensors) - 1)
        if isinstance(value, dict):
            return {key: self._take(inner, f"{name}[{key!r}]") for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            inner = [self._take(item, f"{name}[{i}]") for i, item in enumerate(value)]
            return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
        if not isinstance(value, CONSTANTS):
            raise TypeError(
                f"{name} is a {type(value).__name__}; a step takes tensors, numbers and strings, alone or in lists,"
                " tuples and dicts (a mask as the noise that it comes from)"
            )
        return value

    def filled(self, tensors: list[Tensor]) -> list[tuple[tuple, dict]]:
        """The structure with `tensors` in its slots."""
        return [(_fill(args, tensors), _fill(keywords, tensors)) for args, keywords in self.structure]

    def shapes(self) -> Arguments:
        """The same without data, which would be kept alive."""
        other = copy.copy(self)
        other.tensors = [torch.empty_like(tensor, device="meta") for tensor in self.tensors]
        return other

    def must_match(self, first: Arguments, devices: Iterable[torch.device]) -> None:
        """Raise ValueError where these are not the arguments that the step was made for."""
        if self.structure != first.structure:
            raise ValueError(
                f"the step was made for the arguments {_show(first.structure)}, not {_show(self.structure)}: numbers"
                f" and strings are constants of it, as shapes are. {HELP}"
            )
        for name, tensor, known in zip(self.names, self.tensors, first.tensors, strict=True):
            if tensor.shape != known.shape or tensor.dtype is not known.dtype:
                raise ValueError(f"{name} is {_kind(tensor)}, but the step was made for {_kind(known)}. {HELP}")
        self.must_lie_on(devices)

    def must_lie_on(self, devices: Iterable[torch.device]) -> None:
        for name, tensor in zip(self.names, self.tensors):
            if tensor.device not in devices:
                allowed = " or ".join(map(str, devices))
                raise ValueError(f"{name} is on {tensor.device}, but the step takes tensors on {allowed}")


HELP = "Leave out a last, smaller batch (drop_last=True), make another graphed_step for it, or reset() this one"


def _fill(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _fill(inner, tensors) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        inner = [_fill(item, tensors) for item in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return value


def _show(structure: list) -> str:
    calls = []
    for args, keywords in structure:
        calls.append("(" + ", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in keywords.items())]) + ")")
    return ", ".join(calls)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

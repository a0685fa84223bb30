"""Steps that are taken to be measured leave nothing behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@contextmanager
def unchanged(model: nn.Module, optimizer: Optimizer | None) -> Iterator[None]:
    """Puts back, whatever happens inside: parameters, gradients and buffers of the model, state and options of the
    optimizer, and the random generators of torch, numpy and Python. Copies lie on the host meanwhile; there are no
    gradients at the start."""
    undo = [_tensors(model), _gradients(model), _random()]
    if optimizer is not None:
        undo.append(_optimizer(optimizer))
    try:
        yield
    finally:
        for each in undo:
            each()


def _tensors(model: nn.Module) -> Callable[[], None]:
    saved = [(tensor, _copy(tensor)) for tensor in (*model.parameters(), *model.buffers())]
    places = [(module._buffers, dict(module._buffers)) for module in model.modules() if module._buffers]

    @torch.no_grad()
    def undo() -> None:
        for buffers, before in places:  # a step may have put others there
            buffers.update(before)
        for tensor, value in saved:
            tensor.copy_(value)

    return undo


def _gradients(model: nn.Module) -> Callable[[], None]:
    saved = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in saved:  # put aside, or a step would add to them
        parameter.grad = None

    def undo() -> None:
        for parameter, gradient in saved:
            parameter.grad = gradient

    return undo


def _optimizer(optimizer: Optimizer) -> Callable[[], None]:
    # Tensors are written back in place: a CUDA graph may hold them.
    states = {p: {name: _saved(value) for name, value in state.items()} for p, state in optimizer.state.items()}
    groups = [
        {name: _saved(value) for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]

    @torch.no_grad()
    def undo() -> None:
        for parameter in [p for p in optimizer.state if p not in states]:
            del optimizer.state[parameter]
        for parameter, state in states.items():
            optimizer.state[parameter].clear()
            optimizer.state[parameter].update({name: put_back() for name, put_back in state.items()})
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.update({name: put_back() for name, put_back in saved.items()})

    return undo


def _saved(value: Any) -> Callable[[], Any]:
    """Gives the value back as it is now."""
    if isinstance(value, Tensor):
        kept = _copy(value)
        return lambda: value.copy_(kept)
    kept = copy.deepcopy(value)
    return lambda: kept


def _random() -> Callable[[], None]:
    host, numbers, python = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def undo() -> None:
        torch.set_rng_state(host)
        np.random.set_state(numbers)  # noqa: NPY002
        random.setstate(python)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)

    return undo


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)

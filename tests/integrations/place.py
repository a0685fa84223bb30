"""What `places` says of each family's toy model, and how a model is told so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from tests.integrations.common import DropIn


@dataclass(frozen=True)
class Places:
    """Where a family's toy model has what is changed.

    Attributes:
        family: the toy model, as its own tests have it. blocks: path of a list of blocks. query, norm, act: paths in a
            block. conv: path of the patch convolution. encoder: path of what is frozen. ratio, normalise, checkpoint:
            how the model is told so. whole: whether its blocks run as one node. called: whether its own code calls the
            queries; VideoMAE's and EVA's take the weight. without: change -> why there is no place for it.
    """

    family: type[DropIn]
    blocks: str
    query: str
    norm: str
    act: str
    conv: str
    encoder: str
    ratio: Callable[[nn.Module, DropIn], None] | None = None
    normalise: Callable[[nn.Module], None] | None = None
    checkpoint: Callable[[nn.Module], None] | None = None
    whole: bool = True
    called: bool = True
    without: dict[str, str] = field(default_factory=dict)


def given(**kwargs) -> Callable[[nn.Module, DropIn], None]:
    """Other keyword arguments in every call."""

    def change(model: nn.Module, family: DropIn) -> None:
        inputs = family.inputs
        family.inputs = lambda dtype: (inputs(dtype)[0], {**inputs(dtype)[1], **kwargs})

    return change


def inputs(make: Callable[[torch.dtype], tuple]) -> Callable[[nn.Module, DropIn], None]:
    """Other masks, drawn by whoever calls the model."""

    def change(model: nn.Module, family: DropIn) -> None:
        family.inputs = lambda dtype: (make(dtype), {})

    return change


def turned(path: str) -> Callable[[nn.Module], None]:
    """A switch the other way."""

    def change(model: nn.Module) -> None:
        *parents, name = path.split(".")
        owner = model
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, not getattr(owner, name))

    return change

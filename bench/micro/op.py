"""What the suite measures: ops, their peers, and the cases they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from maefast.bench.micro.shapes import Shape

FORWARD, BOTH = "forward", "forward+backward"

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Op:
    """A public op, the eager PyTorch it replaces, and the fewest bytes it must move.

    make: random inputs of a shape. leaves: names of the inputs that need gradients (none: forward only).
    eager, tuned: inputs -> output. ours: (inputs, backend) -> output. view: makes both sides' outputs comparable.
    traffic: (shape, bytes of an element) -> (forward, backward) bytes, each input read and each output written
    once. flops: shape -> (forward, backward), a multiplication and an addition counted as two; None where arithmetic is
    nothing beside the bytes. raw: the raw ops that a backend must have; () for an op without
    backends. more: further peers by name. devices: where it is worth a measurement. automatic: devices on which the
    call without a backend is timed too, because more than our own kernels may serve it. cells: it takes the shapes of
    masked convnets. named: it takes only shapes that name it in `Shape.only`. waits: the variants that read back from
    the device, which no CUDA graph can hold (`compile` goes with `eager`, `compile_tuned` with `tuned`). maps: the
    input (a dense map) that the peers take for a leaf of ours (packed cells); pack: (inputs, such a map, or an output
    of the peers) -> packed.
    """

    name: str
    raw: tuple[str, ...]
    make: Callable[[Shape, torch.dtype, torch.Generator], Inputs]
    eager: Callable[[Inputs], Any]
    tuned: Callable[[Inputs], Any]
    ours: Callable[[Inputs, str | None], Any]
    leaves: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    traffic: Callable[[Shape, int], tuple[int, int]] | None = None
    flops: Callable[[Shape], tuple[int, int]] | None = None
    view: Callable[[Any], tuple[Tensor, ...]] = field(default=lambda out: (out,))
    more: dict[str, Peer] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    automatic: tuple[str, ...] = ()
    cells: bool = False
    named: bool = False
    waits: tuple[str, ...] = ()
    maps: dict[str, str] = field(default_factory=dict)
    pack: Callable[[Inputs, Tensor], Tensor] | None = None

    @property
    def directions(self) -> tuple[str, ...]:
        return (FORWARD, BOTH) if self.leaves else (FORWARD,)


@dataclass(frozen=True)
class Case:
    op: Op
    shape: Shape
    dtype: torch.dtype
    direction: str
    device: str

    def __str__(self) -> str:
        return f"{self.op.name}-{self.shape}-{str(self.dtype)[6:]}-{self.direction}"


@dataclass(frozen=True)
class Peer:
    """What else computes an op. run: inputs -> output. unable: why it cannot take a case, or None.

    compiled: it needs torch.compile, so that --no-compile leaves it out. waits: it reads back from the device.
    """

    run: Callable[[Inputs], Any]
    unable: Callable[[Case], str | None] = lambda case: None
    compiled: bool = False
    waits: bool = False

    @property
    def group(self) -> str:
        return "compile_library" if self.compiled else "library"

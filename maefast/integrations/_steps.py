"""What a family file tells `accelerate`: which methods it would replace, and on which input they are compared first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from maefast.integrations._guards import Guards

_inputs: list[Tensor] = []


def given(t: Tensor) -> Tensor:
    """An input of a probe, whose gradient is compared too."""
    t = t.detach().requires_grad_(t.is_floating_point())
    _inputs.append(t)
    return t


@contextmanager
def inputs() -> Iterator[list[Tensor]]:
    """What probes are `given` inside. Behind it nothing is kept: it would stay in memory with the model."""
    _inputs.clear()
    try:
        yield _inputs
    finally:
        _inputs.clear()


@dataclass(frozen=True)
class Options:
    """Arguments of `maefast.accelerate` that families read."""

    pred: str = "full"
    repair_positions: bool = False

    def __post_init__(self) -> None:
        if self.pred not in ("full", "masked"):
            raise ValueError(f"pred must be 'full' or 'masked', got {self.pred!r}")


@dataclass(frozen=True)
class Step:
    """Methods of one module to be replaced together.

    Attributes:
        module: whose. methods: name -> fast function. texts: name of the method ("" for the module) -> what serves it
            now, for the report.
        probe: runs the module on a small input and returns what is compared, gradients included.
        live: dotted names under the module of what the fast functions read themselves at every call, whatever it is:
            everything else that the originals read is guarded (`_guards`). `blocks.*.attn` stands for any number.
        beside: paths of parts whose forward is passed over as well. hooks: whether hooks on parts that are passed over
            are guarded; not where the fast functions ask for them.
        settings: kept on the module for the fast functions, see `_swap.setting`. path: name of the module in the model.
    """

    module: nn.Module
    methods: Mapping[str, Callable]
    texts: Mapping[str, str]
    probe: Callable[[], Any]
    live: frozenset[str] = frozenset()
    beside: tuple[str, ...] = ()
    hooks: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""

    def guards(self) -> dict[str, Guards]:
        """For `_swap.swap`. Raises `Unguarded`."""
        return {name: Guards(self.module, (name,), self.live, self.beside, self.hooks) for name in self.methods}

    def under(self, path: str) -> Step:
        """The same step of a model that stands at `path`."""
        return replace(self, path=".".join(part for part in (path, self.path) if part))

"""`--graph`: whether the steps of a run are one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from maefast.errors import ConfigError, TrainError
from maefast.graphs import GraphCaptureError, GraphedStep, graphed_step
from maefast.recipe import Output, View

from .config import PretrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


class Step(NamedTuple):
    """What a step found: the mean loss of its micro-batches, the norm of the gradient where it clips, and the mean
    parts of the loss, where it has several."""

    loss: torch.Tensor
    grad_norm: torch.Tensor | None
    terms: dict[str, torch.Tensor]


def parts(terms: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The terms of a loss, where there are several."""
    return {name: term.detach() for name, term in terms.items()} if len(terms) > 1 else {}


def mean(terms: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of micro-batches, as new tensors."""
    return {name: torch.stack([each[name] for each in terms]).mean(0) for name in terms[0]}


def problem(config: PretrainConfig, accelerator: Accelerator) -> str | None:
    """Why a run's step cannot be one CUDA graph, or None. (Its shapes are static: all batches have one size.)"""
    if accelerator.device.type != "cuda":
        return f"it needs a CUDA device, and this run is on the {accelerator.device.type}"
    if accelerator.num_processes > 1:
        return f"it is for one process, and {accelerator.num_processes} train together"
    if config.amp == "fp16":
        return "fp16 needs a gradient scaler, which decides on the host whether to step; --amp bf16 needs none"
    return None


class GraphSteps:
    """The steps of a run as a CUDA graph, while that is asked for and can be.

    Args:
        own_model: a model of the user's own, which may throw dice on the host: its steps are captured only with
            --graph on.

    Raises:
        ConfigError: --graph on, and it cannot be.
    """

    def __init__(self, config: PretrainConfig, accelerator: Accelerator, own_model: bool) -> None:
        self.config = config
        self.wanted = config.graph == "on" or (config.graph == "auto" and not own_model)
        self.step: GraphedStep | None = None
        self._kinds: Any = None
        self._terms: list[dict[str, torch.Tensor]] = []
        if self.wanted and (reason := problem(config, accelerator)) is not None:
            self._cannot(reason)

    def prepare(self, recipe: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """`recipe`: View -> Output."""

        def output(taken: dict) -> Output:
            found = recipe(put_together(self._kinds, taken))
            self._terms.append(parts(found.terms))  # when captured, of the graph's memory: a replay writes into it
            return found

        if self.wanted:
            options = {"clip": self.config.clip, "accumulate": self.config.accum}
            try:
                self.step = graphed_step(recipe, optimizer, loss=output, **options)
            except (TypeError, ValueError) as error:
                self._cannot(str(error))

    def __call__(self, views: Iterable[View], say: Callable[[str], None]) -> Step | None:
        """A step on the micro-batches; None, with nothing done, without a graph."""
        if self.step is None:
            return None
        views = list(views)
        self._kinds = kinds(views[0])
        inputs = [(take_apart(view),) for view in views]
        if not self.step.captured:
            self._terms = []
        try:
            loss = self.step(*inputs[0] if len(inputs) == 1 else inputs)
            return Step(loss, self.step.grad_norm, mean(self._terms))
        except GraphCaptureError as error:
            if self.config.graph == "on":
                raise TrainError(f"--graph on: {error}") from error
            say(f"going on without a CUDA graph: {error}")
        self.step.release()
        self.step = None
        return None

    def _cannot(self, reason: str) -> None:
        if self.config.graph == "on":
            raise ConfigError(f"--graph on: the step cannot be a CUDA graph: {reason}")
        self.wanted = False


def take_apart(value: Any) -> Any:
    """A view as what a graphed step takes: each dataclass in it, such as a plan, as the dict of its fields."""
    if is_dataclass(value):
        return {entry.name: take_apart(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, dict):
        return {key: take_apart(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(take_apart(inner) for inner in value)
    return value


def kinds(value: Any) -> Any:
    """What `take_apart` leaves out: the types, without the tensors."""
    if is_dataclass(value):
        return type(value), {entry.name: kinds(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, dict):
        return dict, {key: kinds(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [kinds(inner) for inner in value]
    return None


def put_together(kind: Any, taken: Any) -> Any:
    """The inverse of `take_apart`."""
    if kind is None:
        return taken
    made, inner = kind
    if isinstance(inner, dict):
        values = {name: put_together(inner[name], taken[name]) for name in inner}
        return values if made is dict else made(**values)
    parts = [put_together(*both) for both in zip(inner, taken, strict=True)]
    return made(*parts) if hasattr(made, "_fields") else made(parts)

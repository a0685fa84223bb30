"""`--graph`: whether the steps of a run are one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from maefast.graphs import GraphCaptureError, GraphedStep, graphed_step

from .config import PretrainConfig
from .data import Batch
from .errors import ConfigError, TrainError

if TYPE_CHECKING:
    from accelerate import Accelerator


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
        if self.wanted and (reason := problem(config, accelerator)) is not None:
            self._cannot(reason)

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.wanted:
            try:
                self.step = graphed_step(objective, optimizer, clip=self.config.clip, accumulate=self.config.accum)
            except (TypeError, ValueError) as error:
                self._cannot(str(error))

    def __call__(
        self, batches: list[Batch], say: Callable[[str], None]
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """(loss, norm of the gradient) after a step on the micro-batches; None, with nothing done, without a graph."""
        if self.step is None:
            return None
        inputs = [(batch.images, batch.noise) for batch in batches]
        try:
            return self.step(*inputs[0] if len(inputs) == 1 else inputs), self.step.grad_norm
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

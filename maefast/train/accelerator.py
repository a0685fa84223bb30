"""Processes and devices: Accelerate's object, and what processes tell each other without it."""

from __future__ import annotations

from typing import Any

import torch

from maefast.errors import ConfigError, need

from .config import PretrainConfig

try:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin
except ImportError as error:
    raise need("accelerate", "maefast pretrain") from error


def make_accelerator(config: PretrainConfig) -> Accelerator:
    """The Accelerator for `config`; a second run in one process may use another precision."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.amp:
        AcceleratorState._reset_state()
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    if config.amp == "fp16" and cpu:
        raise ConfigError("--amp fp16 needs a GPU; on a CPU use --amp bf16 or no")
    return Accelerator(
        mixed_precision=config.amp,
        # The plugin, not the plain number, which an environment variable of `accelerate launch` could override.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accum, sync_with_dataloader=False),
        cpu=cpu,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


class Processes:
    """All processes of a run, talking on the host, so that no device is waited for. Alone, it says what it was told."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._group = torch.distributed.new_group(backend="gloo") if world > 1 else None

    def any(self, wish: bool) -> bool:
        """Whether any process has the wish. All must ask."""
        if self._group is None:
            return wish
        flag = torch.tensor([float(wish)])
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def all(self, value: Any) -> list[Any]:
        """The values of all processes, in order of their ranks. All must ask."""
        if self._group is None:
            return [value]
        values = [None] * self.world
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def close(self) -> None:
        if self._group is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(self._group)
            self._group = None

"""Processes and devices: Accelerate's object, and what processes tell each other without it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from maefast.errors import ConfigError, TrainError, need

from .config import PretrainConfig

try:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin
except ImportError as error:
    raise need("accelerate", "maefast pretrain") from error


T = TypeVar("T")

_PATIENCE = timedelta(hours=6)  # of a process with another one that may be indexing large tars


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

    def in_turn(self, make: Callable[[], T], accelerator: Accelerator) -> T:
        """What `make` gives, on the first process before those of its machine's others begin: what it leaves on a disk,
        such as indices of tars, is then made once. TrainError: it failed on an earlier one."""
        if self.world == 1:
            return make()
        turn = 0 if accelerator.is_main_process else 1 if accelerator.is_local_main_process else 2
        made, failed, reasons = None, None, [None] * self.world
        group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        try:
            for now in range(3):
                if now == turn:
                    try:
                        made = make()
                    except Exception as error:
                        failed = error
                mine = None if failed is None else f"{type(failed).__name__}: {failed}"
                torch.distributed.all_gather_object(reasons, mine, group=group)
                if reason := next(filter(None, reasons), None):
                    raise failed or TrainError(f"stopped by another process: {reason}")
        finally:
            torch.distributed.destroy_process_group(group)
        return made

    def close(self) -> None:
        if self._group is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(self._group)
            self._group = None

"""What `graphed_step` refuses before anything runs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def settings(model, optimizer, loss, clip, autocast, generator, accumulate, warmup) -> torch.device:
    """Check the arguments of `graphed_step`; the model's device."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if getattr(optimizer, "scaler", None) is not None:
        raise ValueError(f"optimizer has a GradScaler, which decides on the host whether to step; {BF16}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function that returns a scalar, got {type(loss).__name__}")
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, (int, float)) or not 0 < clip < math.inf):
        raise ValueError(f"clip must be a positive number or None, got {clip!r}")
    for name, value in (("accumulate", accumulate), ("warmup", warmup)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    if autocast is torch.float16:
        raise ValueError(f"autocast to float16 needs a GradScaler, which decides on the host whether to step; {BF16}")
    if autocast not in (None, torch.bfloat16):
        raise ValueError(f"autocast must be torch.bfloat16 or None, got {autocast!r}")
    device = _device(model, optimizer)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if _indexed(generator.device) != _indexed(device):
            raise ValueError(f"generator is on {generator.device} but the model is on {device}")
    _one_process(model)
    hooks(model, optimizer)
    return device


BF16 = "use autocast=torch.bfloat16, which needs none"


def _device(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.device:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [*model.parameters(), *model.buffers(), *parameters]
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) != 1:
        found = ", ".join(devices) or "none"
        raise ValueError(f"model and optimizer must be on one device, got {found}")
    if not {id(p) for p in parameters} & {id(p) for p in model.parameters()}:
        raise ValueError("optimizer holds none of the model's parameters")
    return tensors[0].device


def _indexed(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0


def _one_process(model: nn.Module) -> None:
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if isinstance(module, wrappers) or kinds.intersection(SHARDED):
            raise ValueError(f"the model contains a {type(module).__name__}: a graphed step is one process's alone")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(f"{dist.get_world_size()} processes train together: a graphed step is one process's alone")


def hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse Python that would have to run in every step, after a gradient or around the update."""
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(f"{name} has a post-accumulate-gradient hook, which a graph would not run")
    for kind in ("pre", "post"):
        found: Any = getattr(optimizer, f"_optimizer_step_{kind}_hooks", None)
        if found:
            raise ValueError(f"optimizer has a step {kind}-hook, which a graph would not run")

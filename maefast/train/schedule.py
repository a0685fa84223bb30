"""AdamW as MAE uses it: parameter groups, the batch-size rule for the learning rate, warm-up and half-cosine.

He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022), table 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from maefast.optim import AdamW

BETAS = (0.9, 0.95)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices decay, vectors (norms, biases) and scalars do not.

    A parameter decays when it has two or more dimensions, its name does not end in "bias", and the model does not
    except it (`no_decay`). This is the rule of the papers' code; `cls_token` and `mask_token` ([1, 1, D]) decay there
    in MAE and FCMAE, and do here; SparK excepts its mask tokens. A model may have groups of its own, by a method
    `parameter_groups(weight_decay)`; a group's "lr_scale" multiplies its learning rate.
    """
    if (own := getattr(model, "parameter_groups", None)) is not None:
        return own(weight_decay)
    decay, no_decay = [], []
    exempt = tuple(getattr(model, "no_decay", ()))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            small = parameter.ndim <= 1 or name.endswith(".bias") or name.startswith(exempt)
            (no_decay if small else decay).append(parameter)
    groups = [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module, weight_decay: float, betas: tuple[float, float] = BETAS, state: str = "fp32"
) -> torch.optim.Optimizer:
    """AdamW on `parameter_groups`; the learning rate is set before every step.

    The fused update is used on devices that have it: one kernel instead of several passes per parameter. `state`:
    "fp32", or "bf16" for moments in bfloat16 (`maefast.optim.AdamW`).
    """
    groups = parameter_groups(model, weight_decay)
    if not groups:
        raise ValueError("the model has no trainable parameters")
    if state == "bf16":
        return AdamW(groups, lr=0.0, betas=betas, state_dtype=torch.bfloat16)
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=device in ("cpu", "cuda"))


@dataclass(frozen=True)
class Schedule:
    """The learning rate of step s (0-based) out of `total`:

        s < warmup:  peak * s / warmup
        else:        low + (peak - low) * (1 + cos(pi * (s - warmup) / (total - warmup))) / 2

    This is MAE's per-iteration schedule, so the very first step of a warm-up has learning rate 0.
    """

    peak: float
    total: int
    warmup: int = 0
    low: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * step / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.low + (self.peak - self.low) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def peak_lr(blr: float, effective_batch: int) -> float:
    """`blr * effective_batch / 256`, where effective_batch = batch size x accumulation x processes."""
    return blr * effective_batch / 256


def warmup_steps(warmup: float, total: int) -> int:
    """`warmup` below 1 is a share of the run, from 1 on a number of steps. At most the whole run."""
    steps = round(warmup * total) if warmup < 1 else int(warmup)
    return min(steps, total)

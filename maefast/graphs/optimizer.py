"""What a graph needs of an optimiser: learning rates and step counts on the device, and settings that stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CapturedOptimizer:
    """Makes `optimizer` ready to be captured, and writes its learning rates to the device.

    `capturable` is switched on and "lr" of each group becomes a float32 tensor, which torch's schedules fill in place.
    A number that is written into a group instead is copied into that tensor before the next step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer, self.device = optimizer, device
        self.rates: list[Tensor] = []
        for i, group in enumerate(optimizer.param_groups):
            if "capturable" not in group and not (isinstance(optimizer, torch.optim.SGD) and group.get("fused")):
                raise TypeError(
                    f"{type(optimizer).__name__} (group {i}) has no `capturable` and cannot be part of a graph; use"
                    " torch.optim.AdamW(..., fused=True) or another one that has it"
                )

    def prepare(self) -> None:
        """Before every step: what schedules and `load_state_dict` have put into the groups goes to the device."""
        groups = self.optimizer.param_groups
        while len(self.rates) < len(groups):
            self.rates.append(torch.zeros((), dtype=torch.float32, device=self.device))
        for group, rate in zip(groups, self.rates):
            if group["lr"] is not rate:
                _write(rate, group["lr"])
                group["lr"] = rate

    def make_capturable(self) -> None:
        """Step counts go to the device, and the optimiser is told that they are there."""
        self.optimizer._warned_capturable_if_run_uncaptured = True  # so it is in the first steps, on purpose
        for group in self.optimizer.param_groups:
            if "capturable" not in group:
                continue
            group["capturable"] = True
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                count = state.get("step")
                if isinstance(count, Tensor) and count.device != parameter.device:
                    state["step"] = count.to(parameter.device, torch.float32)

    def release(self) -> None:
        """Learning rates become numbers again (reads them from the device)."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            if group["lr"] is rate:
                group["lr"] = float(rate)

    def constants(self) -> list[dict[str, Any]]:
        """Of each group, what a graph holds as it was when captured."""
        groups = self.optimizer.param_groups
        return [
            {**{k: v for k, v in group.items() if k not in ("params", "lr")}, "parameters": len(group["params"])}
            for group in groups
        ]


def _write(rate: Tensor, value: float | Tensor) -> None:
    if isinstance(value, Tensor) and value.device == rate.device:
        rate.copy_(value)
    else:
        rate.fill_(float(value))  # a kernel's argument: no copy from the host, nothing to wait for


def changed(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str | None:
    """The first difference between two lists of `constants`, in words."""
    if len(before) != len(now):
        return f"{len(before)} groups of parameters, now {len(now)}"
    for i, (old, new) in enumerate(zip(before, now)):
        for key, value in old.items():
            other = new.get(key)
            if value is not other and value != other:
                return f"{key} of group {i} was {value!r}, now {other!r}"
    return None

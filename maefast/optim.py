"""`AdamW`: torch's, with the same checkpoints, in one pass that can also write 16-bit copies of the weights.

`shadow_of` is how layers find such a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from maefast.ops._narrow import update_narrow
from maefast.ops._shadow import SHADOW_DTYPES, Shadow, shadow_of, shadows_in_graph
from maefast.ops.adamw import update

__all__ = ["AdamW", "shadow_of", "shadows_in_graph"]

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) as ``torch.optim.AdamW(fused=True)`` computes it, up to rounding.

    The state has the same names and shapes, so a state dict of one loads into the other and training goes on. Nothing
    is read by the host on CUDA, so a step can be captured in a CUDA graph, with `lr` as a tensor on the device where it
    is to change. Takes `grad_scale` and `found_inf` from `torch.amp.GradScaler` as torch's fused form does, leaving
    gradients unscaled. A gradient may have another floating dtype than its parameter (`Tensor.grad_dtype`). The moments
    of 16-bit parameters are 16-bit, as in torch. Of parameters in shards (FSDP2's DTensor) each process updates its
    own part.

    Args:
        params: tensors, or groups as dictionaries; floating, dense, in no group twice.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch; one-element tensors where torch takes them.
        foreach, differentiable: may not be True. capturable, fused: no effect, every step is both.
        shadow: torch.bfloat16 or torch.float16: each step also writes a copy of every float32 or float64 `nn.Parameter`
            in this dtype, 2 bytes more of memory each, that layers read in the place of a cast under autocast
            (`shadow_of`). `nn.Parameter.data` and other optimizers are watched from then on, in the whole process, so
            that a weight that is changed by them loses its copy until the next step. Parameters in shards have none.
        state_dtype: torch.bfloat16: the moments of float32 parameters are stored in it, 4 bytes a parameter instead of
            8. They are computed in float32 and rounded at random without a bias, see
            `maefast.ops._narrow.round_at_random`; a step is the same each time it is taken. Moments of another dtype in
            a state dict are rounded once.

    Raises:
        ValueError: a number out of range, an option that is not served, a parameter twice.
        TypeError: a parameter that is complex or a tensor subclass other than DTensor.
        RuntimeError: in `step`, where a gradient is sparse.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves the division by its scale to `step`
    _counts_writes = True  # autograd's versions rise with each step, which torch's fused optimizers leave out

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        shadow: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if foreach:
            raise ValueError("foreach=True is torch.optim.AdamW's: here one kernel takes all tensors")
        if fused is False:
            raise ValueError("fused=False is torch.optim.AdamW's: here every step is fused")
        if differentiable:
            raise ValueError("differentiable=True is not served: use torch.optim.AdamW")
        if shadow is not None and shadow not in SHADOW_DTYPES:
            raise ValueError(f"shadow must be torch.bfloat16, torch.float16 or None, got {shadow!r}")
        if state_dtype not in (torch.bfloat16, None):
            raise ValueError(f"state_dtype must be torch.bfloat16 or None, got {state_dtype!r}")
        _check_betas(betas)
        self.shadow, self.state_dtype = shadow, state_dtype
        self._shadows: dict[Tensor, Shadow] = {}
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": None,
            "capturable": capturable,
            "differentiable": False,
            "fused": True,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's does; a group's own options are checked as those of the constructor."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "shadow": self.shadow, "state_dtype": self.state_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in ("shadow", "state_dtype"):
            self.__dict__.setdefault(name, None)
        if "_shadows" not in self.__dict__:  # a copy of an optimizer, or one from a file: its parameters are others
            self._shadows = {}
        for group in self.param_groups:
            for name, value in (("amsgrad", False), ("maximize", False), ("capturable", False)):
                group.setdefault(name, value)
            # Written by another form of torch's AdamW, perhaps; the state is the same.
            group.update(foreach=None, differentiable=False, fused=True, decoupled_weight_decay=True)
            for param in group["params"]:
                slots = self.state.get(param)
                if slots:
                    step = torch.as_tensor(slots["step"], dtype=torch.float32)
                    slots["step"] = step.detach().reshape(()).to(param.device)
                    if self._is_narrow(param):  # torch gives moments the parameter's dtype when it loads them
                        slots.update({name: slots[name].to(self.state_dtype) for name in MOMENTS if name in slots})

    @torch._disable_dynamo  # as torch.optim marks what it does not trace; torch.compiler.disable imports dynamo with us
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. `closure` computes the loss again, with gradients, and its value
        is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaling = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        for group in self.param_groups:
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "maximize")} | scaling
            for narrow, lists in self._gather(group):
                params, shadows = lists[0], lists[6]
                copies = [shadow.copy for shadow in shadows]
                if narrow:
                    update_narrow((*lists[:6], copies), options)
                else:
                    update(*lists[:5], max_exp_avg_sqs=lists[5], shadows=copies, **options)
                for param, shadow in zip(params, shadows):
                    shadow.record(param)
        return loss

    @torch.no_grad()
    def refresh_shadows(self, *, every: bool = False) -> None:
        """Write the copies of weights that have changed since; the host waits for nothing. Call it before each replay
        of a CUDA graph that reads copies (`shadows_in_graph`). `every`: also the copies that look valid, after a change
        that nothing has seen."""
        for param, shadow in self._shadows.items():
            if (every or not shadow.is_valid()) and shadow.fits(param):
                shadow.copy.copy_(param)
                shadow.record(param)

    def _is_narrow(self, param: Tensor) -> bool:
        """Whether its moments are stored in `state_dtype`."""
        return self.state_dtype is not None and param.dtype is torch.float32

    def _gather(self, group: dict[str, Any]) -> list[tuple[bool, tuple[list, ...]]]:
        """Whether moments are narrow, and lists of params, grads, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs and
        shadows, for each device; parameters with and without a shadow apart."""
        found: dict[tuple, tuple[list, ...]] = {}
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError("AdamW does not support sparse gradients; torch.optim.SparseAdam does")
            slots, narrow = self.state[param], self._is_narrow(param)
            dtype = self.state_dtype if narrow else param.dtype
            if not slots:
                _start(param, slots, group["amsgrad"], dtype)
            average = slots["exp_avg"]
            if average.device != param.device or average.dtype is not dtype or average.shape != param.shape:
                raise ValueError(
                    f"a parameter is {param.dtype} {tuple(param.shape)} on {param.device}, but its state was made for"
                    f" {average.dtype} {tuple(average.shape)} on {average.device}: move or cast the model before the"
                    " optimizer's first step"
                )
            shadow = self._shadow(param)
            lists = found.setdefault((param.device, narrow, shadow is None), tuple([] for _ in range(7)))
            mine = (param, grad, average, slots["exp_avg_sq"], slots["step"])
            for tensors, entry in zip(lists, _local(mine) if _is_sharded(param) else mine):
                tensors.append(entry)
            if group["amsgrad"]:
                lists[5].append(_local([slots["max_exp_avg_sq"]])[0])
            if shadow is not None:
                lists[6].append(shadow)
        return [(narrow, lists) for (_, narrow, _), lists in found.items()]

    def _shadow(self, param: Tensor) -> Shadow | None:
        if self.shadow is None or param.dtype in SHADOW_DTYPES or not isinstance(param, nn.Parameter):
            return None
        if _is_sharded(param):
            return None
        shadow = self._shadows.get(param)
        if shadow is not None and shadow.fits(param):
            return shadow
        self._shadows[param] = shadow = Shadow(param, self.shadow)
        return shadow


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")  # a DTensor, whose module takes long to import


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of them."""
    placements = {tensor.placements for tensor in tensors if _is_sharded(tensor)}
    if len(placements) > 1:
        raise ValueError(f"a parameter, its gradient and its state lie in different shards: {placements}")
    return [tensor.to_local() if _is_sharded(tensor) else tensor for tensor in tensors]


def _start(param: Tensor, slots: dict[str, Tensor], amsgrad: bool, dtype: torch.dtype) -> None:
    if param.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a parameter's first step cannot be captured, each replay would begin anew: take one before")
    slots["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])):
        slots[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{name} must be a number, or one in a tensor, got {type(value).__name__}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must hold one number, got shape {tuple(value.shape)}")
    return float(value)


def _check_betas(betas: Any) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    for index, beta in enumerate(betas):
        if not 0 <= _number(f"betas[{index}]", beta) < 1:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")


def _check_group(group: dict[str, Any]) -> None:
    for name, text in (("lr", "learning rate"), ("eps", "epsilon value"), ("weight_decay", "weight_decay value")):
        if not _number(name, group[name]) >= 0:
            raise ValueError(f"Invalid {text}: {group[name]}")
    _check_betas(group["betas"])
    params = group["params"]
    if len({id(param) for param in params}) < len(params):
        raise ValueError("a parameter is in its group twice")
    for param in params:
        if param.dtype not in FLOATING:
            raise TypeError(f"AdamW takes float32, float64, float16 and bfloat16 parameters, not {param.dtype}")
        plain = _is_sharded(param) or not torch.utils._python_dispatch.is_traceable_wrapper_subclass(param)
        if param.layout is not torch.strided or not plain:
            raise TypeError(f"AdamW takes plain dense tensors, not {type(param).__name__}: use torch.optim.AdamW")

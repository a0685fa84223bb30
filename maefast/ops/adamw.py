"""AdamW over many tensors in one pass: `adamw`, the step of `maefast.optim.AdamW`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maefast.ops import _checks, _dispatch, _registry
from maefast.ops._shadow import SHADOW_DTYPES

_raw_op = _registry.family("adamw")

HALVES = (torch.bfloat16, torch.float16)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    max_exp_avg_sqs: Sequence[Tensor] = (),
    shadows: Sequence[Tensor] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019), in place, as ``torch.optim.AdamW(fused=True)`` takes it; with
    the AMSGrad maximum (Reddi et al., 2018) where `max_exp_avg_sqs` is given. For step t (1, 2, …) and gradient g:

        p = p * (1 - lr * weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    16-bit parameters and gradients are computed in float32, each result is rounded once; bias corrections are float64.

    Args:
        params: of any shapes and floating dtypes, all on one device. They must not overlap in memory.
        grads: like `params`; a gradient may have another floating dtype.
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs: m, v and the largest v so far, in the parameter's dtype. Without the
            last: no AMSGrad.
        steps: float32, one number each: steps taken so far; counted up.
        lr: a number, or one number in a tensor; on the parameters' device it is not read by the host.
        shadows: bfloat16 or float16, like `params`, which must be float32 or float64 then: get the new values, rounded.
        grad_scale: one number that the gradients are divided by first, and are left divided (`torch.amp.GradScaler`).
        found_inf: one number; unless it is 0 nothing changes, and only `shadows` are written.

    Raises:
        TypeError, ValueError: lists, shapes, dtypes or devices do not fit.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    lists |= {"max_exp_avg_sqs": max_exp_avg_sqs, "shadows": shadows}
    _check_lists(lists)
    _check_numbers(lr, betas, eps, weight_decay, grad_scale, found_inf)
    _checks.flag("maximize", maximize)
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
    options |= {"grad_scale": grad_scale, "found_inf": found_inf, "backend": backend}
    update(**{name: list(tensors) for name, tensors in lists.items()}, **options)


def _check_lists(lists: dict[str, Sequence[Tensor]]) -> None:
    for name, tensors in lists.items():
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
        if len(tensors) != len(lists["params"]) and (tensors or name not in ("max_exp_avg_sqs", "shadows")):
            raise ValueError(f"{name} must hold {len(lists['params'])} tensors, as params does, got {len(tensors)}")
        for i, (tensor, param) in enumerate(zip(tensors, lists["params"])):
            _checks.tensor(f"{name}[{i}]", tensor)
            _checks.same_device(**{"params[0]": lists["params"][0], f"{name}[{i}]": tensor})
            if name == "steps":
                if tensor.dtype is not torch.float32 or tensor.numel() != 1:
                    raise ValueError(f"steps[{i}] must be one float32 number, got {tensor.dtype} {tuple(tensor.shape)}")
                continue
            if tensor.shape != param.shape:
                raise ValueError(f"{name}[{i}] must have shape {tuple(param.shape)}, got {tuple(tensor.shape)}")
            if name.startswith(("exp", "max")) and tensor.dtype is not param.dtype:
                raise TypeError(f"{name}[{i}] must be {param.dtype}, as its parameter is, got {tensor.dtype}")
            if name == "shadows" and (tensor.dtype not in SHADOW_DTYPES or param.dtype in HALVES):
                raise TypeError(f"{name}[{i}] must have 16 bits, and its parameter more: got {tensor.dtype}")


def _check_numbers(lr, betas, eps, weight_decay, grad_scale, found_inf) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    numbers = {"betas[0]": betas[0], "betas[1]": betas[1], "eps": eps, "weight_decay": weight_decay}
    for name, value in numbers.items():
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not value >= 0 or (name.startswith("betas") and not value < 1):
            raise ValueError(
                f"{name} must {'lie in [0, 1)' if name.startswith('betas') else 'be 0 or more'}, got {value}"
            )
    for name, value in (("lr", lr), ("grad_scale", grad_scale), ("found_inf", found_inf)):
        if name == "lr" and isinstance(value, (int, float)):
            if not value >= 0:
                raise ValueError(f"lr must be 0 or more, got {value}")
        elif value is not None or name == "lr":
            _checks.tensor(name, value)
            if value.numel() != 1:
                raise ValueError(f"{name} must hold one number, got shape {tuple(value.shape)}")


@torch.no_grad()
def update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    max_exp_avg_sqs: list[Tensor],
    shadows: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str | None = None,
) -> None:
    """`adamw` without its checks, for the optimizer, which checks a parameter once."""
    if not params:
        return
    device = params[0].device
    lr = _lr_on(device, lr)
    grad_scale, found_inf = (
        None if t is None else t.reshape(()).to(device=device, dtype=torch.float32, non_blocking=True)
        for t in (grad_scale, found_inf)
    )
    scalars = (float(betas[0]), float(betas[1]), float(eps), float(weight_decay), bool(maximize), grad_scale, found_inf)
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, shadows, steps)
    names = {dtype: _dispatch.choose("adamw", device.type, dtype, backend) for dtype in {p.dtype for p in params}}
    if len(set(names.values())) == 1 and "reference" not in names.values() and _fit(lists):
        return _launch(names[params[0].dtype], lists, lr, scalars)
    rows: dict[str, list[_Row]] = {}
    for row in map(_Row._make, zip(*(tensors or [None] * len(params) for tensors in lists))):
        name = names[row.param.dtype]
        rows.setdefault(name if name == "reference" or _is_dense(row) else "reference", []).append(row)
    for row in rows.pop("reference", []):
        adamw_reference(*row, lr, *scalars)
    for name, members in rows.items():
        made = [_in_memory_order(row) for row in members]
        lists = tuple([t for t in column if t is not None] for column in zip(*made))
        _launch(name, lists, lr, scalars)
        if grad_scale is not None:
            for row, ready in zip(members, made):
                if ready.grad.data_ptr() != row.grad.data_ptr():
                    row.grad.copy_(torch.as_strided(ready.grad, row.param.shape, row.param.stride()))


def _lr_on(device: torch.device, lr: float | Tensor) -> float | Tensor:
    """A number for the host, or a tensor that only `device` reads."""
    if not isinstance(lr, Tensor):
        return float(lr)
    if device.type == "cpu" or lr.device.type == "cpu":
        return float(lr)
    return lr.reshape(()).to(device, non_blocking=True)


class _Row(NamedTuple):
    """A parameter and what belongs to it."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    shadow: Tensor | None
    step: Tensor


def _fit(lists: tuple[list[Tensor], ...]) -> bool:
    """Whether the kernels take all these tensors as they are."""
    for tensors in lists:
        for tensor in tensors:
            if not tensor.is_contiguous():
                return False
    return all(_reads(param.dtype, grad.dtype) for param, grad in zip(lists[0], lists[1]))


def _reads(param: torch.dtype, grad: torch.dtype) -> bool:
    """Whether there is a kernel for these dtypes: the same, or 16 bits beside float32."""
    pair = (param, grad)
    return param is grad or (torch.float32 in pair and torch.float64 not in pair)


def _is_dense(row: _Row) -> bool:
    """Whether parameter, moments and shadow lie in one order in memory, without gaps."""
    param, states = row.param, [t for t in row[2:6] if t is not None]
    if param.is_contiguous():
        return all(t.is_contiguous() for t in states)
    formats = (torch.channels_last,) if param.ndim == 4 else (torch.channels_last_3d,) if param.ndim == 5 else ()
    dense = any(param.is_contiguous(memory_format=form) for form in formats)
    return dense and all(t.stride() == param.stride() for t in states)


def _in_memory_order(row: _Row) -> _Row:
    """The row as contiguous tensors: views, and a copy of a gradient that is laid out otherwise or whose dtype no
    kernel reads."""
    param, grad = row.param, row.grad
    same = grad.is_contiguous() if param.is_contiguous() else grad.stride() == param.stride()
    if not same or not _reads(param.dtype, grad.dtype):
        grad = torch.empty_like(param, dtype=torch.promote_types(param.dtype, torch.float32)).copy_(grad)
    row = row._replace(grad=grad)
    if param.is_contiguous():
        return row
    return _Row(*(t if t is None or t is row.step else t.as_strided((t.numel(),), (1,)) for t in row))


# All in place. Each list has one tensor a parameter; max_exp_avg_sqs and shadows may be empty.
@_raw_op(
    "adamw(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
    " Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] shadows, Tensor(g!)[] steps, Tensor? lr_tensor, float lr,"
    " float beta1, float beta2, float eps, float weight_decay, bool maximize, Tensor? grad_scale, Tensor? found_inf)"
    " -> ()"
)
def _adamw_fake(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, shadows, steps, lr_tensor, lr, beta1, beta2, eps,
    weight_decay, maximize, grad_scale, found_inf,
):  # fmt: skip
    return None


def _launch(name: str, lists: tuple[list[Tensor], ...], lr: float | Tensor, scalars: tuple) -> None:
    number, tensor = (0.0, lr.float()) if isinstance(lr, Tensor) else (lr, None)
    _registry.raw("adamw", name)(*lists, tensor, number, *scalars)
    grads_too = scalars[-2] is not None
    # Autograd does not see what a raw op writes.
    written = [t for i, tensors in enumerate(lists) if i != 1 or grads_too for t in tensors]
    torch.autograd.graph.increment_version(written)


def adamw_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    shadow: Tensor | None,
    step: Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The definition: one tensor, in place, any strides, nothing read by the host."""
    wide = torch.float64 if param.dtype is torch.float64 else torch.float32
    p, g, m, v = (t.to(wide) for t in (param, grad, exp_avg, exp_avg_sq))
    t = step.double() + 1
    if grad_scale is not None:
        g = g / grad_scale
    unscaled = g
    if maximize:
        g = -g
    p = p * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    highest = v if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq.to(wide), v)
    step_size, correction = (lr / (1 - beta1**t)).to(wide), (1 - beta2**t).sqrt().to(wide)
    p = p - step_size * m / (highest.sqrt() / correction + eps)
    new = [(param, p), (exp_avg, m), (exp_avg_sq, v), (step, t)]
    new += [(max_exp_avg_sq, highest)] if max_exp_avg_sq is not None else []
    new += [(grad, unscaled)] if grad_scale is not None else []
    for old, value in new:
        old.copy_(value if found_inf is None else torch.where(found_inf != 0, old.to(value.dtype), value))
    if shadow is not None:
        shadow.copy_(param)

"""adamw: an optimizer step over the parameters of one encoder block, beside torch's forms of AdamW.

On a CPU only, so far: a variant makes moments of its own at its first call, which a CUDA graph could not capture.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import maefast
from maefast.bench.micro.op import Inputs, Op, Peer
from maefast.bench.micro.shapes import Shape
from maefast.optim import AdamW

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.05}


def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    d = shape.width
    sizes = {"norm1": (d,), "qkv": (3 * d, d), "qkv_bias": (3 * d,), "proj": (d, d), "proj_bias": (d,)}
    sizes |= {"norm2": (d,), "up": (4 * d, d), "up_bias": (4 * d,), "down": (d, 4 * d), "down_bias": (d,)}
    made = {n: torch.randn(s, generator=generator, device=generator.device).to(dtype) for n, s in sizes.items()}
    return {**made, "steppers": {}}


class Stepper:
    """Steps its own copies of the inputs, and rounds them to bfloat16 where `shadows` is set and the optimizer does not
    do it. What it returns for comparison is the first step of one small tensor, taken once: every call changes the
    weights, so later ones could not be compared."""

    def __init__(self, make_optimizer, inputs: Inputs, shadows: bool) -> None:
        names = [name for name in inputs if name != "steppers"]
        self.params = [nn.Parameter(inputs[name].clone()) for name in names]
        for param in self.params:
            param.grad = param.detach().flip(0)
        self.optimizer = make_optimizer(self.params)
        self.shadows = [param.detach().to(torch.bfloat16) for param in self.params] if shadows else []
        probe = nn.Parameter(inputs["norm1"].clone())
        probe.grad = probe.detach().flip(0)
        make_optimizer([probe]).step()
        self.first = probe.detach()

    def __call__(self) -> Tensor:
        self.optimizer.step()
        if self.shadows:
            with torch.no_grad():
                torch._foreach_copy_(self.shadows, self.params)
        return self.first


def run(inputs: Inputs, make_optimizer, key, shadows: bool = False) -> Tensor:
    if key not in inputs["steppers"]:
        inputs["steppers"][key] = Stepper(make_optimizer, inputs, shadows)
    return inputs["steppers"][key]()


def _torch(inputs: Inputs, form: str | None = None, shadows: bool = False) -> Tensor:
    options = {} if form is None else {form: True}
    return run(inputs, lambda params: torch.optim.AdamW(params, **OPTIONS, **options), form, shadows)


def ours(inputs: Inputs, backend: str | None, shadow: torch.dtype | None = None) -> Tensor:
    with maefast.backend(backend):
        return run(inputs, lambda params: AdamW(params, **OPTIONS, shadow=shadow), backend or "auto")


def traffic(shape: Shape, item: int) -> tuple[int, int]:
    """Parameter, gradient and two moments read; all but the gradient written."""
    return 7 * item * (12 * shape.width**2 + 13 * shape.width), 0


_forms = {"eager": _torch, "tuned": functools.partial(_torch, form="fused")}
_more = {"foreach": Peer(functools.partial(_torch, form="foreach"))}
_every = {"make": make, "devices": ("cpu",), "traffic": traffic}
OPS = [
    Op("adamw", ("adamw",), **_every, **_forms, ours=ours, more=_more),
    Op(
        "adamw (with bfloat16 copies)",
        ("adamw",),
        **{**_every, "traffic": lambda shape, item: (traffic(shape, item)[0] + traffic(shape, 2)[0] // 7, 0)},
        **{name: functools.partial(form, shadows=True) for name, form in _forms.items()},
        ours=functools.partial(ours, shadow=torch.bfloat16),
        dtypes=(torch.float32,),
    ),
]


def bench_adamw(report):
    report()

"""What the ops' autograd Functions share: `apply` and `once`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

REFUSAL = (
    "maefast's {} has no second derivative: run this step with maefast.backend('reference') or, for an accelerated"
    " model, after maefast.restore(model)"
)


def apply(function: type[torch.autograd.Function], *args):
    """``function.apply(*args)`` where a gradient may be asked for; else its `forward` alone, with None for the context.

    No node is made and nothing is kept then: on small inputs that costs as much as the kernel. Forward-mode tangents
    and torch.func's transforms still go to `function.apply`, which refuses them, rather than be dropped here.
    """
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        if not torch.is_grad_enabled():
            return function.forward(None, *args)
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                break
        else:
            return function.forward(None, *args)
        if not torch.compiler.is_compiling():
            # What Function.apply adds in Python is for functorch, and costs more than a small kernel.
            return super(torch.autograd.Function, function).apply(*args)
    return function.apply(*args)


def once(name: str) -> Callable[[Callable], Callable]:
    """For the backward of op `name`, whose kernels have no derivative: it runs without grad mode, and what it returns
    can be used as numbers, but differentiating it raises RuntimeError.

    torch's `once_differentiable` raises only where the incoming gradient requires grad, and drops in silence what the
    gradient owes to the saved tensors; its message names neither the op nor a way out. For this one to find those
    terms, a tensor saved for them must be an input or an output of the Function itself, not a copy made inside.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapper(ctx, *grads):
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            if torch.compiler.is_compiling():  # compiled graphs refuse a second derivative themselves
                with torch.no_grad():
                    return backward(ctx, *grads)
            return _refusing(name, backward, ctx, grads)

        return wrapper

    return decorate


def _refusing(name: str, backward: Callable, ctx, grads: tuple) -> tuple[Tensor | None, ...]:
    """The gradients, each with a grad_fn that raises. It is tied to every tensor that they depend on, so that it lies
    on the way to whatever a second differentiation asks for: the engine skips a node that leads nowhere else."""
    ctx = _Context(ctx)
    with torch.no_grad():
        found = backward(ctx, *grads)
    sources = [t for t in (*grads, *ctx.read) if t is not None and t.requires_grad]
    leaves = [t if t is None else t.detach().requires_grad_() for t in found]
    refuse = torch._C._functions.DelayedError(REFUSAL.format(name).encode(), len(leaves) + len(sources))
    return refuse(*leaves, *sources)[: len(leaves)]


class _Context:
    """A Function's context that notes the saved tensors as they are read: reading them twice is an error under
    activation checkpointing."""

    def __init__(self, ctx) -> None:
        self._ctx, self.read = ctx, ()

    def __getattr__(self, name: str):
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        self.read = self._ctx.saved_tensors
        return self.read

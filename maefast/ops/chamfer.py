"""Distance of two point sets: `chamfer`, for many small groups or a few whole clouds."""

from __future__ import annotations

import torch
from torch import Tensor

from maefast.ops import _autograd, _checks, _dispatch, _registry
from maefast.ops.points import check_cloud, check_pair, squared_distance

_raw_op = _registry.family("chamfer")
REDUCTIONS = ("mean", "sum", "none")
TRITON_PAIRS = 8192  # of a group, each side padded to a power of two: the kernel holds all its distances


def chamfer(a: Tensor, b: Tensor, *, reduction: str = "mean", backend: str | None = None) -> Tensor:
    """Chamfer distance of each pair of sets (Fan et al., 2017; "CD_L2" of Point-MAE, Pang et al., 2022):

        mean_i min_j |a_i - b_j|^2 + mean_j min_i |a_i - b_j|^2

    Of equally near points the one of lowest index counts, also for the gradient. The C++ kernels need memory linear in
    n + m, the Triton kernels none; sets too large for those run on the definition, which makes all n x m distances.

    Args:
        a: [G, n, D]. b: [G, m, D]. 1 to 16 coordinates; finite. 16-bit input is computed in float32.
        reduction: over the groups; "none" gives [G].

    Returns:
        A scalar or [G], in float32 (float64 for float64). Gradients to a and b are deterministic.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or a set is empty.
    """
    check_cloud("a", a)
    check_cloud("b", b)
    check_pair("a", a, "b", b)
    _checks.one_of("reduction", reduction, REDUCTIONS)
    wide = torch.float64 if a.dtype is torch.float64 else torch.float32
    a, b = a.to(wide), b.to(wide)
    name = _dispatch.choose("chamfer", a.device.type, wide, backend, _padded(a.shape[1], b.shape[1]) <= TRITON_PAIRS)
    if name == "reference":
        to_b, to_a = chamfer_reference(a, b)
    else:
        to_b, to_a = _autograd.apply(_Chamfer, a.contiguous(), b.contiguous(), name)
    each = to_b.mean(1) + to_a.mean(1)
    return each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()


def _padded(n: int, m: int) -> int:
    return (1 << (n - 1).bit_length()) * (1 << (m - 1).bit_length())


def chamfer_reference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, differentiable: squared distance of each point to the other set, [G, n] and [G, m]."""
    distance = squared_distance(a[:, :, None], b[:, None])
    # `min` does not say which of equal ones gets the gradient; `argmin` gives the first.
    nearest = [distance.detach().argmin(dim, keepdim=True) for dim in (2, 1)]
    return tuple(distance.gather(dim, at).squeeze(dim) for dim, at in zip((2, 1), nearest))


# Squared distances [G, n] and [G, m] to the other set, and which point of it is nearest, int32.
@_raw_op("chamfer(Tensor a, Tensor b) -> (Tensor, Tensor, Tensor, Tensor)")
def _chamfer_fake(a, b):
    sides = a.shape[:2], b.shape[:2]
    return *(a.new_empty(shape) for shape in sides), *(a.new_empty(shape, dtype=torch.int32) for shape in sides)


@_raw_op(
    "chamfer_backward(Tensor grad_to_b, Tensor grad_to_a, Tensor a, Tensor b, Tensor at_b, Tensor at_a)"
    " -> (Tensor, Tensor)"
)
def _chamfer_backward_fake(grad_to_b, grad_to_a, a, b, at_b, at_a):
    return a.new_empty(a.shape), b.new_empty(b.shape)


class _Chamfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, name):
        to_b, to_a, at_b, at_a = _registry.raw("chamfer", name)(a, b)
        if ctx is not None:
            ctx.save_for_backward(a, b, at_b, at_a)
            ctx.backend = name
        return to_b, to_a

    @staticmethod
    @_autograd.once("chamfer")
    def backward(ctx, grad_to_b, grad_to_a):
        run = _registry.raw("chamfer_backward", ctx.backend)
        grad_a, grad_b = run(grad_to_b.contiguous(), grad_to_a.contiguous(), *ctx.saved_tensors)
        need_a, need_b, _ = ctx.needs_input_grad
        return grad_a if need_a else None, grad_b if need_b else None, None

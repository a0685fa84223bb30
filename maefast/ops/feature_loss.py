"""Distance of predicted features to those of a teacher: `feature_loss`. No normalised or gathered target is written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _autograd, _checks, _dispatch, _registry

_raw_op = _registry.family("feature_loss")

NORMS = {"none": 0, "layernorm": 1, "l2": 2}
KINDS = {"mse": 0, "l1": 1, "smooth_l1": 2, "cosine": 3}
REDUCTIONS = ("mean", "sum", "none")
TRITON_WIDTH = 16384  # the kernel holds a row of pred and one of target in registers


def feature_loss(
    pred: Tensor,
    target: Tensor,
    *,
    index: Tensor | None = None,
    norm: str = "none",
    loss: str = "mse",
    beta: float = 1.0,
    power: float = 1.0,
    eps: float | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Distance between rows of predicted features and of a target's.

    Normalisation, `norm`:

    - "none"
    - "layernorm": the target's row only, (t - mean) / sqrt(biased_var + eps), eps 1e-6 (G2SD, Huang et al., 2023;
      MaskAlign, Xue et al., 2023)
    - "l2": both rows, x / max(|x|, eps), eps 1e-12, as `torch.nn.functional.normalize` (DMAE, Bai et al., 2023)

    The loss of a row is the mean over its D values of the squared ("mse") or absolute ("l1") difference or of torch's
    smooth L1 ("smooth_l1"); or, with "cosine", (1 - cos)**power (GraphMAE's scaled cosine error, Hou et al., 2022), cos
    being the product of both rows normalised as by "l2". 1 - cos is half the squared distance of these, so that rows
    that nearly agree lose no digits.

    Args:
        pred: [..., D], R rows.
        target: of pred's shape; with `index`, [..., D] of any number of rows. It gets no gradient: where it requires
            grad, it is detached.
        index: int32 or int64, [R] or of pred's shape without D: which row of target (leading dimensions flattened)
            belongs to each row of pred; rows may repeat. On a GPU it is checked without a sync, by an assertion there.
        beta: of "smooth_l1". power: of "cosine", at least 1. eps: None for the norm's own.
        reduction: over the rows; "none" gives [R].

    Returns:
        A scalar or [R] in float32; float64 if pred or target is. Arithmetic has that precision for every input dtype.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit; an index out of range; a norm beside "cosine"; no
            row to average over.
    """
    _checks.tensor("pred", pred)
    _checks.tensor("target", target)
    _checks.same_device(pred=pred, target=target, index=index)
    _checks.one_of("norm", norm, tuple(NORMS))
    _checks.one_of("loss", loss, tuple(KINDS))
    _checks.one_of("reduction", reduction, REDUCTIONS)
    if loss == "cosine" and norm != "none":
        raise ValueError(f"norm must be 'none' with loss='cosine', which normalises both sides itself, got {norm!r}")
    eps = (1e-6 if norm == "layernorm" else 1e-12) if eps is None else eps
    for name, value in (("beta", beta), ("power", power), ("eps", eps)):
        _checks.positive(name, value)
        if not value < float("inf"):
            raise ValueError(f"{name} must be finite, got {value}")
    if power < 1:
        raise ValueError(f"power must be at least 1 (below, the gradient has no bound), got {power}")
    if pred.ndim < 1 or target.ndim < 1 or pred.shape[-1] < 1 or pred.shape[-1] != target.shape[-1]:
        raise ValueError(
            f"pred [..., D] and target [..., D] must agree in D >= 1, got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
    if index is None and pred.shape != target.shape:
        raise ValueError(
            f"target must have pred's shape {tuple(pred.shape)} where no index is given, got {tuple(target.shape)}"
        )
    shape, width = pred.shape[:-1], pred.shape[-1]
    wide = torch.float64 if torch.float64 in (pred.dtype, target.dtype) else torch.float32
    if wide is torch.float64:
        pred, target = pred.double(), target.double()
    pred, target = pred.reshape(-1, width), target.detach().reshape(-1, width)
    if index is not None:
        index = _check_index(index, shape, target.shape[0])
    if reduction == "mean" and pred.shape[0] == 0:
        raise ValueError("pred has no rows, so there is nothing to average the loss over")

    args = NORMS[norm], KINDS[loss], float(beta), float(eps)
    name = _dispatch.choose("feature_loss", pred.device.type, wide, backend, width <= TRITON_WIDTH)
    if name == "reference":
        each = feature_loss_reference(pred, target, index, *args)
    else:
        each = _autograd.apply(_FeatureLoss, pred.contiguous(), target.contiguous(), index, *args, name)
    if loss == "cosine" and power != 1:
        each = each**power
    return each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()


def _check_index(index: Tensor, shape: torch.Size, targets: int) -> Tensor:
    _checks.tensor("index", index, floating=False)
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must be int32 or int64, got {index.dtype}")
    if index.shape != shape and (index.ndim != 1 or index.numel() != shape.numel()):
        raise ValueError(
            f"index must hold one row for each of pred's, shape {tuple(shape)} or flat, got {tuple(index.shape)}"
        )
    if targets > 2**31 - 1:
        raise ValueError(f"target must have at most 2^31 - 1 rows, got {targets}")
    index = index.detach().reshape(-1)
    _checks.holds((index >= 0) & (index < targets), "index is out of range: it must lie in [0, rows of target)")
    return index.to(torch.int32).contiguous()


def feature_loss_reference(
    pred: Tensor, target: Tensor, index: Tensor | None, norm: int, kind: int, beta: float, eps: float
) -> Tensor:
    """The definition, differentiable: the loss of each row, [R] ("cosine" before its power); see `feature_loss`."""
    wide = torch.float64 if torch.float64 in (pred.dtype, target.dtype) else torch.float32
    pred = pred.to(wide)
    target = (target if index is None else target[index.long()]).to(wide)
    if norm == NORMS["layernorm"]:
        target = F.layer_norm(target, target.shape[-1:], eps=eps)
    elif norm == NORMS["l2"] or kind == KINDS["cosine"]:
        below = [x.detach().norm(dim=-1) < eps for x in (pred, target)]
        pred, target = F.normalize(pred, dim=-1, eps=eps), F.normalize(target, dim=-1, eps=eps)
    if kind == KINDS["cosine"]:
        # |u - v|^2 / 2 = 1 - uv for unit vectors; rows shorter than eps are no unit vectors, and 0 is at cosine 0.
        short = [torch.where(low, 1 - x.square().sum(-1), 0) for x, low in zip((pred, target), below)]
        return ((pred - target).square().sum(-1) + short[0] + short[1]) / 2
    if kind == KINDS["mse"]:
        return (pred - target).square().mean(-1)
    if kind == KINDS["l1"]:
        return (pred - target).abs().mean(-1)
    return F.smooth_l1_loss(pred, target, reduction="none", beta=beta).mean(-1)


# The loss of each row and four numbers of it: mean of the target (or 1 - cos), scales of target and pred, and
# whether the norm of pred has a gradient (it is not below eps).
@_raw_op(
    "feature_loss(Tensor pred, Tensor target, Tensor? index, int norm, int kind, float beta, float eps)"
    " -> (Tensor, Tensor)"
)
def _feature_loss_fake(pred, target, index, norm, kind, beta, eps):
    wide = torch.float64 if pred.dtype is torch.float64 else torch.float32
    return pred.new_empty((pred.shape[0],), dtype=wide), pred.new_empty((pred.shape[0], 4), dtype=wide)


@_raw_op(
    "feature_loss_backward(Tensor grad, Tensor pred, Tensor target, Tensor? index, Tensor stats, int norm, int kind,"
    " float beta) -> Tensor"
)
def _feature_loss_backward_fake(grad, pred, target, index, stats, norm, kind, beta):
    return pred.new_empty(pred.shape)


class _FeatureLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, target, index, norm, kind, beta, eps, name):
        each, stats = _registry.raw("feature_loss", name)(pred, target, index, norm, kind, beta, eps)
        if ctx is not None:
            ctx.save_for_backward(pred, target, index, stats)
            ctx.args, ctx.backend = (norm, kind, beta), name
        return each

    @staticmethod
    @_autograd.once("feature_loss")
    def backward(ctx, grad):
        run = _registry.raw("feature_loss_backward", ctx.backend)
        return run(grad.contiguous(), *ctx.saved_tensors, *ctx.args), *(None,) * 7

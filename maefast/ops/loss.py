"""Pixel reconstruction loss on masked patches: `patch_loss`. No target tensor is ever materialised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _autograd, _checks, _dispatch, _registry
from maefast.ops.embed import as_volume, check_plan, patch_grid
from maefast.ops.mask import TokenMask

_raw_op = _registry.family("loss")

# Target normalisations. SparK's is MAE's.
NORMS = {"none": 0, "mae": 1, "spark": 1, "videomae": 2, "layernorm": 3}
KINDS = {"mse": 0, "smooth_l1": 1}
EPS = 1e-6
TRITON_VALUES = 32768  # the largest patch of the Triton kernel: channels and pixels each padded to a power of two


def patch_loss(
    pred: Tensor,
    images: Tensor,
    plan: TokenMask,
    patch_size: int | tuple[int, ...],
    *,
    norm: str = "none",
    loss: str = "mse",
    beta: float = 1.0,
    reduction: str = "mean",
    rows: str = "masked",
    layout: str = "ppc",
    backend: str | None = None,
) -> Tensor:
    """Distance between predicted and true pixels of the masked patches.

    The target of a patch is its K = C * (pt *) ph * pw pixels t, normalised by `norm`:

    - "none": t
    - "mae", "spark": (t - mean) / sqrt(unbiased_var + 1e-6), over all K (He et al., 2021; Tian et al., 2023)
    - "videomae": per channel, (t - mean) / (sqrt(unbiased_var) + 1e-6) (Tong et al., 2022)
    - "layernorm": (t - mean) / sqrt(biased_var + 1e-6), over all K

    The loss of a patch is the mean over its K values of ``(pred - target)**2``, or of torch's smooth L1.

    Args:
        pred: rows="masked": predictions of the masked tokens in plan order, [B, masked, K] or packed [M, K];
            rows="all": of all tokens in place, [B, N, K].
        images: [B, C, H, W] or [B, C, T, H, W]. If it requires grad, the gradient flows through the target too.
        plan: its masked tokens are scored (use ``plan.complement()`` to score the visible ones).
        patch_size: int, (ph, pw), or (pt, ph, pw).
        loss: "mse" or "smooth_l1" (with `beta`).
        reduction: "mean": sum over the batch's masked patches / their count (MAE's; the plain mean of all masked
            values); "sample_mean": mean of each sample's mean, over samples that have masked patches (MultiMAE);
            "sum"; "none": one value a masked patch, [M], in plan order.
        layout: element order of a row, "ppc" = (pt, ph, pw, C), as MAE; "cpp" = (C, pt, ph, pw).

    Returns:
        A scalar (or [M]) in float32; float64 if pred or images is. Arithmetic has that precision for every input
        dtype.

    Raises:
        TypeError, ValueError: shapes or devices do not fit; nothing masked to average over; an unbiased variance
        of one value.
    """
    _checks.tensor("pred", pred, ndim=(2, 3))
    _checks.tensor("images", images, ndim=(4, 5))
    check_plan(plan, pred=pred, images=images)
    _checks.one_of("norm", norm, tuple(NORMS))
    _checks.one_of("loss", loss, tuple(KINDS))
    _checks.one_of("reduction", reduction, ("mean", "sample_mean", "sum", "none"))
    _checks.one_of("rows", rows, ("masked", "all"))
    _checks.one_of("layout", layout, ("ppc", "cpp"))
    _checks.number("beta", beta)
    if loss == "smooth_l1" and not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    patch_size = (patch_size,) * 2 if isinstance(patch_size, _checks.INT) else patch_size
    if not isinstance(patch_size, (tuple, list)):
        raise TypeError(f"patch_size must be an int or a tuple of ints, got {type(patch_size).__name__}")
    for size in patch_size:
        _checks.integer("patch_size", size, 1)
    patch, grid = patch_grid(images, tuple(patch_size))
    if (plan.batch, plan.num_tokens) != (images.shape[0], grid[0] * grid[1] * grid[2]):
        raise ValueError(f"images of shape {tuple(images.shape)} in patches of {patch_size} do not fit {plan}")
    pixels = patch[0] * patch[1] * patch[2]
    values = pixels * images.shape[1]
    packed = rows == "masked"
    _check_pred(pred, plan, packed, values)
    if (norm in ("mae", "spark") and values < 2) or (norm == "videomae" and pixels < 2):
        raise ValueError(f"norm={norm!r} divides by an unbiased variance, which one value a patch does not have")
    if reduction in ("mean", "sample_mean") and plan.total_masked == 0:
        raise ValueError("the plan masks no token, so there is nothing to average the loss over")

    pred = pred.reshape(-1, values)
    args = (patch, packed, layout == "cpp", NORMS[norm], KINDS[loss], float(beta))
    dtype = torch.float64 if torch.float64 in (pred.dtype, images.dtype) else pred.dtype
    name = _dispatch.choose(
        "patch_loss", pred.device.type, dtype, backend, _padded(images.shape[1], pixels) <= TRITON_VALUES
    )
    if name == "reference":
        each = patch_loss_reference(pred, as_volume(images), plan.masked, *args)
    else:
        each = _autograd.apply(
            _PatchLoss, pred.contiguous(), as_volume(images).contiguous(), plan.masked, plan.slot, *args, name
        )
    return _reduce(each, plan, reduction)


def _padded(*sizes: int) -> int:
    """Product of the sizes, each rounded up to a power of two."""
    product = 1
    for size in sizes:
        product *= 1 << (size - 1).bit_length()
    return product


def _check_pred(pred: Tensor, plan: TokenMask, packed: bool, values: int) -> None:
    count = plan.hide
    if packed:
        fits = pred.ndim == 2 and pred.shape[0] == plan.total_masked
        fits = fits or (pred.ndim == 3 and count is not None and tuple(pred.shape[:2]) == (plan.batch, count))
    else:
        fits = pred.ndim == 3 and tuple(pred.shape[:2]) == (plan.batch, plan.num_tokens)
    if fits and pred.shape[-1] == values:
        return
    # Written only now: under torch.compile a size in a message would tie the graph to one batch size.
    want = f"[{plan.batch}, {plan.num_tokens}, {values}]"
    if packed:
        want = f"[{plan.total_masked}, {values}]" + (f" or [{plan.batch}, {count}, {values}]" if count else "")
    raise ValueError(f"pred must have shape {want} for this plan and patch size, got {tuple(pred.shape)}")


def _reduce(each: Tensor, plan: TokenMask, reduction: str) -> Tensor:
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    if reduction == "mean" or plan.hide is not None:  # equal counts: the mean of means is the mean
        return each.mean()
    # Packed by sample, so a sample's sum is a difference of positions; index_add on a small vector is exact enough
    # and ordered on a CPU, but not on a GPU: a masked product is.
    sample = torch.div(plan.masked, plan.num_tokens, rounding_mode="floor")
    member = sample[None, :] == torch.arange(plan.batch, device=each.device)[:, None]
    sums = torch.where(member, each, 0).sum(1)
    count = plan.cu_masked.diff()
    return (sums / count.clamp(min=1)).sum() / (count > 0).sum()


def patch_loss_reference(
    pred: Tensor,
    images: Tensor,
    index: Tensor,
    patch: list[int],
    packed: bool,
    channels_first: bool,
    norm: int,
    kind: int,
    beta: float,
) -> Tensor:
    """The definition, differentiable: the loss of each patch, [M]; see `patch_loss`."""
    wide = torch.float64 if torch.float64 in (pred.dtype, images.dtype) else torch.float32
    target = patch_targets(images.to(wide), patch)[index.long()]  # [M, pixels, C]
    if norm == NORMS["mae"]:
        var = target.var((1, 2), keepdim=True)
        target = (target - target.mean((1, 2), keepdim=True)) / (var + EPS).sqrt()
    elif norm == NORMS["videomae"]:
        std = target.std(1, keepdim=True)  # not the root of `var`, whose slope at 0 is infinite: that of std is 0
        target = (target - target.mean(1, keepdim=True)) / (std + EPS)
    elif norm == NORMS["layernorm"]:
        var = target.var((1, 2), keepdim=True, correction=0)
        target = (target - target.mean((1, 2), keepdim=True)) / (var + EPS).sqrt()
    target = (target.transpose(1, 2) if channels_first else target).flatten(1)
    pred = (pred if packed else pred[index.long()]).to(wide)
    if kind == KINDS["mse"]:
        return ((pred - target) ** 2).mean(1)
    return F.smooth_l1_loss(pred, target, reduction="none", beta=beta).mean(1)


def patch_targets(images: Tensor, patch: list[int]) -> Tensor:
    """Pixels of every patch, [B*N, pt*ph*pw, C], of images [B, C, T, H, W]."""
    batch, channels, *sizes = images.shape
    (pt, ph, pw), (gt, gh, gw) = patch, [size // p for size, p in zip(sizes, patch)]
    blocks = images.reshape(batch, channels, gt, pt, gh, ph, gw, pw).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return blocks.reshape(batch * gt * gh * gw, pt * ph * pw, channels)


@_raw_op(
    "patch_loss(Tensor pred, Tensor images, Tensor index, SymInt[] patch, bool packed, bool channels_first,"
    " int norm, int kind, float beta) -> (Tensor, Tensor)"
)
def _patch_loss_fake(pred, images, index, patch, packed, channels_first, norm, kind, beta):
    wide = torch.float64 if torch.float64 in (pred.dtype, images.dtype) else torch.float32
    groups = images.shape[1] if norm == 2 else 1
    return (
        pred.new_empty((index.shape[0],), dtype=wide),
        pred.new_empty((index.shape[0], groups, 2), dtype=wide),
    )


@_raw_op(
    "patch_loss_backward(Tensor grad, Tensor pred, Tensor images, Tensor index, Tensor slot, Tensor stats,"
    " SymInt[] patch, bool packed, bool channels_first, int norm, int kind, float beta, bool need_images)"
    " -> (Tensor, Tensor)"
)
def _patch_loss_backward_fake(
    grad, pred, images, index, slot, stats, patch, packed, channels_first, norm, kind, beta, need_images
):
    return (
        pred.new_empty(pred.shape),
        images.new_empty(images.shape if need_images else (0,)),
    )


class _PatchLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, images, index, slot, patch, packed, channels_first, norm, kind, beta, name):
        args = (patch, packed, channels_first, norm, kind, beta)
        each, stats = _registry.raw("patch_loss", name)(pred, images, index, *args)
        if ctx is not None:
            ctx.save_for_backward(pred, images, index, slot, stats)
            ctx.args, ctx.backend = args, name
        return each

    @staticmethod
    @_autograd.once("patch_loss")
    def backward(ctx, grad):
        run = _registry.raw("patch_loss_backward", ctx.backend)
        need_pred, need_images = ctx.needs_input_grad[:2]
        grad_pred, grad_images = run(grad.contiguous(), *ctx.saved_tensors, *ctx.args, need_images)
        return grad_pred if need_pred else None, grad_images if need_images else None, *(None,) * 9

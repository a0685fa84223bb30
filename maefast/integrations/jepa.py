"""I-JEPA and V-JEPA of facebookresearch (Assran et al., 2023; Bardes et al., 2024), in two or three dimensions.

Replaced are `forward` of the encoder (where masks are given, only kept patches are embedded) and of the predictor
(positions gathered without a copy of the table for each sample, context and mask tokens put together in one pass, last
block on the predicted tokens only). `MultiMaskWrapper` and `PredictorMultiMaskWrapper` call these. The training loops
gather their targets themselves: `apply_masks` takes the place of theirs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import ops
from maefast.integrations import _layers as layers
from maefast.integrations import _swap
from maefast.integrations._steps import Options, Step, given
from maefast.integrations.transformer import run_blocks, run_tail
from maefast.ops import TokenMask, _checks

NAME = "JEPA"
# Arguments of the two kinds of predictors, and what the report says of them.
IMAGE, VIDEO = ["x", "masks_x", "masks"], ["ctxt", "tgt", "masks_ctxt", "masks_tgt", "mask_index"]
PREDICTOR = "positions gathered without copies, last block on the predicted tokens only"
# What our methods read at every call, see `Step.live`.
ENCODES = frozenset(("patch_embed.proj", "pos_embed", "blocks", "norm", "out_layers", "use_activation_checkpointing"))
PREDICTS = frozenset(f"predictor_{name}" for name in ("embed", "pos_embed", "blocks", "norm", "proj"))
PREDICTS |= {"mask_token", "mask_tokens", "use_activation_checkpointing"}


def recognise(module: nn.Module) -> bool:
    return _is_encoder(module) or _is_predictor(module)


def _is_encoder(module: nn.Module) -> bool:
    return (
        isinstance(getattr(getattr(module, "patch_embed", None), "proj", None), nn.Module)
        and isinstance(getattr(module, "pos_embed", None), Tensor)
        and all(isinstance(getattr(module, name, None), nn.Module) for name in ("blocks", "norm"))
        and hasattr(type(module), "interpolate_pos_encoding")
        and not hasattr(module, "cls_token")
        and _arguments(module) == ["x", "masks"]
    )


def _is_predictor(module: nn.Module) -> bool:
    parts = ("predictor_embed", "predictor_blocks", "predictor_norm", "predictor_proj")
    return (
        all(isinstance(getattr(module, name, None), nn.Module) for name in parts)
        and isinstance(getattr(module, "predictor_pos_embed", None), Tensor)
        and (hasattr(module, "mask_token") or hasattr(module, "mask_tokens"))
        and _arguments(module) in (IMAGE, VIDEO)
    )


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def steps(model: nn.Module, options: Options, keep: Callable[..., None]) -> Iterator[Step]:
    """What to replace; `keep(method, why)` notes what is not."""
    reason = _swap.overriding(model, "forward")
    if _is_encoder(model):
        reason = reason or layers.strided_patches(model.patch_embed.proj)
        reason = reason or _swap.overriding(model, "interpolate_pos_encoding")
        fast, text = encoder_forward, "kept patches only embedded"
        probe, live = _encoder_probe, ENCODES
    elif _arguments(model) == IMAGE:
        fast, text, probe, live = image_predictor_forward, PREDICTOR, _image_predictor_probe, PREDICTS
    else:
        if getattr(model, "mask_tokens", None) is None:
            reason = reason or "it has no mask tokens and predicts from noisy targets; its blocks are accelerated"
        fast, text, probe, live = video_predictor_forward, PREDICTOR, _video_predictor_probe, PREDICTS
    if reason:
        keep("forward", reason, gain=text)
        return
    yield Step(model, {"forward": fast}, {"forward": text}, lambda: probe(model), live)


# --- probes -------------------------------------------------------------------------------------------------


def _encoder_probe(model: nn.Module) -> list[Tensor]:
    proj, num_tokens = layers.convolution(model.patch_embed.proj), model.pos_embed.shape[1]
    size = getattr(model, "input_size", None) or model.patch_embed.img_size  # V-JEPA, I-JEPA
    frames = [model.num_frames] if isinstance(proj, nn.Conv3d) else []
    like = {"device": proj.weight.device, "dtype": proj.weight.dtype}
    images = given(torch.randn(2, proj.in_channels, *frames, size, size, **like))
    count = max(1, min(num_tokens // 4, 16))
    masks = [_kept(num_tokens, count, proj.weight.device) for _ in range(2)]
    calls = [model(images, masks), model(images, masks[0])]
    if num_tokens <= 256:  # the whole grid of a video would take long
        calls.append(model(images))
    return calls


def _kept(num_tokens: int, count: int, device: torch.device) -> Tensor:
    return torch.rand(2, num_tokens, device=device).argsort(1)[:, :count]


def _image_predictor_probe(model: nn.Module) -> Tensor:
    weight, num_tokens = layers.inner_linear(model.predictor_embed).weight, model.predictor_pos_embed.shape[1]
    count = max(1, min(num_tokens // 4, 8))
    contexts = [_kept(num_tokens, count + 1, weight.device) for _ in range(2)]
    targets = [_kept(num_tokens, count, weight.device) for _ in range(3)]
    x = given(torch.randn(4, count + 1, weight.shape[1], device=weight.device, dtype=weight.dtype))
    return model(x, contexts, targets)


def _video_predictor_probe(model: nn.Module) -> Tensor:
    weight, num_tokens = layers.inner_linear(model.predictor_embed).weight, model.predictor_pos_embed.shape[1]
    count = max(1, min(num_tokens // 4, 8))
    x = given(torch.randn(2, count + 1, weight.shape[1], device=weight.device, dtype=weight.dtype))
    context, target = (_kept(num_tokens, n, weight.device) for n in (count + 1, count))
    return model(x, x[:, :count], context, target, mask_index=1)


# --- masks --------------------------------------------------------------------------------------------------


def apply_masks(x: Tensor, masks: Sequence[Tensor] | Tensor, concat: bool = True) -> Tensor | list[Tensor]:
    """The tokens of x at each mask's positions, as `apply_masks` of I-JEPA and V-JEPA: an exact copy.

    Takes the place of theirs in a training loop, where targets are gathered from the whole grid::

        h = jepa.apply_masks(h, masks_pred)

    All masks are gathered by one copy of rows, without an index for every element. The backward adds up what
    overlapping masks took in a fixed order.

    Args:
        x: [B, N, D], floating. masks: M tensors int64 or int32 [B, K] of positions in [0, N).
        concat: V-JEPA's switch.

    Returns:
        [M * B, K, D], mask by mask; without `concat` a list of M tensors [B, K, D], whose K may differ.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit; a position outside [0, N) (on a GPU a device-side
        assertion, so that there is no sync).
    """
    _checks.tensor("x", x, ndim=3)
    masks = [masks] if isinstance(masks, Tensor) else list(masks)
    batch, num_tokens, width = x.shape
    if not masks:
        raise ValueError("masks is empty")
    for mask in masks:
        _checks.tensor("masks", mask, ndim=2, floating=False)
        if mask.dtype not in (torch.int64, torch.int32) or mask.shape[0] != batch:
            raise ValueError(f"masks must be integer tensors [{batch}, K], got {mask.dtype} {tuple(mask.shape)}")
        _checks.same_device(x=x, masks=mask)
    if concat and len({mask.shape[1] for mask in masks}) > 1:
        raise ValueError("masks keep different numbers of tokens: give concat=False")
    start = torch.arange(batch, device=x.device)[:, None] * num_tokens
    index = torch.cat([mask.flatten() for mask in masks])
    _checks.holds((index >= 0) & (index < num_tokens), f"masks: a position lies outside [0, {num_tokens})")
    rows = F.embedding(torch.cat([(mask + start).flatten() for mask in masks]), x.flatten(0, 1))
    if concat:
        return rows.view(len(masks) * batch, -1, width)
    counts = [batch * mask.shape[1] for mask in masks]
    ends = [sum(counts[: i + 1]) for i in range(len(masks))]
    return [rows[end - n : end].view(batch, -1, width) for n, end in zip(counts, ends)]


def _together(masks: object, batch: int, num_tokens: int, device: torch.device) -> Tensor | None:
    """Masks as one int64 tensor [M, B, K]; None for those that are left to the original, which answers or raises."""
    masks = masks if isinstance(masks, list) else [masks]
    if not masks or not all(isinstance(mask, Tensor) and mask.dtype is torch.int64 for mask in masks):
        return None
    first = masks[0]
    if first.ndim != 2 or first.shape[0] != batch or first.numel() == 0:
        return None
    if any(mask.shape != first.shape or mask.device != device for mask in masks):
        return None
    index = torch.stack(masks)
    inside = (index >= 0) & (index < num_tokens)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        return index if bool(inside.all()) else None
    torch._assert_async(inside.all(), "masks: a position outside the grid")
    return index


# --- encoder ------------------------------------------------------------------------------------------------


def _usual(model: nn.Module, x: object) -> bool:
    """Images of the size that the position table is for; others are interpolated or refused by the original."""
    proj = model.patch_embed.proj
    if layers.hooked(model.patch_embed, proj) or getattr(model, "use_activation_checkpointing", False):
        return False
    if not layers.takes(x, proj, 5 if isinstance(proj, nn.Conv3d) else 4):
        return False
    sizes, patch = tuple(x.shape[2:]), proj.kernel_size
    tokens = 1
    for size, k in zip(sizes, patch):
        tokens *= size // k
    fits = tokens == model.pos_embed.shape[1] and all(size % k == 0 for size, k in zip(sizes, patch))
    if hasattr(model, "input_size"):  # V-JEPA compares sizes, I-JEPA the number of patches
        fits = fits and sizes[-2:] == (model.input_size,) * 2 and (len(sizes) == 2 or sizes[0] == model.num_frames)
    return fits


def encoder_forward(self: nn.Module, x: Tensor, masks: list[Tensor] | Tensor | None = None):
    usual, index = _usual(self, x), None
    if usual and masks is not None:
        index = _together(masks, len(x), self.pos_embed.shape[1], x.device)
        usual = index is not None
    if not usual:
        return _swap.fall_back(self, "forward")(x, masks)
    x = _embed(self, x, index)
    video = hasattr(self, "input_size")
    extra = {"mask": None if index is None else index.flatten(0, 1)} if video else {}
    wanted = getattr(self, "out_layers", None)
    if wanted is None:
        return layers.last_norm(self.norm, *run_blocks(self.blocks, x, **extra))
    outs = []
    for i, block in enumerate(self.blocks):
        x = run_blocks([block], x, **extra).value()
        if i in wanted:
            outs.append(layers.last_norm(self.norm, x))
    return outs


def _embed(model: nn.Module, images: Tensor, index: Tensor | None) -> Tensor:
    """[B, N, D], or [M * B, K, D] at the positions `index` [M, B, K]."""
    proj, pos = model.patch_embed.proj, model.pos_embed
    batch, num_tokens = len(images), pos.shape[1]
    # Positions may repeat, within a mask or between masks, so a plan of them serves forward, but not for a gradient of
    # the images or positions.
    fixed = not torch.is_grad_enabled() or not (images.requires_grad or pos.requires_grad)
    fewer = index is not None and fixed and index.shape[0] * index.shape[2] < num_tokens
    plan = _plan(index, num_tokens) if fewer else None
    x = ops.patch_embed(images, proj.weight, proj.bias, plan, pos=pos)
    if hasattr(model, "input_size"):  # V-JEPA adds positions in place: the dtype of the product stays
        x = x.to(layers.product_dtype(proj.weight))
    if fewer:
        return x.view(batch, index.shape[0], index.shape[2], -1).transpose(0, 1).flatten(0, 1)
    return x if index is None else apply_masks(x, list(index))


def _plan(index: Tensor, num_tokens: int) -> TokenMask:
    """The tokens of all masks, mask by mask in each sample. No permutation, so only what reads `visible` may use it."""
    count, batch, kept = index.shape
    start = torch.arange(batch, device=index.device)[:, None] * num_tokens
    visible = (index.transpose(0, 1).flatten(1) + start).int().flatten()
    cu = torch.arange(batch + 1, dtype=torch.int32, device=index.device) * (count * kept)
    none = visible.new_empty(0)
    return TokenMask(
        batch=batch,
        num_tokens=num_tokens,
        keep=count * kept,
        visible=visible,
        masked=none,
        slot=torch.zeros(batch * num_tokens, dtype=torch.int32, device=index.device),
        cu_visible=cu,
        cu_masked=torch.zeros_like(cu),
        max_visible=count * kept,
        max_masked=0,
    )


# --- predictors ---------------------------------------------------------------------------------------------


def _predict(
    self: nn.Module, x: Tensor, context: object, targets: object, mask_token: Tensor, video: bool
) -> Tensor | None:
    """Predictions [M * E * B, K, D_encoder] for M target masks after E context masks; None: ask the original."""
    embed, table = self.predictor_embed, self.predictor_pos_embed
    num_contexts = len(context) if isinstance(context, list) else 1
    if not isinstance(x, Tensor) or x.ndim != 3 or not num_contexts or not len(x) or len(x) % num_contexts:
        return None
    if getattr(self, "use_activation_checkpointing", False) or not isinstance(embed, nn.Linear):
        return None
    batch, num_tokens = len(x) // num_contexts, table.shape[1]
    context = _together(context, batch, num_tokens, x.device)
    targets = _together(targets, batch, num_tokens, x.device)
    if context is None or targets is None or x.shape[1:] != (context.shape[2], embed.in_features):
        return None
    x = layers.linear(embed, x)
    x = (x + F.embedding(context.flatten(0, 1), table[0])).to(x.dtype)  # in place in the original: the dtype stays
    tokens = (mask_token + F.embedding(targets, table[0])).to(mask_token.dtype)
    shape = (len(targets), num_contexts, batch, -1, x.shape[-1])
    x = x.view(1, *shape[1:]).expand(shape)
    full = torch.cat([x, tokens[:, None].expand(shape)], 3).flatten(0, 2)
    # What V-JEPA hands to its blocks; those that run as they are may look at it.
    extra = {"mask": torch.cat([context[0], targets[0]], 1)} if video else {}
    count = targets.shape[2]
    if not layers.plain_norm(self.predictor_norm):  # it may look at all tokens
        y = layers.norm(self.predictor_norm, *run_blocks(self.predictor_blocks, full, **extra))[1][:, -count:]
    else:
        y = layers.norm(self.predictor_norm, *run_tail(self.predictor_blocks, full, count, **extra))[1]
    return layers.linear(self.predictor_proj, y)


def image_predictor_forward(self: nn.Module, x: Tensor, masks_x: list[Tensor] | Tensor, masks: list[Tensor] | Tensor):
    out = _predict(self, x, masks_x, masks, self.mask_token, video=False)
    return _swap.fall_back(self, "forward")(x, masks_x, masks) if out is None else out


def video_predictor_forward(
    self: nn.Module,
    ctxt: Tensor,
    tgt: Tensor,
    masks_ctxt: list[Tensor] | Tensor,
    masks_tgt: list[Tensor] | Tensor,
    mask_index: int = 1,
):
    out = None
    several = any(isinstance(masks, list) and len(masks) != 1 for masks in (masks_ctxt, masks_tgt))
    if self.mask_tokens is not None and isinstance(mask_index, int) and not several:
        token = self.mask_tokens[mask_index % self.num_mask_tokens]
        out = _predict(self, ctxt, masks_ctxt, masks_tgt, token, video=True)
    if out is None:
        return _swap.fall_back(self, "forward")(ctxt, tgt, masks_ctxt, masks_tgt, mask_index)
    return out

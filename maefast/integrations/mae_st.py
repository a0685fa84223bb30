"""`MaskedAutoencoderViT` of facebookresearch/mae_st (Feichtenhofer et al., 2022): videos, masked at random in space and
time.

Replaced are `forward_encoder` (mask in one kernel, only visible tubelets embedded, with the sum of both position
tables), `forward_decoder` (class token, mask tokens, order and positions in one pass) and `forward_loss` (no target
tensor). `forward` calls them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from maefast import masking, ops
from maefast.integrations import _code, _swap, mae
from maefast.integrations import _layers as layers
from maefast.integrations._steps import Options, Step, given
from maefast.integrations.transformer import run_blocks, run_tail
from maefast.ops import TokenMask

NAME = "MAE-ST"
METHODS = mae.METHODS
SWITCHES = ("norm_pix_loss", "sep_pos_embed", "cls_embed", "pred_t_dim", "t_pred_patch_size", "input_size")
TABLES = ("pos_embed", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class")
# What our methods read at every call, see `Step.live`. `patch_info`: patchify leaves it there, and so do we.
ENCODER = frozenset(("patch_embed.proj", "cls_token", "blocks", "norm", *TABLES))
DECODER = frozenset(f"decoder_{name}" for name in ("embed", "cls_token", "blocks", "norm", "pred", *TABLES))
DECODER |= {"mask_token"}
LOSS = frozenset(("patch_embed.proj", "patch_info"))


def recognise(module: nn.Module) -> bool:
    return (
        all(hasattr(module, name) for name in (*METHODS, *SWITCHES))
        and all(isinstance(getattr(module, name, None), nn.Module) for name in mae.MODULES)
        and isinstance(getattr(module, "mask_token", None), Tensor)
        and isinstance(layers.convolution(getattr(module.patch_embed, "proj", module.norm)), nn.Conv3d)
    )


def steps(model: nn.Module, options: Options, keep: Callable[..., None]) -> Iterator[Step]:
    """What to replace; `keep(method, why)` notes what is not."""
    root = _swap.root_class(type(model), METHODS)
    kept = {name: _swap.overridden(model, name, root) for name in METHODS}
    embeds = layers.strided_patches(model.patch_embed.proj)
    code = getattr(type(model).patchify, "__code__", None)
    notes = code is not None and "patch_info" in _code.look(code).writes
    for name, fast, text, probe, live, reason in (
        (
            "forward_encoder",
            forward_encoder,
            "mask in one kernel, visible tubelets only embedded",
            lambda: model.forward_encoder(_videos(model), 0.75),
            ENCODER,
            embeds or kept["random_masking"],
        ),
        (
            "forward_decoder",
            forward_decoder,
            "mask tokens, order and positions in one pass",
            lambda: model.forward_decoder(*_latent(model)),
            DECODER,
            None,
        ),
        (
            "forward_loss",
            forward_loss,
            "pixels read in place, no target tensor",
            lambda: model.forward_loss(*_prediction(model)),
            LOSS,
            kept["patchify"],
        ),
    ):
        if reason := kept[name] or reason:
            keep(name, reason, gain=text)
        else:
            yield Step(model, {name: fast}, {name: text}, probe, live, settings={"notes": notes})


# --- probes -------------------------------------------------------------------------------------------------


def _videos(model: nn.Module) -> Tensor:
    """Two videos, one of low contrast, where the epsilon of normalised targets shows."""
    proj = layers.convolution(model.patch_embed.proj)
    size = [count * k for count, k in zip(model.input_size, proj.kernel_size)]
    videos = torch.randn(2, proj.in_channels, *size, device=proj.weight.device, dtype=proj.weight.dtype)
    videos[1] *= 1e-3
    return given(videos)


def _latent(model: nn.Module) -> tuple[Tensor, Tensor]:
    like, num_tokens = model.mask_token, math.prod(model.input_size)
    order = torch.rand(2, num_tokens, device=like.device).argsort(1)
    width = layers.inner_linear(model.decoder_embed).weight.shape[1]
    return given(torch.randn(2, max(1, num_tokens // 4), width, device=like.device, dtype=like.dtype)), order


def _prediction(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    videos, num_tokens = _videos(model), math.prod(model.input_size)
    width = layers.inner_linear(model.decoder_pred).weight.shape[0]
    pred = given(torch.randn(2, num_tokens, width, device=videos.device, dtype=videos.dtype))
    return videos, pred, (torch.rand(pred.shape[:2], device=videos.device) < 0.7).to(torch.get_default_dtype())


# --- the methods --------------------------------------------------------------------------------------------


def _positions(model: nn.Module, side: str) -> tuple[Tensor, Tensor | None] | None:
    """([1, N, D], [1, 1, D] of the class token or None) of one side, "" or "decoder_"; None where tables do not fit the
    model's own grid."""
    frames, *space = model.input_size
    front = None
    if model.sep_pos_embed:
        spatial, temporal = (getattr(model, f"{side}pos_embed_{name}") for name in ("spatial", "temporal"))
        if (spatial.shape[1], temporal.shape[1]) != (math.prod(space), frames):
            return None
        table = (temporal[:, :, None] + spatial[:, None]).flatten(1, 2)
        front = getattr(model, f"{side}pos_embed_class") if model.cls_embed else None
    else:
        table = getattr(model, f"{side}pos_embed")
        if table.shape[1] != frames * math.prod(space) + bool(model.cls_embed):
            return None
        if model.cls_embed:
            front, table = table.split([1, table.shape[1] - 1], 1)
    return table, front


def _usual(model: nn.Module, x: object) -> bool:
    """Videos that the model would take; what it would refuse is left to it."""
    proj = model.patch_embed.proj
    if not layers.takes(x, proj, 5) or layers.hooked(model.patch_embed):
        return False
    return tuple(x.shape[2:]) == tuple(count * k for count, k in zip(model.input_size, proj.kernel_size))


def forward_encoder(self: nn.Module, x: Tensor, mask_ratio: float, *args, **kwargs):
    usual = not args and not kwargs and mae.is_ratio(mask_ratio) and _usual(self, x)
    num_tokens = math.prod(self.input_size)
    keep = masking.keep_count(num_tokens, mask_ratio) if usual else 0
    found = _positions(self, "") if keep else None
    if found is None:
        return _swap.fall_back(self, "forward_encoder")(x, mask_ratio, *args, **kwargs)
    plan = layers.drawn(torch.rand(len(x), num_tokens, device=x.device), keep)
    (pos, front), proj = found, self.patch_embed.proj
    prefix = self.cls_token + front if self.cls_embed else None
    x = ops.patch_embed(x, proj.weight, proj.bias, plan, pos=pos, prefix=prefix)
    x = layers.last_norm(self.norm, *run_blocks(self.blocks, x))
    return x[:, bool(self.cls_embed) :], plan.mask.to(torch.get_default_dtype()), plan.ids_restore


def forward_decoder(self: nn.Module, x: Tensor, ids_restore: Tensor, *args, **kwargs):
    num_tokens = math.prod(self.input_size)
    usual = not args and not kwargs and all(isinstance(t, Tensor) for t in (x, ids_restore)) and x.ndim == 3
    usual = usual and tuple(ids_restore.shape) == (len(x), num_tokens) and 0 < x.shape[1] <= num_tokens and len(x) > 0
    found = _positions(self, "decoder_") if usual and not _spreads(self) else None
    plan = None if found is None else layers.ordered(ids_restore, x.shape[1])
    if plan is None:
        return _swap.fall_back(self, "forward_decoder")(x, ids_restore, *args, **kwargs)
    pos, front = found
    x = layers.linear(self.decoder_embed, x)
    if self.cls_embed:
        x = torch.cat([self.decoder_cls_token.expand(len(x), -1, -1).to(x.dtype), x], 1)
        pos = torch.cat([front, pos], 1)
    x = ops.restore_tokens(x, plan, self.mask_token, pos=pos, prefix=int(bool(self.cls_embed)))
    # The last block is asked for what is predicted only, unless somebody looks at the class token's row.
    watched = not (layers.plain_norm(self.decoder_norm) and layers.plain_linear(self.decoder_pred))
    at = run_blocks(self.decoder_blocks, x) if watched else run_tail(self.decoder_blocks, x, num_tokens)
    return layers.linear(self.decoder_pred, layers.norm(self.decoder_norm, *at)[1])[:, -num_tokens:]


def _spreads(model: nn.Module) -> bool:
    """Whether the decoder's attention wants space and time apart: the model's own code gives it that."""
    first = next(iter(model.decoder_blocks), None)
    return first is None or bool(getattr(getattr(first, "attn", None), "requires_t_shape", False))


def forward_loss(self: nn.Module, imgs: Tensor, pred: Tensor, mask: Tensor, *args, **kwargs):
    patch = self.t_pred_patch_size, *layers.convolution(self.patch_embed.proj).kernel_size[1:]
    if args or kwargs or not _scores(self, imgs, pred, mask, patch):
        return _swap.fall_back(self, "forward_loss")(imgs, pred, mask, *args, **kwargs)
    frames = torch.linspace(0, imgs.shape[2] - 1, self.pred_t_dim).long().to(imgs.device)
    imgs = imgs.index_select(2, frames)
    if _swap.setting(self, "notes"):  # for unpatchify
        time, *size = imgs.shape[2:]
        grid = (time // patch[0], *(s // p for s, p in zip(size, patch[1:])))
        self.patch_info = (len(imgs), time, *size, patch[1], patch[0], *grid)
    # The mask may hold any weights, so every patch is scored, as in the original.
    every = TokenMask.all_visible(*pred.shape[:2], pred.device).complement()
    norm = "mae" if self.norm_pix_loss else "none"
    each = ops.patch_loss(layers.kept(pred), imgs, every, patch, norm=norm, rows="all", reduction="none")
    each, mask = each.to(torch.promote_types(pred.dtype, imgs.dtype)).view(pred.shape[:2]), mask.view(pred.shape[:2])
    return (each * mask).sum() / mask.sum()


def _scores(model: nn.Module, imgs: object, pred: object, mask: object, patch: tuple[int, ...]) -> bool:
    """Whether the loss is one that the kernel computes; what `patchify` refuses is left to it."""
    if not all(isinstance(t, Tensor) and len(t) for t in (imgs, pred, mask)) or imgs.ndim != 5 or pred.ndim != 3:
        return False
    sizes = (model.pred_t_dim, *imgs.shape[3:])
    if sizes[1] != sizes[2] or patch[1] != patch[2] or not imgs.is_floating_point() or imgs.shape[2] < 1:
        return False
    if any(p < 1 or size % p for size, p in zip(sizes, patch)) or mask.numel() != pred.shape[0] * pred.shape[1]:
        return False
    tokens = math.prod(size // p for size, p in zip(sizes, patch))
    return tuple(pred.shape) == (len(imgs), tokens, math.prod(patch) * imgs.shape[1])

"""timm's `VisionTransformer`, with `PatchDropout` (Liu et al., 2022, and Li et al., 2022) and without.

Replaced is `forward_features`. While patch dropout is on, only the patches that it keeps are embedded; otherwise images
are embedded as the model does it. Sums stay pending between the blocks. Everything else of the model, its head, pooling
and `forward_intermediates` included, runs as it was, over the accelerated blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.integrations import _code, _swap
from maefast.integrations import _layers as layers
from maefast.integrations._steps import Options, Step, given
from maefast.integrations.transformer import is_fast, run_blocks
from maefast.ops import TokenMask

NAME = "timm ViT"
KEPT, PENDING = "patches that the dropout keeps embedded only", "sums pending between blocks"  # what is gained
METHODS = ("forward", "forward_features", "forward_head", "_pos_embed")
MODULES = ("patch_embed", "pos_drop", "patch_drop", "norm_pre", "blocks", "norm")
# What the forwards of timm's classes use; with anything else the fused embedding is not taken.
PATCH_EMBED = {"proj", "norm", "flatten", "output_fmt", "img_size", "patch_size", "grid_size", "strict_img_size"}
PATCH_EMBED |= {"dynamic_img_pad"}
PATCH_DROP = {"prob", "num_prefix_tokens", "ordered", "return_indices", "training"}
POS_EMBED = {"cls_token", "reg_token", "pos_embed", "dynamic_img_size", "patch_embed", "no_embed_class", "pos_drop"}
POS_EMBED |= {"num_prefix_tokens", "num_reg_tokens"}
# What our methods read at every call, see `Step.live`: parts of the embedding, and parts that are called.
EMBEDDING = ("patch_embed.proj", "patch_embed.norm", "cls_token", "reg_token", "pos_embed", "pos_drop")
LIVE = frozenset(
    (*EMBEDDING, "patch_drop.prob", "patch_drop.ordered", "norm_pre", "blocks", "norm", "grad_checkpointing")
)
CALLED = frozenset(("patch_embed", "pos_embed", "cls_token", "reg_token", "_pos_embed", "patch_drop"))


def recognise(module: nn.Module) -> bool:
    return (
        all(callable(getattr(module, name, None)) for name in METHODS)
        and all(isinstance(getattr(module, name, None), nn.Module) for name in MODULES)
        and all(hasattr(module, name) for name in ("cls_token", "pos_embed", "num_prefix_tokens", "no_embed_class"))
        and isinstance(module.blocks, nn.Sequential)
        and isinstance(getattr(module.patch_embed, "proj", None), nn.Module)  # an adapter may stand in its place
    )


def steps(model: nn.Module, options: Options, keep: Callable[..., None]) -> Iterator[Step]:
    """What to replace; `keep(method, why)` notes what is not."""
    root = _swap.root_class(type(model), METHODS)
    reason = _swap.overridden(model, "_pos_embed", root) or not_fused(model) or _unknown_dropout(model.patch_drop)
    pending = PENDING if any(map(is_fast, model.blocks)) else ""
    text = "; ".join(filter(None, ("" if reason else KEPT, pending)))
    if own := _swap.overridden(model, "forward_features", root):
        keep("forward_features", own, gain=text)
        return
    if reason and type(model.patch_drop) is not nn.Identity:
        keep("patch_drop", f"{reason}, so all patches are embedded", gain=KEPT)
    if not text:
        keep("forward_features", "there is nothing to fuse: its blocks run as they are")
        return
    fused = (type(model.patch_embed), type(model.patch_drop)) if reason is None else None
    probe = images_for(model)
    yield Step(
        model,
        {"forward_features": forward_features},
        {"forward_features": text},
        lambda: _both(model, probe),
        LIVE if fused else LIVE | CALLED,
        settings={"fused": fused},
    )


def not_fused(vit: nn.Module) -> str | None:
    """Why the embedding is not the one that we know, whatever the images are, or None."""
    if reason := layers.strided_patches(vit.patch_embed.proj):
        return reason
    if unknown := _code.beyond(vit.patch_embed, {"proj"}, PATCH_EMBED):
        return f"the patch embedding uses {unknown}, which maefast does not know"
    if unknown := _code.beyond(vit, {"cls_token", "pos_embed", "pos_drop"}, POS_EMBED, "_pos_embed"):
        return f"_pos_embed uses {unknown}, which maefast does not know"
    if vit.pos_embed is None:
        return "there are no positions"
    if getattr(vit, "dynamic_img_size", False):
        return "images may have any size"
    return None


def _unknown_dropout(module: nn.Module) -> str | None:
    if type(module) is nn.Identity:
        return "there is no patch dropout"
    unknown = _code.beyond(module, {"prob", "num_prefix_tokens", "ordered"}, PATCH_DROP)
    if not unknown and getattr(module, "return_indices", False):
        unknown = "return_indices"
    return f"the patch dropout uses {unknown}, which maefast does not know" if unknown else None


def images_for(vit: nn.Module) -> Tensor:
    """Two small random images for the comparison."""
    proj = layers.convolution(vit.patch_embed.proj)
    size = getattr(vit.patch_embed, "img_size", None) or [4 * k for k in proj.kernel_size]
    size = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(vit, "in_chans", proj.in_channels)  # a convnet may stand before the projection
    return torch.randn(2, channels, *size, device=proj.weight.device, dtype=proj.weight.dtype)


def _both(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Features with patch dropout on and off."""
    drop, found = model.patch_drop, []
    was = drop.training
    try:
        for on in (True, False) if type(drop) is not nn.Identity else (was,):
            drop.training = on
            found.append(model.forward_features(given(images)))
    finally:
        drop.training = was
    return found


# --- the method ---------------------------------------------------------------------------------------------


def usual_images(vit: nn.Module, images: object) -> bool:
    """Images that the embedding would take; what it would refuse is left to it."""
    embed = vit.patch_embed
    proj = embed.proj
    if not layers.takes(images, proj) or not layers.plain_tensor(images):
        return False
    size = getattr(embed, "img_size", None)
    size = (size, size) if isinstance(size, int) else size
    if size is None or tuple(images.shape[1:]) != (proj.in_channels, *size):
        return False
    return not any(s % k for s, k in zip(size, proj.kernel_size))


def usual_embedding(vit: nn.Module) -> bool:
    """Whether the embedding now is patches, prefix tokens and positions, and nobody watches the parts."""
    embed = vit.patch_embed
    if layers.hooked(embed, embed.proj) or not layers.still(getattr(embed, "norm", None)):
        return False
    if not getattr(embed, "flatten", True) or getattr(embed, "dynamic_img_pad", False):
        return False
    if getattr(vit, "dynamic_img_size", False):
        return False
    return layers.still(vit.pos_drop) and vit.pos_embed is not None and prefix_count(vit) == vit.num_prefix_tokens


def _prefix_tokens(vit: nn.Module) -> list[Tensor]:
    tokens = (vit.cls_token, getattr(vit, "reg_token", None))
    return [token for token in tokens if token is not None]


def prefix_count(vit: nn.Module) -> int:
    return sum(token.shape[1] for token in _prefix_tokens(vit))


def num_patches(vit: nn.Module, images: Tensor) -> int:
    height, width = (s // k for s, k in zip(images.shape[2:], vit.patch_embed.proj.kernel_size))
    return height * width


def embed_kept(vit: nn.Module, images: Tensor, plan: TokenMask) -> Tensor | None:
    """Prefix tokens and the visible patches with their positions; None where the position table has another length."""
    pos, proj, count = vit.pos_embed, vit.patch_embed.proj, prefix_count(vit)
    given = 0 if vit.no_embed_class else count
    if pos.shape[1] != given + plan.num_tokens:
        return None
    tokens = _prefix_tokens(vit)
    prefix = torch.cat(tokens, 1) if len(tokens) > 1 else tokens[0] if tokens else None
    if given:
        first, pos = pos.split([given, plan.num_tokens], 1)
        prefix = prefix + first
    return ops.patch_embed(images, proj.weight, proj.bias, plan, pos=pos, prefix=prefix)


def _dropping(model: nn.Module, images: Tensor) -> bool:
    """Whether patch dropout is on, and all that stands before it is what it was when we looked."""
    drop = model.patch_drop
    if _swap.setting(model, "fused") != (type(model.patch_embed), type(drop)) or layers.hooked(drop):
        return False
    on = drop.training and drop.prob > 0 and not getattr(drop, "return_indices", False)
    on = on and drop.num_prefix_tokens == model.num_prefix_tokens
    return on and usual_embedding(model) and usual_images(model, images)


def _tokens(model: nn.Module, images: Tensor) -> Tensor:
    """What the blocks get."""
    if _dropping(model, images):
        drop, count = model.patch_drop, num_patches(model, images)
        if model.pos_embed.shape[1] == count + (0 if model.no_embed_class else model.num_prefix_tokens):
            noise = torch.randn(len(images), count, device=images.device)
            kept = max(1, int(count * (1.0 - drop.prob)))
            plan = layers.drawn(noise, kept, "position" if drop.ordered else "score")
            return model.norm_pre(embed_kept(model, images, plan))
    x = model.patch_embed(images)
    x = model._pos_embed(x)
    x = model.patch_drop(x)
    return model.norm_pre(x)


def through(blocks: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(blocks(x)) for a Sequential of blocks."""
    if type(blocks) is not nn.Sequential or layers.hooked(blocks):
        return norm(blocks(x))
    x, delta = run_blocks(blocks, x)
    return layers.last_norm(norm, x, delta)


def forward_features(self: nn.Module, x: Tensor, *args, **kwargs):
    if any(given is not None and given is not False for given in (*args, *kwargs.values())):
        return _swap.fall_back(self, "forward_features")(x, *args, **kwargs)
    if getattr(self, "grad_checkpointing", False):
        return _swap.fall_back(self, "forward_features", "gradient checkpointing is on")(x)
    return through(self.blocks, self.norm, _tokens(self, x))

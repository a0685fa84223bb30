"""lightly's masked vision transformers on timm: the encoder `MaskedVisionTransformerTIMM`, and the decoders
`MaskedVisionTransformerDecoderTIMM` and `MAEDecoderTIMM`.

Of the encoder, `preprocess` embeds only the tokens in `idx_keep`, and `encode` keeps sums pending between the blocks.
Of the decoders, `decode` does the same, and `preprocess` puts mask tokens and positions in place in two passes, not
seven. The encoder and decoder on torchvision are not served: their blocks hold torch's own attention modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from maefast.integrations import _swap, timm_vit
from maefast.integrations._steps import Options, Step, given
from maefast.ops import TokenMask

NAME = "lightly masked ViT"
# What the methods of encoder and decoders gain.
VISIBLE, RESTORED = "tokens in idx_keep embedded only", "mask tokens and positions in two passes"
PENDING = "sums pending between blocks"
ENCODER = ("encode", "preprocess", "images_to_tokens", "prepend_prefix_tokens", "add_pos_embed")
DECODER = ("forward", "preprocess", "add_pos_embed", "decode")
MAE_DECODER = ("forward", "embed", "decode", "predict")


def recognise(module: nn.Module) -> bool:
    if not (_is_encoder(module) or _is_decoder(module)):
        return _is_mae_decoder(module)
    return "mask" in inspect.signature(module.preprocess).parameters  # of lightly 1.5 and later


def _has(module: nn.Module, methods: tuple[str, ...], modules: tuple[str, ...], tensors: tuple[str, ...]) -> bool:
    return (
        all(callable(getattr(module, name, None)) for name in methods)
        and all(isinstance(getattr(module, name, None), nn.Module) for name in modules)
        and all(isinstance(getattr(module, name, None), Tensor) for name in tensors)
    )


def _is_encoder(module: nn.Module) -> bool:
    return _has(module, ENCODER, ("vit",), ("mask_token",)) and timm_vit.recognise(module.vit)


def _is_decoder(module: nn.Module) -> bool:
    return _has(module, DECODER, ("blocks", "norm"), ("mask_token", "pos_embed"))


def _is_mae_decoder(module: nn.Module) -> bool:
    modules = ("decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred")
    return _has(module, MAE_DECODER, modules, ("mask_token", "decoder_pos_embed"))


def steps(model: nn.Module, options: Options, keep: Callable[..., None]) -> Iterator[Step]:
    """What to replace; `keep(method, why)` notes what is not."""
    if _is_encoder(model):
        yield from _encoder_steps(model, keep)
    elif _is_decoder(model):
        yield from _decoder_steps(model, keep)
    elif reason := _overridden(model, MAE_DECODER, "decode"):
        keep("decode", reason, gain=PENDING)
    else:
        x = _like(model.decoder_pos_embed)
        live = frozenset(("decoder_pos_embed", "decoder_blocks", "decoder_norm"))
        yield Step(model, {"decode": mae_decode}, {"decode": PENDING}, lambda: model.decode(given(x)), live)


def _root(kind: type, names: tuple[str, ...]) -> type:
    """The most basic class that defines all of the methods: lightly's own, above its abstract one."""
    for base in reversed(kind.__mro__):
        found = [getattr(base, name, None) for name in names]
        if all(found) and not any(getattr(f, "__isabstractmethod__", False) for f in found):
            return base
    return kind


def _overridden(model: nn.Module, names: tuple[str, ...], *asked: str) -> str | None:
    root = _root(type(model), names)
    return next(filter(None, (_swap.overridden(model, name, root) for name in asked)), None)


def _encoder_steps(model: nn.Module, keep: Callable[..., None]) -> Iterator[Step]:
    images = timm_vit.images_for(model.vit)
    reason = _overridden(model, ENCODER, *ENCODER[1:]) or timm_vit.not_fused(model.vit)
    if reason is None:
        yield Step(
            model,
            {"preprocess": preprocess},
            {"preprocess": VISIBLE},
            lambda: model.preprocess(given(images), idx_keep=_keep_half(model.vit, images)),
            frozenset(("mask_token", *(f"vit.{name}" for name in timm_vit.EMBEDDING))),
            settings={"embed": type(model.vit.patch_embed)},
        )
    else:
        keep("preprocess", reason, gain=VISIBLE)
    if reason := _overridden(model, ENCODER, "encode"):
        keep("encode", reason, gain=PENDING)
        return
    yield Step(
        model,
        {"encode": encode},
        {"encode": PENDING},
        lambda: (model.encode(given(images)), model.encode(given(images), idx_keep=_keep_half(model.vit, images))),
        frozenset(("preprocess", "vit.norm_pre", "vit.blocks", "vit.norm")),
    )


def _keep_half(vit: nn.Module, images: Tensor) -> Tensor:
    """Prefix tokens and half of the patches, in random order."""
    prefix, patches = timm_vit.prefix_count(vit), timm_vit.num_patches(vit, images)
    noise = torch.rand(len(images), patches, device=images.device)
    chosen = noise.argsort(1)[:, : max(1, patches // 2)] + prefix
    return torch.cat([torch.arange(prefix, device=images.device).expand(len(images), -1), chosen], 1)


def _decoder_steps(model: nn.Module, keep: Callable[..., None]) -> Iterator[Step]:
    x = _like(model.pos_embed)
    index = torch.rand(x.shape[:2], device=x.device).argsort(1)[:, : x.shape[1] // 2]
    mask = torch.rand(x.shape[:2], device=x.device) < 0.5
    if reason := _overridden(model, DECODER, "preprocess", "add_pos_embed"):
        keep("preprocess", reason, gain=RESTORED)
    else:
        yield Step(
            model,
            {"preprocess": decoder_preprocess},
            {"preprocess": RESTORED},
            lambda: (
                model.preprocess(given(x)),
                model.preprocess(given(x), idx_mask=index),
                model.preprocess(given(x), mask=mask, idx_keep=index),
            ),
            frozenset(("pos_embed", "mask_token")),
        )
    if reason := _overridden(model, DECODER, "decode"):
        keep("decode", reason, gain=PENDING)
    else:
        live = frozenset(("blocks", "norm"))
        yield Step(model, {"decode": decode}, {"decode": PENDING}, lambda: model.decode(given(x)), live)


def _like(table: Tensor) -> Tensor:
    """Random tokens for a table of positions."""
    return torch.randn(2, *table.shape[1:], device=table.device, dtype=table.dtype)


# --- the methods --------------------------------------------------------------------------------------------


def _plan(vit: nn.Module, images: Tensor, index: object) -> TokenMask | None:
    """The plan that keeps the tokens of `index`, where that is the prefix tokens and then patches, each once."""
    if not isinstance(index, Tensor) or index.ndim != 2 or index.dtype is not torch.int64:
        return None
    prefix, patches = vit.num_prefix_tokens, timm_vit.num_patches(vit, images)
    count = index.shape[1] - prefix
    if len(index) != len(images) or index.device != images.device or not 0 < count <= patches:
        return None
    first, chosen = index[:, :prefix], index[:, prefix:] - prefix
    ranks = torch.arange(count, device=index.device, dtype=torch.float32).expand(len(index), -1)
    scores = torch.full((len(index), patches), float(patches), device=index.device)
    scores.scatter_(1, chosen.clamp(0, patches - 1), ranks)
    once = (scores < patches).sum(1, keepdim=True) == count  # a repeated one is overwritten
    inside = (chosen >= 0) & (chosen < patches)
    in_front = first == torch.arange(prefix, device=index.device)
    # One look at the values: on a GPU the only wait for it here.
    if not torch.cat([once, inside, in_front], 1).all():
        return None
    return TokenMask.from_scores(scores, count)


def preprocess(self: nn.Module, images: Tensor, idx_mask=None, idx_keep=None, mask=None):
    vit = self.vit
    usual = idx_mask is None and mask is None and idx_keep is not None
    usual = usual and not torch.compiler.is_compiling()  # a look at values would break the graph
    usual = usual and type(vit.patch_embed) is _swap.setting(self, "embed") and timm_vit.usual_embedding(vit)
    if usual and timm_vit.usual_images(vit, images):
        plan = _plan(vit, images, idx_keep)
        tokens = None if plan is None else timm_vit.embed_kept(vit, images, plan)
        if tokens is not None:
            return tokens
    why = "without idx_keep all patches are embedded" if idx_keep is None else _swap.UNUSUAL
    return _swap.fall_back(self, "preprocess", why)(images, idx_mask=idx_mask, idx_keep=idx_keep, mask=mask)


def encode(self: nn.Module, images: Tensor, idx_mask=None, idx_keep=None, mask=None):
    tokens = self.preprocess(images=images, idx_mask=idx_mask, idx_keep=idx_keep, mask=mask)
    return timm_vit.through(self.vit.blocks, self.vit.norm, self.vit.norm_pre(tokens))


def decoder_preprocess(self: nn.Module, x: Tensor, idx_mask=None, idx_keep=None, mask=None):
    pos, token = self.pos_embed, self.mask_token
    tokens = isinstance(x, Tensor) and x.ndim == 3 and x.shape[1:] == pos.shape[1:] and token.shape[-1] == x.shape[-1]
    if idx_mask is not None:
        usual = isinstance(idx_mask, Tensor) and idx_mask.ndim == 2 and mask is None and len(idx_mask) == len(x)
    else:
        usual = isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.shape == x.shape[:2]
    if not tokens or not usual:
        why = "without idx_mask or mask nothing is masked" if idx_mask is None and mask is None else _swap.UNUSUAL
        return _swap.fall_back(self, "preprocess", why)(x, idx_mask=idx_mask, idx_keep=idx_keep, mask=mask)
    if mask is None:
        mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, idx_mask, True)
    x = torch.where(mask[..., None], token, x) + pos
    return x if idx_keep is None else x.gather(1, idx_keep[..., None].expand(-1, -1, x.shape[-1]))


def decode(self: nn.Module, x: Tensor):
    return timm_vit.through(self.blocks, self.norm, x)


def mae_decode(self: nn.Module, input: Tensor):
    return timm_vit.through(self.decoder_blocks, self.decoder_norm, input + self.decoder_pos_embed)

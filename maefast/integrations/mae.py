"""`MaskedAutoencoderViT` of facebookresearch/mae (He et al., 2021) and its forks: same attributes, same methods.

Replaced are `forward_encoder` (mask in one kernel, only visible patches embedded), `forward_decoder` (mask tokens and
positions put in place in one pass), `forward_loss` (no target tensor) and `forward`, which hands one plan through all
three. Each keeps its contract; predictions are of all patches unless ``pred="masked"`` was asked for.

Forks may take more arguments, which are served while they have their defaults, and may return constants behind the
usual values (AudioMAE, Huang et al., 2022: ``latent, mask, ids_restore, None``); whatever else differs, the comparison
finds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maefast import masking, ops
from maefast.integrations import _code, _swap, _verify
from maefast.integrations import _layers as layers
from maefast.integrations._guards import same
from maefast.integrations._sites import PLAIN
from maefast.integrations._steps import Options, Step, given
from maefast.integrations.transformer import run_blocks, run_tail
from maefast.ops import TokenMask

NAME = "facebookresearch/mae"
METHODS = ("forward", "forward_encoder", "forward_decoder", "forward_loss", "random_masking", "patchify")
MODULES = ("patch_embed", "blocks", "norm", "decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred")
TENSORS = ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed")
# What our methods read at every call, see `Step.live`.
ENCODER = frozenset(("patch_embed.proj", "cls_token", "pos_embed", "blocks", "norm"))
DECODER = frozenset(f"decoder_{name}" for name in ("embed", "pos_embed", "blocks", "norm", "pred")) | {"mask_token"}
NORM = "norm_pix_loss"
VALUES = {"forward_encoder": 3, "forward_decoder": 1, "forward_loss": 1, "forward": 3}  # that a method returns
ARGUMENTS = {"forward_encoder": 2, "forward_decoder": 2, "forward_loss": 3, "forward": 2}  # that it takes


class More(NamedTuple):
    """What a fork's method has beyond the usual: arguments with their defaults, constants that it returns behind."""

    arguments: dict[str, Any]
    values: tuple


def recognise(module: nn.Module) -> bool:
    return (
        all(hasattr(module, name) for name in METHODS)
        and all(isinstance(getattr(module, name, None), nn.Module) for name in MODULES)
        and all(isinstance(getattr(module, name, None), Tensor) for name in TENSORS)
        and hasattr(module, "norm_pix_loss")
        and isinstance(getattr(module.patch_embed, "proj", None), nn.Module)  # an adapter may stand in its place
    )


def steps(model: nn.Module, options: Options, keep: Callable[..., None]) -> Iterator[Step]:
    """What to replace; `keep(method, why)` notes what is not."""
    root = _swap.root_class(type(model), METHODS)
    kept = {name: _swap.overridden(model, name, root) for name in METHODS}
    if reason := layers.strided_patches(model.patch_embed.proj) or kept["random_masking"]:
        kept["forward_encoder"] = kept["forward_encoder"] or reason
    if kept["patchify"]:
        kept["forward_loss"] = kept["forward_loss"] or kept["patchify"]
    done = set()

    def step(name: str, fast: Callable, text: str, probe: Callable, live: frozenset, **settings) -> Iterator[Step]:
        if kept[name]:
            keep(name, kept[name], gain=text)
            return
        settings |= {f"more of {name}": _more(model, name, probe)}
        yield Step(model, {name: fast}, {name: text}, probe, live, settings=settings)
        if name in _swap.methods(model):
            done.add(name)

    yield from step(
        "forward_encoder",
        forward_encoder,
        "mask in one kernel, visible patches only embedded",
        lambda: model.forward_encoder(probe_images(model), 0.75),
        ENCODER,
    )
    yield from step(
        "forward_decoder",
        forward_decoder,
        "mask tokens, order and positions in one pass",
        lambda: model.forward_decoder(*_latent(model)),
        DECODER,
    )
    yield from step(
        "forward_loss",
        forward_loss,
        "pixels read in place, no target tensor",
        lambda: _losses(model),
        frozenset(("patch_embed.proj",)),
        img_size=None if _verify.unsuitable(model) else _size(model),
    )
    missing = [name for name in ("forward_encoder", "forward_decoder", "forward_loss") if name not in done]
    returned = _code.returns(type(model).forward)
    if returned not in (None, VALUES["forward"]) and not kept["forward"]:
        kept["forward"] = f"it returns {returned} values, where maefast knows {VALUES['forward']}"
    if missing and not kept["forward"]:
        kept["forward"] = f"it calls {', '.join(missing)}, which stay as they are"
    text = "one plan through encoder, decoder and loss"
    if options.pred == "masked":
        text += "; pred='masked': [B, masked, K] in plan order"
    ratio = inspect.signature(model.forward).parameters.get("mask_ratio")
    ratio = 0.75 if ratio is None else ratio.default
    live = ENCODER | DECODER
    yield from step("forward", forward, text, lambda: _whole(model), live, pred=options.pred, ratio=ratio)


def _more(model: nn.Module, name: str, probe: Callable[[], Any]) -> More:
    """Of a method that is about to be replaced. Where it returns more than it should, it is run once, to see what."""
    method = getattr(type(model), name)
    found = list(inspect.signature(method).parameters.values())[1 + ARGUMENTS[name] :]
    arguments = {p.name: p.default for p in found if p.kind is p.POSITIONAL_OR_KEYWORD}
    usual, values = VALUES[name], ()
    if (_code.returns(method) or usual) > usual and not _verify.unsuitable(model):
        out = _verify.returned(model, probe)
        values = out[usual:] if isinstance(out, tuple) else ()
    return More(arguments, values if all(isinstance(value, PLAIN) for value in values) else ())


# --- probes -------------------------------------------------------------------------------------------------


def probe_images(model: nn.Module) -> Tensor:
    """Two images, one of low contrast, where the epsilon of normalised targets shows."""
    proj = layers.convolution(model.patch_embed.proj)
    images = torch.randn(2, proj.in_channels, *_size(model), device=proj.weight.device, dtype=proj.weight.dtype)
    images[1] *= 1e-3
    return given(images)


def _size(model: nn.Module) -> tuple[int, int]:
    """(height, width) of the images that a model is for."""
    side = round((model.pos_embed.shape[1] - 1) ** 0.5)
    size = getattr(model.patch_embed, "img_size", None)
    size = size or [side * k for k in layers.convolution(model.patch_embed.proj).kernel_size]
    return (size, size) if isinstance(size, int) else tuple(size)


def _latent(model: nn.Module) -> tuple[Tensor, Tensor]:
    like, num_patches = model.mask_token, model.pos_embed.shape[1] - 1
    order = torch.rand(2, num_patches, device=like.device).argsort(1)
    width = model.norm.normalized_shape[0] if hasattr(model.norm, "normalized_shape") else model.pos_embed.shape[-1]
    latent = torch.randn(2, 1 + num_patches // 4, width, device=like.device, dtype=like.dtype)
    return given(latent), order


def _prediction(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    images = probe_images(model)
    pred = given(torch.randn_like(model.patchify(images)))
    return images, pred, (torch.rand(pred.shape[:2], device=images.device) < 0.7).to(torch.get_default_dtype())


def _losses(model: nn.Module) -> list[Tensor]:
    """Of plain and of normalised pixels, where that is an argument."""
    given, more = _prediction(model), _swap.setting(model, "more of forward_loss")
    asked = more is not None and NORM in more.arguments
    return [model.forward_loss(*given, **kwargs) for kwargs in ({}, {NORM: True})[: 1 + asked]]


def _whole(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The model's outputs; where masked predictions were asked for, those of the original in the same order."""
    images = probe_images(model)
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        noise = torch.rand(len(images), model.pos_embed.shape[1] - 1, device=images.device)
    loss, pred, mask = model(images)
    if _swap.setting(model, "pred") == "masked" and pred.shape[1] == mask.shape[1]:
        order = noise.argsort(1)[:, -int(mask[0].sum()) :]
        pred = pred.gather(1, order[..., None].expand(-1, -1, pred.shape[-1]))
    return loss, pred, mask


# --- the methods --------------------------------------------------------------------------------------------


def usual(model: nn.Module, images: Tensor) -> bool:
    """Images that the model would take; what it would refuse is left to it."""
    proj = model.patch_embed.proj
    if not layers.takes(images, proj):
        return False
    height, width = (s // k for s, k in zip(images.shape[2:], proj.kernel_size))
    fits = height * width == model.pos_embed.shape[1] - 1
    fits = fits and all(s % k == 0 for s, k in zip(images.shape[2:], proj.kernel_size))
    size = getattr(model.patch_embed, "img_size", None)
    if size is not None:
        fits = fits and tuple(images.shape[2:]) == ((size, size) if isinstance(size, int) else tuple(size))
    return fits


def embeds(model: nn.Module) -> bool:
    """Whether the weights of the patch embedding may be read: nobody watches it or shards it by itself."""
    return not layers.hooked(model.patch_embed)


def _asks(model: nn.Module, name: str, args: tuple, kwargs: dict) -> dict[str, Any] | None:
    """Further arguments of a call, with the defaults of those that are not given; None where one is unknown."""
    known = _swap.setting(model, f"more of {name}").arguments
    asked = dict(zip(known, args)) | kwargs
    return {**known, **asked} if len(asked) == len(args) + len(kwargs) and asked.keys() <= known.keys() else None


def _plainly(model: nn.Module, name: str, args: tuple, kwargs: dict) -> bool:
    """Whether all further arguments of a call have their defaults."""
    if not args and not kwargs:
        return True
    asked, known = _asks(model, name, args, kwargs), _swap.setting(model, f"more of {name}").arguments
    return asked is not None and all(same(value, known[key]) for key, value in asked.items())


def is_ratio(ratio: object) -> bool:
    return isinstance(ratio, (int, float)) and 0 <= ratio <= 1


def draw(model: nn.Module, images: Tensor, ratio: float) -> TokenMask:
    """The plan of `random_masking`: the same draw, the same order."""
    batch, num_patches = images.shape[0], model.pos_embed.shape[1] - 1
    noise = torch.rand(batch, num_patches, device=images.device)
    return layers.drawn(noise, masking.keep_count(num_patches, ratio))


def encode(model: nn.Module, images: Tensor, plan: TokenMask, features: bool = False) -> Tensor:
    """Latents; as `features` in the dtype in which the model itself returns them."""
    proj, pos = model.patch_embed.proj, model.pos_embed
    cls_pos, pos = pos.split([1, pos.shape[1] - 1], 1)
    x = ops.patch_embed(images, proj.weight, proj.bias, plan, pos=pos, prefix=model.cls_token + cls_pos)
    x, delta = run_blocks(model.blocks, x)
    return layers.last_norm(model.norm, x, delta) if features else layers.norm(model.norm, x, delta)[1]


def decode(model: nn.Module, latent: Tensor, plan: TokenMask, pred: str = "full") -> Tensor:
    # The last block is asked for what is predicted only (the class token never is), unless somebody looks at the rest.
    # Or may: what is no plain norm or linear layer may mix tokens, or draw a number for each.
    watched = not (layers.plain_norm(model.decoder_norm) and layers.plain_linear(model.decoder_pred))
    order = "position" if pred == "full" or watched else "visible_first"
    x = layers.linear(model.decoder_embed, latent)
    if getattr(model, "decoder_mode", 0):  # AudioMAE's local blocks, which see no class token
        x = ops.restore_tokens(x[:, 1:], plan, model.mask_token, pos=model.decoder_pos_embed[:, 1:])
        return layers.linear(
            model.decoder_pred, layers.norm(model.decoder_norm, *run_blocks(model.decoder_blocks, x))[1]
        )
    x = ops.restore_tokens(x, plan, model.mask_token, pos=model.decoder_pos_embed, prefix=1, order=order)
    if watched:
        x, delta = run_blocks(model.decoder_blocks, x)
    else:
        x, delta = run_tail(model.decoder_blocks, x, plan.num_tokens if pred == "full" else plan.max_masked)
    out = layers.linear(model.decoder_pred, layers.norm(model.decoder_norm, x, delta)[1])
    if not watched:
        return out
    return out[:, 1:] if pred == "full" else ops.gather_tokens(out, plan, "masked", prefix=1, keep_prefix=False)


def _scores(model: nn.Module, images: object, pred: object, mask: object) -> bool:
    """Whether the loss is one that the kernel computes; what `patchify` refuses is left to it."""
    if not all(isinstance(t, Tensor) and len(t) for t in (images, pred, mask)) or images.ndim != 4 or pred.ndim != 3:
        return False
    side = layers.convolution(model.patch_embed.proj).kernel_size[0]
    height, width = images.shape[2:]
    if height != width and (height, width) != _swap.setting(model, "img_size"):  # as compared
        return False
    if mask.shape != pred.shape[:2] or height % side or width % side or not images.is_floating_point():
        return False
    return tuple(pred.shape) == (len(images), height // side * (width // side), side * side * images.shape[1])


def score(
    model: nn.Module, images: Tensor, pred: Tensor, plan: TokenMask, rows: str, reduction: str, norm: object = None
) -> Tensor:
    """The loss; of normalised pixels as `norm` says, or else the model."""
    norm = "mae" if (model.norm_pix_loss if norm is None else norm) else "none"
    conv = layers.convolution(model.patch_embed.proj)
    images, patch = layers.kept_images(images, pred, conv), tuple(conv.kernel_size)
    loss = ops.patch_loss(pred, images, plan, patch, norm=norm, rows=rows, reduction=reduction)
    return loss.to(torch.promote_types(pred.dtype, images.dtype))


def forward_encoder(self: nn.Module, x: Tensor, mask_ratio: float, *args, **kwargs):
    usually = _plainly(self, "forward_encoder", args, kwargs) and usual(self, x)
    if not usually or not embeds(self) or not is_ratio(mask_ratio):
        return _swap.fall_back(self, "forward_encoder")(x, mask_ratio, *args, **kwargs)
    plan = draw(self, x, mask_ratio)
    mask, more = plan.mask.to(torch.get_default_dtype()), _swap.setting(self, "more of forward_encoder")
    return encode(self, x, plan, features=True), mask, plan.ids_restore, *more.values


def forward_decoder(self: nn.Module, x: Tensor, ids_restore: Tensor, *args, **kwargs):
    plainly = _plainly(self, "forward_decoder", args, kwargs)
    fits = plainly and len(x) and self.decoder_pos_embed.shape[1] == ids_restore.shape[1] + 1
    plan = layers.ordered(ids_restore, x.shape[1] - 1) if fits else None
    if plan is None:
        return _swap.fall_back(self, "forward_decoder")(x, ids_restore, *args, **kwargs)
    pred, more = decode(self, x, plan), _swap.setting(self, "more of forward_decoder")
    return (pred, *more.values) if more.values else pred


def forward_loss(self: nn.Module, imgs: Tensor, pred: Tensor, mask: Tensor, *args, **kwargs):
    asked, known = _asks(self, "forward_loss", args, kwargs), _swap.setting(self, "more of forward_loss").arguments
    plainly = asked is not None and all(key == NORM or same(value, known[key]) for key, value in asked.items())
    if not plainly or not isinstance(asked.get(NORM), (bool, NoneType)) or not _scores(self, imgs, pred, mask):
        return _swap.fall_back(self, "forward_loss")(imgs, pred, mask, *args, **kwargs)
    # The mask may hold any weights, so every patch is scored, as in the original.
    every = TokenMask.all_visible(*pred.shape[:2], pred.device).complement()
    norm = bool(asked[NORM]) if NORM in asked else None
    each = score(self, imgs, layers.kept(pred), every, "all", "none", norm).view(mask.shape)
    return (each * mask).sum() / mask.sum()


def forward(self: nn.Module, imgs: Tensor, mask_ratio: float = ..., *args, **kwargs):
    mask_ratio = _swap.setting(self, "ratio") if mask_ratio is ... else mask_ratio  # None is one that they refuse
    if args or kwargs or not usual(self, imgs) or not embeds(self) or not is_ratio(mask_ratio):
        return _swap.fall_back(self, "forward")(imgs, mask_ratio, *args, **kwargs)
    plan = draw(self, imgs, mask_ratio)
    which = _swap.setting(self, "pred", "full")
    if plan.total_masked == 0:  # the original divides zero by zero
        pred = decode(self, encode(self, imgs, plan), plan)
        mask = plan.mask.to(torch.get_default_dtype())
        return self.forward_loss(imgs, pred, mask), pred, mask
    pred = decode(self, encode(self, imgs, plan), plan, which)
    loss = score(self, imgs, layers.kept(pred), plan, "all" if which == "full" else "masked", "mean")
    mask = plan.mask.to(torch.get_default_dtype())
    # The original multiplies by this mask.
    return loss.to(torch.promote_types(loss.dtype, mask.dtype)), pred, mask

"""ViTMAE of Hugging Face transformers, 4 and 5: `ViTMAEForPreTraining` and `ViTMAEModel` (He et al., 2021).

Replaced are the embeddings (mask in one kernel, visible patches only embedded), the loop over encoder layers, the
decoder (mask tokens and positions put in place in one pass) and the loss (no target tensor). Hidden states, attention
weights and attention masks go the way they always went. A fresh model, not `from_pretrained`, has position tables that
are frozen and all zero, see `_check_table`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.integrations import _hf, _swap
from maefast.integrations import _layers as layers
from maefast.integrations._steps import Options, Step, given
from maefast.integrations.transformer import is_fast, run_blocks, run_tail
from maefast.nn.positions import sincos_2d
from maefast.ops import TokenMask

NAME = "transformers ViTMAE"
RESTORED, IN_PLACE = "mask tokens, order and positions in one pass", "pixels read in place, no target tensor"
ENCODED = "encoder layers in one run"
FALLBACK = "; hidden states and attention weights, where asked for, come from the model's own code"
DECODER = frozenset(f"decoder_{name}" for name in ("embed", "pos_embed", "layers", "norm", "pred")) | {"mask_token"}
ALL_ZERO = {
    "embeddings": "the encoder cannot tell where a patch comes from",
    "decoder": "all masked patches of an image get the same prediction",
}


class Order(NamedTuple):
    """What our `ViTMAEForPreTraining` hands to our decoder in place of `ids_restore`."""

    plan: TokenMask
    pred: str


def recognise(module: nn.Module) -> bool:
    return _is_encoder(module) or _is_whole(module)


def _is_encoder(module: nn.Module) -> bool:
    embeddings = getattr(module, "embeddings", None)
    return (
        hasattr(embeddings, "random_masking")
        and all(isinstance(getattr(embeddings, name, None), Tensor) for name in ("cls_token", "position_embeddings"))
        and isinstance(getattr(getattr(embeddings, "patch_embeddings", None), "projection", None), nn.Module)
        and isinstance(getattr(module, "layernorm", None), nn.Module)
        and _layers_of(module) is not None
        and hasattr(getattr(module, "config", None), "mask_ratio")
        and _hf.output_class(module, "ViTMAEModelOutput") is not None
    )


def _is_whole(module: nn.Module) -> bool:
    parts = ("decoder_embed", "decoder_layers", "decoder_norm", "decoder_pred", "mask_token", "decoder_pos_embed")
    vit, decoder = getattr(module, "vit", None), getattr(module, "decoder", None)
    return (
        vit is not None
        and all(hasattr(decoder, name) for name in parts)
        and hasattr(module, "patchify")
        and _is_encoder(_hf.inner(vit))
        and _hf.output_class(module, "ViTMAEForPreTrainingOutput") is not None
        and _hf.output_class(_hf.inner(decoder), "ViTMAEDecoderOutput") is not None
    )


def _layers_of(model: nn.Module) -> nn.ModuleList | None:
    """transformers 5 has them in the model itself, 4 in an encoder."""
    if isinstance(getattr(model, "layers", None), nn.ModuleList):
        return model.layers
    found = getattr(getattr(model, "encoder", None), "layer", None)
    return found if isinstance(found, nn.ModuleList) else None


def steps(model: nn.Module, options: Options, keep: Callable[..., None]) -> Iterator[Step]:
    yield from (_whole_steps if _is_whole(model) else _encoder_steps)(model, options, keep)


def _encoder_steps(model: nn.Module, options: Options, keep: Callable[..., None]) -> Iterator[Step]:
    embeddings = _hf.inner(model.embeddings)
    _check_table(embeddings, "position_embeddings", "embeddings", _grid(model), options, keep)
    reason = layers.strided_patches(embeddings.patch_embeddings.projection)
    for part, name in (
        (embeddings, "forward"),
        (embeddings, "random_masking"),
        (embeddings, "interpolate_pos_encoding"),
        (_hf.inner(embeddings.patch_embeddings), "forward"),
    ):
        reason = reason or _swap.overriding(part, name)
    text = "mask in one kernel, visible patches only embedded"
    if reason:
        keep("embeddings.forward", reason, gain=text)
    else:
        yield Step(
            embeddings,
            {"forward": embeddings_forward},
            {"forward": text},
            lambda: embeddings(_images(model)),
            frozenset(("patch_embeddings.projection", "position_embeddings", "cls_token", "config.mask_ratio")),
            path="embeddings",
        )
    reason = _swap.overriding(model, "forward")
    if not hasattr(model, "layers"):
        encoder = _hf.inner(model.encoder)
        if inside := _swap.overriding(encoder, "forward"):
            keep("encoder.forward", inside)
            reason = reason or "it calls the encoder, which stays as it is"
    if reason:
        keep("forward", reason, gain=ENCODED)
        return
    yield Step(
        model,
        {"forward": model_forward},
        {"forward": ENCODED + FALLBACK},
        lambda: model(_images(model)),
        frozenset(("embeddings", "layers", "encoder.layer", "layernorm")) | _hf.LIVE,
        settings={"output": _hf.output_class(model, "ViTMAEModelOutput")},
    )


def _whole_steps(model: nn.Module, options: Options, keep: Callable[..., None]) -> Iterator[Step]:
    decoder, vit = _hf.inner(model.decoder), _hf.inner(model.vit)
    _check_table(decoder, "decoder_pos_embed", "decoder", _grid(vit), options, keep)
    if reason := _swap.overriding(decoder, "forward") or _swap.overriding(decoder, "interpolate_pos_encoding"):
        keep("decoder.forward", reason, gain=RESTORED)
    else:
        yield Step(
            decoder,
            {"forward": decoder_forward},
            {"forward": RESTORED},
            lambda: decoder(*_latent(model, decoder)),
            DECODER | _hf.LIVE,
            settings={"output": _hf.output_class(decoder, "ViTMAEDecoderOutput")},
            path="decoder",
        )
    inside = _swap.overriding(model, "patchify")
    if hasattr(model, "forward_loss"):  # transformers 4
        inside = inside or _swap.overriding(model, "forward_loss")
        if inside:
            keep("forward_loss", inside, gain=IN_PLACE)
        else:
            yield Step(
                model,
                {"forward_loss": forward_loss},
                {"forward_loss": IN_PLACE},
                lambda: model.forward_loss(*_prediction(model)),
            )
    reason = _swap.overriding(model, "forward") or (f"its loss is its own: {inside}" if inside else None)
    text = "one plan through decoder and loss, pixels read in place"
    if reason:
        keep("forward", reason, gain=text)
        return
    if options.pred == "masked":
        text += "; pred='masked': logits [B, masked, K] in plan order"
    yield Step(
        model,
        {"forward": forward},
        {"forward": text},
        lambda: _outputs(model),
        frozenset(("vit", "decoder", "config.mask_ratio")) | _hf.LIVE,
        settings={"output": _hf.output_class(model, "ViTMAEForPreTrainingOutput"), "pred": options.pred},
    )


# --- position tables ----------------------------------------------------------------------------------------


def _grid(vit: nn.Module) -> tuple[int, int]:
    patches = _hf.inner(_hf.inner(vit.embeddings).patch_embeddings)
    kernel = layers.convolution(patches.projection).kernel_size
    height, width = (size // k for size, k in zip(patches.image_size, kernel))
    return height, width


@torch.no_grad()
def _check_table(
    owner: nn.Module, name: str, path: str, grid: tuple[int, int], options: Options, keep: Callable[..., None]
) -> None:
    """A fresh model's frozen tables are zero, because its initialisation undoes what its constructor filled in.

    Its authors mean the table of facebookresearch/mae, which pretrained weights hold: columns first, then rows.
    """
    table = getattr(owner, name)
    if table.requires_grad or table.is_meta or not layers.plain_tensor(table) or not table.numel() or table.any():
        return
    where = f"{path}.{name}"
    if options.repair_positions and table.shape[1] == 1 + grid[0] * grid[1] and table.shape[-1] % 4 == 0:
        table.copy_(sincos_2d(table.shape[-1], grid, prefix=1).unsqueeze(0))
        keep(where, "was frozen and all zero: now the sine-cosine table of the paper", True)
        return
    text = f"is frozen and all zero: {ALL_ZERO[path]}, and training cannot change that"
    keep(where, text)
    warnings.warn(
        f"maefast.accelerate: {where} {text}. Load pretrained weights, or call "
        "maefast.accelerate(model, repair_positions=True)",
        stacklevel=2,
    )


# --- probes -------------------------------------------------------------------------------------------------


def _images(vit: nn.Module) -> Tensor:
    """Two images, one of low contrast, where the epsilon of normalised targets shows."""
    patches = _hf.inner(_hf.inner(vit.embeddings).patch_embeddings)
    like = layers.convolution(patches.projection).weight
    images = torch.randn(2, like.shape[1], *patches.image_size, device=like.device, dtype=like.dtype)
    images[1] *= 1e-3
    return given(images)


def _latent(model: nn.Module, decoder: nn.Module) -> tuple[Tensor, Tensor]:
    like, num_patches = decoder.mask_token, decoder.decoder_pos_embed.shape[1] - 1
    order = torch.rand(2, num_patches, device=like.device).argsort(1)
    width = model.config.hidden_size
    return given(torch.randn(2, 1 + num_patches // 4, width, device=like.device, dtype=like.dtype)), order


def _prediction(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    images = _images(_hf.inner(model.vit))
    pred = given(torch.randn_like(model.patchify(images)))
    return images, pred, (torch.rand(pred.shape[:2], device=images.device) < 0.7).to(torch.get_default_dtype())


def _outputs(model: nn.Module) -> tuple:
    """The model's outputs; where masked predictions were asked for, those of the original in the same order."""
    out = model(_images(_hf.inner(model.vit)))
    logits = out.logits
    if _swap.setting(model, "pred") == "masked" and logits.shape[1] == out.ids_restore.shape[1]:
        logits = _masked_rows(logits, _plan(out.ids_restore, out.mask.shape[1] - int(out.mask[0].sum())))
    return out.loss, logits, out.mask, out.ids_restore


# --- the encoder --------------------------------------------------------------------------------------------


def _plan(ids_restore: Tensor, keep: int) -> TokenMask:
    """The plan of a permutation that is known to be one."""
    return TokenMask.from_scores(ids_restore.float(), keep)


def embeddings_forward(
    self: nn.Module, pixel_values: Tensor, noise: Tensor | None = None, interpolate_pos_encoding: bool = False
):
    if not _embeds(self, pixel_values, noise, interpolate_pos_encoding):
        return _swap.fall_back(self, "forward")(pixel_values, noise, interpolate_pos_encoding)
    proj, pos = self.patch_embeddings.projection, self.position_embeddings
    height, width = (size // k for size, k in zip(pixel_values.shape[2:], proj.kernel_size))
    batch, num_patches = len(pixel_values), height * width
    if interpolate_pos_encoding:
        shape = self.cls_token.expand(1, num_patches, -1)  # it is asked for its shape only
        pos = self.interpolate_pos_encoding(shape, *pixel_values.shape[2:])
    if noise is None:
        noise = torch.rand(batch, num_patches, device=pixel_values.device)
    plan = layers.drawn(noise, int(num_patches * (1 - self.config.mask_ratio)))
    cls_pos, pos = pos.split([1, pos.shape[1] - 1], 1)
    x = ops.patch_embed(pixel_values, proj.weight, proj.bias, plan, pos=pos, prefix=self.cls_token + cls_pos)
    return x, plan.mask.to(torch.get_default_dtype()), plan.ids_restore


def _embeds(self: nn.Module, images: object, noise: object, interpolate: object) -> bool:
    """Whether the embeddings are of the kind that the kernels serve."""
    patches = self.patch_embeddings
    proj = patches.projection
    if layers.hooked(patches) or torch.jit.is_tracing():
        return False
    if not layers.takes(images, proj) or not 0 <= self.config.mask_ratio <= 1:
        return False
    sizes, kernel = tuple(images.shape[2:]), proj.kernel_size
    if any(size < k or size % k for size, k in zip(sizes, kernel)):
        return False
    if not interpolate and sizes != tuple(patches.image_size):
        return False
    if noise is None:
        return True
    count = (sizes[0] // kernel[0]) * (sizes[1] // kernel[1])
    fits = isinstance(noise, Tensor) and noise.is_floating_point() and noise.device == images.device
    return fits and tuple(noise.shape) == (len(images), count)


def model_forward(self: nn.Module, pixel_values: Tensor | None = None, noise: Tensor | None = None, *args, **kwargs):
    options = dict(kwargs)
    interpolate = options.pop("interpolate_pos_encoding", None)
    encoder = getattr(self, "encoder", None)
    watched = encoder is not None and layers.hooked(encoder)
    if args or watched or pixel_values is None or not _hf.usual_call(self, options):
        return _swap.fall_back(self, "forward")(pixel_values, noise, *args, **kwargs)
    x, mask, ids_restore = self.embeddings(pixel_values, noise=noise, interpolate_pos_encoding=bool(interpolate))
    x, delta = run_blocks(_layers_of(self), x)
    latent = layers.last_norm(self.layernorm, x, delta)
    output = _swap.setting(self, "output")(last_hidden_state=latent, mask=mask, ids_restore=ids_restore)
    return _hf.answer(output, options)


# --- decoder and loss ---------------------------------------------------------------------------------------


def decoder_forward(self: nn.Module, hidden_states: Tensor, ids_restore, interpolate_pos_encoding: bool = False):
    plan, pred = ids_restore if isinstance(ids_restore, Order) else (None, "full")
    if not _decodes(self, hidden_states, ids_restore if plan is None else plan.slot, plan, interpolate_pos_encoding):
        ids_restore = ids_restore if plan is None else plan.ids_restore
        out = _swap.fall_back(self, "forward")(hidden_states, ids_restore, interpolate_pos_encoding)
        if pred == "masked":
            out.logits = _masked_rows(out.logits, plan)
        return out
    if plan is None:
        plan = layers.ordered(ids_restore, hidden_states.shape[1] - 1)
        if plan is None:
            return _swap.fall_back(self, "forward")(hidden_states, ids_restore, interpolate_pos_encoding)
    pos = self.decoder_pos_embed
    if interpolate_pos_encoding:
        pos = self.interpolate_pos_encoding(self.mask_token.expand(1, 1 + plan.num_tokens, -1))  # asked for its shape
    x = layers.linear(self.decoder_embed, hidden_states)
    order = "position" if pred == "full" else "visible_first"
    x = ops.restore_tokens(x, plan, self.mask_token, pos=pos, prefix=1, order=order)
    # The last layer is asked for what is predicted only: the class token never is.
    x, delta = run_tail(self.decoder_layers, x, plan.num_tokens if pred == "full" else plan.max_masked)
    logits = layers.linear(self.decoder_pred, layers.norm(self.decoder_norm, x, delta)[1])
    return _swap.setting(self, "output")(logits=logits)


def _decodes(
    self: nn.Module, hidden_states: object, ids_restore: object, plan: TokenMask | None, interpolate: object
) -> bool:
    for tensor in (hidden_states, ids_restore):
        if not isinstance(tensor, Tensor) or tensor.device != self.mask_token.device:
            return False
    if hidden_states.ndim != 3 or not len(hidden_states) or hidden_states.shape[1] < 1:
        return False
    # Others would see tokens left out that nobody predicts, or may mix them, or draw a number for each.
    if not (layers.plain_norm(self.decoder_norm) and layers.plain_linear(self.decoder_pred)):
        return False
    if plan is None:
        count = ids_restore.shape[-1]
        if ids_restore.ndim != 2 or ids_restore.dtype not in (torch.int32, torch.int64):
            return False
        if len(ids_restore) != len(hidden_states) or hidden_states.shape[1] > count + 1:
            return False
    else:
        count = plan.num_tokens
    return bool(interpolate) or self.decoder_pos_embed.shape[1] == count + 1


def _masked_rows(logits: Tensor, plan: TokenMask) -> Tensor:
    return ops.gather_tokens(logits, plan, "masked")


def _scores(model: nn.Module, images: object, logits: object, interpolate: object) -> bool:
    """Whether the loss is one that the kernel computes; what `patchify` refuses is left to it."""
    patch = model.config.patch_size
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or not len(images):
        return False
    height, width = images.shape[2:]
    if not isinstance(patch, int) or min(height, width) < patch or height % patch or width % patch:
        return False
    if images.shape[1] != model.config.num_channels or (height != width and not interpolate):
        return False
    shape = (len(images), (height // patch) * (width // patch), patch * patch * images.shape[1])
    return logits is None or (isinstance(logits, Tensor) and tuple(logits.shape) == shape)


def _score(model: nn.Module, images: Tensor, logits: Tensor, plan: TokenMask, rows: str, reduction: str) -> Tensor:
    config = model.config
    norm = "mae" if config.norm_pix_loss else "none"
    images = layers.kept_images(images, logits, layers.convolution(_hf.inner(model.vit).embeddings))
    loss = ops.patch_loss(logits, images, plan, config.patch_size, norm=norm, rows=rows, reduction=reduction)
    # The original multiplies by a mask in the default dtype.
    return loss.to(torch.promote_types(layers.share_dtype(logits, images), torch.get_default_dtype()))


def forward_loss(
    self: nn.Module, pixel_values: Tensor, pred: Tensor, mask: Tensor, interpolate_pos_encoding: bool = False
) -> Tensor:
    fits = isinstance(mask, Tensor) and isinstance(pred, Tensor) and mask.shape == pred.shape[:2]
    if not fits or not _scores(self, pixel_values, pred, interpolate_pos_encoding):
        return _swap.fall_back(self, "forward_loss")(pixel_values, pred, mask, interpolate_pos_encoding)
    # The mask may hold any weights, so every patch is scored, as in the original.
    every = TokenMask.all_visible(*pred.shape[:2], pred.device).complement()
    each = _score(self, pixel_values, layers.kept(pred), every, "all", "none").view(mask.shape)
    return (each * mask).sum() / mask.sum()


def forward(self: nn.Module, pixel_values: Tensor | None = None, noise: Tensor | None = None, *args, **kwargs):
    interpolate = kwargs.get("interpolate_pos_encoding")
    return_dict = kwargs.get("return_dict")
    fits = not args and getattr(self.config, "return_dict", True) and _scores(self, pixel_values, None, interpolate)
    if not fits or int(_tokens(self, pixel_values) * (1 - self.config.mask_ratio)) == _tokens(self, pixel_values):
        return _swap.fall_back(self, "forward")(pixel_values, noise, *args, **kwargs)  # without a mask it divides by 0
    options = {k: v for k, v in kwargs.items() if k != "return_dict"}
    outputs = self.vit(pixel_values, noise=noise, **options)
    latent, ids_restore, pred = outputs.last_hidden_state, outputs.ids_restore, _swap.setting(self, "pred")
    plan = _plan(ids_restore, latent.shape[1] - 1)
    ours = is_fast(self.decoder, latent)
    logits = self.decoder(
        latent, Order(plan, pred) if ours else ids_restore, interpolate_pos_encoding=bool(interpolate)
    ).logits
    if pred == "masked" and not ours:
        logits = _masked_rows(logits, plan)
    loss = _score(self, pixel_values, layers.kept(logits), plan, "all" if pred == "full" else "masked", "mean")
    output = _swap.setting(self, "output")(
        loss=loss,
        logits=logits,
        mask=outputs.mask,
        ids_restore=ids_restore,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    return _hf.answer(output, {"return_dict": return_dict})


def _tokens(model: nn.Module, images: Tensor) -> int:
    patch = model.config.patch_size
    return (images.shape[2] // patch) * (images.shape[3] // patch)

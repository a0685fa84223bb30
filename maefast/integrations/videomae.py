"""VideoMAE v1 and v2 of MCG-NJU and OpenGVLab (Tong et al., 2022; Wang et al., 2023): `PretrainVisionTransformer`.

Replaced are `forward_features` of the encoder (only visible tubelets embedded), `forward` of the decoder (last block on
the predicted tokens only) and `forward` of the pair (mask tokens, order and positions in one pass; one plan, one host
sync). Target and loss of this code stand in its training engine, not in the model: `loss` takes their place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maefast import ops
from maefast.integrations import _layers as layers
from maefast.integrations import _swap
from maefast.integrations._steps import Options, Step, given
from maefast.integrations.transformer import Pending, run_blocks, run_tail
from maefast.ops import TokenMask

NAME = "VideoMAE"
LIVE = ("encoder_to_decoder", "decoder", "mask_token", "pos_embed")  # of the pair, see `Step.live`
CHECKPOINTS = ("use_checkpoint", "with_cp")  # the switch of v1, of v2
PLANNED = "mask tokens, order and positions in one pass; one plan for encoder and decoder"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def recognise(module: nn.Module) -> bool:
    return any(kind(module) for kind in (_is_pair, _is_encoder, _is_decoder))


def _is_pair(module: nn.Module) -> bool:
    return (
        all(isinstance(getattr(module, name, None), nn.Module) for name in ("encoder", "decoder"))
        and isinstance(getattr(module, "encoder_to_decoder", None), nn.Module)
        and all(isinstance(getattr(module, name, None), Tensor) for name in ("mask_token", "pos_embed"))
        and _parameters(module, "forward")[:2] == ["x", "mask"]
    )


def _is_encoder(module: nn.Module) -> bool:
    return (
        isinstance(layers.convolution(getattr(getattr(module, "patch_embed", None), "proj", nn.Identity())), nn.Conv3d)
        and isinstance(getattr(module.patch_embed, "img_size", None), (tuple, list))
        and isinstance(getattr(module, "pos_embed", None), Tensor)
        and all(isinstance(getattr(module, name, None), nn.Module) for name in ("blocks", "norm", "head"))
        and _parameters(module, "forward_features") == ["x", "mask"]
    )


def _is_decoder(module: nn.Module) -> bool:
    return (
        all(isinstance(getattr(module, name, None), nn.Module) for name in ("blocks", "norm"))
        and isinstance(getattr(module, "head", None), nn.Module)
        and _parameters(module, "forward") == ["x", "return_token_num"]
    )


def _parameters(module: nn.Module, name: str) -> list[str]:
    """Names of the arguments of a method of the module's class."""
    method = getattr(type(module), name, None)
    return [] if method is None else list(inspect.signature(method).parameters)[1:]


def steps(model: nn.Module, options: Options, keep: Callable[..., None]) -> Iterator[Step]:
    """What to replace; `keep(method, why)` notes what is not."""
    if not _is_pair(model):
        yield from _part(model, keep)
        return
    for name in ("encoder", "decoder"):  # first, so that the probe of the pair runs through them; noted on their own
        for step in _part(getattr(model, name), lambda *args, **kwargs: None):
            yield step.under(name)
    encoder = next((part for part in model.encoder.modules() if _is_encoder(part)), None)
    reason = _swap.overriding(model, "forward") or (None if encoder else "the encoder is unknown")
    if reason:
        keep("forward", reason, gain=PLANNED)
        return
    decodes = "decode_mask" in _parameters(model, "forward")
    shares = _is_encoder(model.encoder) and _swap.overriding(model.encoder, "forward") is None  # hands on what it gets
    inside = ("encoder.forward_features", "encoder.head", "encoder.pos_embed") if shares else ("encoder",)
    yield Step(
        model,
        {"forward": forward},
        {"forward": PLANNED},
        lambda: _pair_probe(model, encoder, decodes),
        frozenset((*inside, *LIVE)),
        settings={"shares": shares, "decodes": decodes},
    )


def _part(part: nn.Module, keep: Callable[..., None]) -> Iterator[Step]:
    """The step of an encoder or decoder, once."""
    if _is_encoder(part):
        name, fast, text = "forward_features", forward_features, "visible tubelets only embedded"
        live = frozenset(("patch_embed.proj", "pos_embed", "blocks", "norm", *CHECKPOINTS))
        reason, probe = layers.strided_patches(part.patch_embed.proj), _encoder_probe
    elif _is_decoder(part):
        name, fast, text = "forward", decoder_forward, "last block on the predicted tokens only"
        live = frozenset(("blocks", "norm", "head", *CHECKPOINTS))
        reason, probe = None, _decoder_probe
    else:
        return
    if reason := reason or _swap.overriding(part, name):
        keep(name, reason, gain=text)
    elif name not in _swap.methods(part):
        yield Step(part, {name: fast}, {name: text}, lambda: probe(part), live)


# --- probes -------------------------------------------------------------------------------------------------


def _pair_probe(model: nn.Module, encoder: nn.Module, decodes: bool) -> list[Tensor]:
    videos, mask = _tubelets(encoder), _mask(encoder)
    calls = [(videos, mask), (videos, mask, _fewer(mask))]
    with _no_checkpoints(model):
        return [model(*args) for args in calls[: 1 + decodes]]


def _encoder_probe(encoder: nn.Module) -> Tensor:
    with _no_checkpoints(encoder):
        return encoder.forward_features(_tubelets(encoder), _mask(encoder))


def _decoder_probe(decoder: nn.Module) -> list[Tensor]:
    weight = layers.inner_linear(decoder.head).weight
    x = given(torch.randn(2, 7, weight.shape[1], device=weight.device, dtype=weight.dtype))
    with _no_checkpoints(decoder):
        return [decoder(x, count) for count in (4, 0)]


@contextmanager
def _no_checkpoints(module: nn.Module) -> Iterator[None]:
    """Inside, blocks are called without checkpoints: their default kind refuses the gradients that are compared."""
    kept = [(part, name) for part in module.modules() for name in CHECKPOINTS if getattr(part, name, False)]
    try:
        for part, name in kept:
            setattr(part, name, False)
        yield
    finally:
        for part, name in kept:
            setattr(part, name, True)


def _tubelets(encoder: nn.Module) -> Tensor:
    """Two videos of the size that the encoder takes."""
    proj = layers.convolution(encoder.patch_embed.proj)
    height, width = encoder.patch_embed.img_size
    pt, ph, pw = proj.kernel_size
    frames = encoder.pos_embed.shape[1] // ((height // ph) * (width // pw)) * pt
    like = {"device": proj.weight.device, "dtype": proj.weight.dtype}
    return given(torch.randn(2, proj.in_channels, frames, height, width, **like))


def _mask(encoder: nn.Module) -> Tensor:
    """Few visible tokens, other ones in each sample: bool [2, N]."""
    num_tokens = encoder.pos_embed.shape[1]
    rank = torch.rand(2, num_tokens, device=layers.convolution(encoder.patch_embed.proj).weight.device).argsort(1)
    return rank >= max(1, min(num_tokens // 4, 16))


def _fewer(mask: Tensor) -> Tensor:
    """A decode mask: every other masked token and a visible one are decoded."""
    decoded = mask & (mask.cumsum(1) % 2 == 0)
    return ~(decoded | (~mask & ((~mask).cumsum(1) == 1)))


# --- the methods --------------------------------------------------------------------------------------------


def _uniform(*masks: Tensor) -> list[int | None]:
    """How many False entries each row has, for every mask, at the price of one host sync; None where rows differ."""
    counts = torch.stack([(~mask).sum(1) for mask in masks]).tolist()
    return [row[0] if min(row) == max(row) else None for row in counts]


def _is_mask(mask: object, x: object, num_tokens: int) -> bool:
    """bool [B, N] beside x of batch B; every other mask is left to the original."""
    return (
        isinstance(x, Tensor)
        and isinstance(mask, Tensor)
        and mask.dtype is torch.bool
        and tuple(mask.shape) == (x.shape[0], num_tokens)
        and mask.device == x.device
        and len(x) > 0
    )


def _plan(mask: Tensor, visible: int) -> TokenMask:
    return TokenMask.from_scores(mask.float(), visible, order="position")


def _usual(encoder: nn.Module, x: Tensor) -> bool:
    """Videos that the encoder would take; what it would refuse is left to it."""
    embed, proj = encoder.patch_embed, encoder.patch_embed.proj
    if not layers.takes(x, proj, 5) or layers.hooked(embed, proj):
        return False
    sizes, patch = tuple(x.shape[2:]), proj.kernel_size
    grid = [size // k for size, k in zip(sizes, patch)]
    return (
        sizes[1:] == tuple(embed.img_size)
        and all(size % k == 0 for size, k in zip(sizes, patch))
        and encoder.pos_embed.shape[1] == grid[0] * grid[1] * grid[2]
    )


def _checkpointed(part: nn.Module) -> bool:
    return any(getattr(part, name, False) for name in CHECKPOINTS)


def _through_checkpoints(part: nn.Module, x: Tensor) -> Tensor:
    for block in part.blocks:
        x = checkpoint(block, x)  # as the original calls it, with the default of the installed torch
    return x


def forward_features(self: nn.Module, x: Tensor, mask: Tensor | TokenMask, *args, **kwargs):
    plan = None
    if not args and not kwargs and _usual(self, x):
        plan = mask if isinstance(mask, TokenMask) else None
        if _is_mask(mask, x, self.pos_embed.shape[1]):
            (count,) = _uniform(mask)
            plan = _plan(mask, count) if count and count < mask.shape[1] else None
    if plan is None:
        mask = mask.mask if isinstance(mask, TokenMask) else mask
        return _swap.fall_back(self, "forward_features")(x, mask, *args, **kwargs)
    proj = self.patch_embed.proj
    # The table, once a step and not once a sample, in the dtype that the convolution would have given.
    pos = self.pos_embed.detach().to(x.device, layers.product_dtype(proj.weight))
    x = ops.patch_embed(x, proj.weight, proj.bias, plan, pos=pos)
    at = Pending(_through_checkpoints(self, x)) if _checkpointed(self) else run_blocks(self.blocks, x)
    return layers.last_norm(self.norm, *at)


def decoder_forward(self: nn.Module, x: Tensor, return_token_num: int, *args, **kwargs):
    usual = isinstance(x, Tensor) and x.ndim == 3 and len(x) > 0 and isinstance(return_token_num, int)
    if args or kwargs or not usual or not 0 <= return_token_num <= x.shape[1]:
        return _swap.fall_back(self, "forward")(x, return_token_num, *args, **kwargs)
    count = return_token_num or x.shape[1]
    if _checkpointed(self):
        at = Pending(_through_checkpoints(self, x)[:, -count:])
    else:
        at = run_blocks(self.blocks, x) if count == x.shape[1] else run_tail(self.blocks, x, count)
    return layers.linear(self.head, layers.norm(self.norm, *at)[1])


def forward(self: nn.Module, x: Tensor, mask: Tensor, *args, **kwargs):
    decode = args[0] if args else kwargs.get("decode_mask")
    known = len(args) + len(kwargs) == int(bool(args or "decode_mask" in kwargs))
    num_tokens = self.pos_embed.shape[1]
    usual = known and (_swap.setting(self, "decodes") or not (args or kwargs)) and _is_mask(mask, x, num_tokens)
    usual = usual and x.is_floating_point() and (decode is None or _is_mask(decode, x, num_tokens))
    counts = [None]
    if usual:
        # Most often what is decoded is what is masked: then the third mask is all False.
        counts = _uniform(mask) if decode is None else _uniform(mask, decode, ~(mask ^ decode))
    if not counts[0] or counts[0] == num_tokens or (decode is not None and not counts[1]):
        return _swap.fall_back(self, "forward")(x, mask, *args, **kwargs)
    plan = _plan(mask, counts[0])
    share = _swap.setting(self, "shares") and not layers.hooked(self.encoder)
    share = share and _swap.runs_fast(self.encoder, "forward_features", x)
    latent = layers.linear(self.encoder_to_decoder, self.encoder(x, plan if share else mask))
    pos = self.pos_embed.detach().to(x.device, x.dtype)
    if decode is None or counts[2] == num_tokens:
        full = ops.restore_tokens(latent, plan, self.mask_token, pos=pos, order="visible_first")
        return self.decoder(full, num_tokens - counts[0])
    decoded = _plan(decode, counts[1]).ids_keep
    full = torch.cat([latent + pos[0][plan.ids_keep], self.mask_token + pos[0][decoded]], 1)
    return self.decoder(full, counts[1])


# --- the loss of the training engine ------------------------------------------------------------------------


def loss(
    pred: Tensor,
    videos: Tensor,
    mask: Tensor,
    *,
    normalize_target: bool = True,
    mean: Sequence[float] | None = IMAGENET_MEAN,
    std: Sequence[float] | None = IMAGENET_STD,
    patch_size: int | tuple[int, int] = 16,
    tubelet_size: int = 2,
    decode_mask: Tensor | None = None,
) -> Tensor:
    """What the training engines of VideoMAE v1 and v2 compute from the model's output; no target tensor is built.

    The videos are brought back to [0, 1] by ``videos * std + mean``. The target of a tubelet is its pixels t in the
    order (tubelet, patch row, patch column, channel), with `normalize_target` per channel as
    ``(t - mean) / (sqrt(unbiased_var) + 1e-6)``. v1: mean squared error over the masked tubelets. v2: over those that
    are masked and decoded. No gradient goes to the videos.

    In a loop, in place of the lines that build `labels` and call the loss::

        outputs = model(videos, mask)                              # v2: model(videos, mask, decode_mask)
        loss = videomae.loss(outputs, videos, mask)                # v2: ..., mask, decode_mask=decode_mask)

    Args:
        pred: [B, M, K], the model's output, M masked (or decoded) tubelets, K = C * tubelet_size * patch pixels.
        videos: [B, C, T, H, W], as the model took them. mask: bool [B, N] or [B, ...] of N values, True = masked.
        mean, std: C values each, with which the videos were normalised; both None if they were not.
        decode_mask: as `mask`, of v2's decoder, True = not decoded. v2's collator sends ``~mask`` for "all masked".

    Returns:
        Scalar, float32 (float64 if pred or videos is). NaN if nothing decoded is masked, as the engine's.

    Raises:
        TypeError, ValueError: shapes do not fit, samples mask different numbers (on a GPU a device-side assertion, so
        that there is no sync), only one of mean and std.
    """
    if (mean is None) != (std is None):
        raise ValueError("give both mean and std, or None for both")
    mask = mask.flatten(1).to(torch.bool)
    scored = mask if decode_mask is None else ~decode_mask.flatten(1).to(torch.bool)
    if pred.ndim != 3 or not 0 < pred.shape[1] <= scored.shape[1]:
        raise ValueError(f"pred must be [B, masked, K] with at most {scored.shape[1]} rows, got {tuple(pred.shape)}")
    plan = TokenMask.from_bool(scored, keep=scored.shape[1] - pred.shape[1])
    with torch.no_grad():
        videos = videos if mean is None else videos * _channels(std, videos) + _channels(mean, videos)
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    each = ops.patch_loss(
        pred,
        videos.detach(),
        plan,
        (tubelet_size, *patch),
        norm="videomae" if normalize_target else "none",
        reduction="mean" if decode_mask is None else "none",
    )
    if decode_mask is None:
        return each
    weight = mask.flatten()[plan.masked.long()]
    return (each * weight).sum() / weight.sum()


def _channels(values: Sequence[float], videos: Tensor) -> Tensor:
    """[C, 1, 1, 1] on the device, filled there: copying from the host would wait for the device."""
    if len(values) != videos.shape[1]:
        raise ValueError(f"{len(values)} values of mean or std for videos of {videos.shape[1]} channels")
    return torch.stack([torch.full((1, 1, 1), float(value), device=videos.device) for value in values])

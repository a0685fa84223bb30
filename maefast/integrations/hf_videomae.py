"""VideoMAE of Hugging Face transformers, 4 and 5: `VideoMAEForPreTraining` and `VideoMAEModel` (Tong et al., 2022).

Replaced are the embeddings (visible tubelets only), the loop over encoder layers, the decoder (its last layer computes
masked tokens only) and the loss (no target tensor). The mask is read once, which is the only host sync; masks that keep
different numbers of tubelets in the videos of a batch go to the model's own code. The position tables are plain
tensors of the model, and stay that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.integrations import _hf, _swap
from maefast.integrations import _layers as layers
from maefast.integrations._steps import Options, Step, given
from maefast.integrations.transformer import is_fast, run_blocks, run_tail
from maefast.ops import TokenMask, _checks

NAME = "transformers VideoMAE"
VISIBLE, TAIL = "visible tubelets only embedded", "last layer for masked tokens only"
ENCODED, PLANNED = "encoder layers in one run", "one plan through encoder, decoder and loss, no target tensor"
FALLBACK = "; hidden states and attention weights, where asked for, come from the model's own code"


def recognise(module: nn.Module) -> bool:
    return _is_encoder(module) or _is_whole(module)


def _is_encoder(module: nn.Module) -> bool:
    embeddings, encoder = getattr(module, "embeddings", None), getattr(module, "encoder", None)
    return (
        isinstance(getattr(embeddings, "position_embeddings", None), Tensor)
        and isinstance(_projection(embeddings), nn.Conv3d)
        and isinstance(getattr(encoder, "layer", None), nn.ModuleList)
        and hasattr(module, "layernorm")
        and hasattr(getattr(module, "config", None), "tubelet_size")
        and _hf.output_class(module, "BaseModelOutput") is not None
        and _hf.output_class(_hf.inner(encoder), "BaseModelOutput") is not None
    )


def _projection(embeddings: object) -> nn.Module | None:
    """The convolution, maybe inside an adapter."""
    found = getattr(getattr(embeddings, "patch_embeddings", None), "projection", None)
    return layers.convolution(found) if isinstance(found, nn.Module) else None


def _is_whole(module: nn.Module) -> bool:
    videomae, decoder = getattr(module, "videomae", None), getattr(module, "decoder", None)
    return (
        videomae is not None
        and all(hasattr(decoder, name) for name in ("decoder_layers", "norm", "head"))
        and isinstance(getattr(module, "encoder_to_decoder", None), nn.Module)
        and all(isinstance(getattr(module, name, None), Tensor) for name in ("mask_token", "position_embeddings"))
        and _is_encoder(_hf.inner(videomae))
        and _hf.output_class(module, "VideoMAEForPreTrainingOutput") is not None
        and _hf.output_class(_hf.inner(decoder), "VideoMAEDecoderOutput") is not None
    )


def steps(model: nn.Module, options: Options, keep: Callable[..., None]) -> Iterator[Step]:
    yield from (_whole_steps if _is_whole(model) else _encoder_steps)(model, keep)


def _encoder_steps(model: nn.Module, keep: Callable[..., None]) -> Iterator[Step]:
    embeddings, encoder = _hf.inner(model.embeddings), _hf.inner(model.encoder)
    reason = layers.strided_patches(embeddings.patch_embeddings.projection)
    for part in (embeddings, _hf.inner(embeddings.patch_embeddings)):
        reason = reason or _swap.overriding(part, "forward")
    if reason:
        keep("embeddings.forward", reason, gain=VISIBLE)
    else:
        yield Step(
            embeddings,
            {"forward": embeddings_forward},
            {"forward": VISIBLE},
            lambda: embeddings(*_videos(model)),
            frozenset(("patch_embeddings.projection", "position_embeddings")),
            path="embeddings",
        )
    inside = _swap.overriding(encoder, "forward")
    if inside:
        keep("encoder.forward", inside)
    if reason := _swap.overriding(model, "forward") or (inside and "it calls the encoder, which stays as it is"):
        keep("forward", reason, gain=ENCODED)
        return
    yield Step(
        model,
        {"forward": model_forward},
        {"forward": ENCODED + FALLBACK},
        lambda: model(*_videos(model)),
        frozenset(("embeddings", "layernorm", "encoder.layer")) | _hf.LIVE,
        settings={"output": _hf.output_class(model, "BaseModelOutput")},
    )


def _whole_steps(model: nn.Module, keep: Callable[..., None]) -> Iterator[Step]:
    decoder, videomae = _hf.inner(model.decoder), _hf.inner(model.videomae)
    if reason := _swap.overriding(decoder, "forward"):
        keep("decoder.forward", reason, gain=TAIL)
    else:
        yield Step(
            decoder,
            {"forward": decoder_forward},
            {"forward": TAIL},
            lambda: decoder(_tokens(decoder), 5),
            frozenset(("decoder_layers", "norm", "head")) | _hf.LIVE,
            settings={"output": _hf.output_class(decoder, "VideoMAEDecoderOutput")},
            path="decoder",
        )
    if reason := _swap.overriding(model, "forward"):
        keep("forward", reason, gain=PLANNED)
        return
    # The means and standard deviations with which the model undoes the normalisation of its videos.
    known = inspect.unwrap(type(model).forward).__globals__
    statistics = tuple(tuple(known.get(f"IMAGENET_DEFAULT_{name}", ())) for name in ("MEAN", "STD"))
    yield Step(
        model,
        {"forward": forward},
        {"forward": PLANNED},
        lambda: model(*_videos(videomae)),
        frozenset(("videomae", "decoder", "encoder_to_decoder", "mask_token", "position_embeddings")) | _hf.LIVE,
        settings={"output": _hf.output_class(model, "VideoMAEForPreTrainingOutput"), "statistics": statistics},
    )


# --- probes -------------------------------------------------------------------------------------------------


def _videos(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Two videos, one of low contrast, where the epsilon of normalised targets shows; nine in ten tubelets masked."""
    embeddings = _hf.inner(model.embeddings)
    patches = _hf.inner(embeddings.patch_embeddings)
    like, count = layers.convolution(patches.projection).weight, embeddings.position_embeddings.shape[1]
    shape = (2, model.config.num_frames, like.shape[1], *patches.image_size)
    videos = torch.randn(shape, device=like.device, dtype=like.dtype)
    videos[1] *= 1e-3
    videos = given(videos)
    masked = torch.rand(2, count, device=like.device).argsort(1) >= max(1, count // 10)
    return videos, masked


def _tokens(decoder: nn.Module) -> Tensor:
    like = decoder.norm.weight
    return given(torch.randn(2, 8, like.shape[0], device=like.device, dtype=like.dtype))


# --- the encoder --------------------------------------------------------------------------------------------


def _plan(masked: object, videos: Tensor, count: int) -> TokenMask | None:
    """The plan of a mask that leaves as many tubelets visible in each video, some but not all; None otherwise."""
    if isinstance(masked, TokenMask):
        return masked
    if not isinstance(masked, Tensor) or masked.dtype is not torch.bool or masked.device != videos.device:
        return None
    if tuple(masked.shape) != (len(videos), count):
        return None
    plan = TokenMask.from_bool(masked)
    return plan if plan.keep and plan.keep < count else None


def embeddings_forward(self: nn.Module, pixel_values: Tensor, bool_masked_pos) -> Tensor:
    patches, table = self.patch_embeddings, self.position_embeddings
    plan = None
    fits = not layers.hooked(patches) and _videos_fit(pixel_values, patches, table.shape[1])
    if fits and bool_masked_pos is not None:
        plan = _plan(bool_masked_pos, pixel_values, table.shape[1])
    if not fits or (plan is None and bool_masked_pos is not None):
        masked = bool_masked_pos.mask if isinstance(bool_masked_pos, TokenMask) else bool_masked_pos
        return _swap.fall_back(self, "forward")(pixel_values, masked)
    proj = patches.projection
    # The original adds positions in the dtype in which its convolution answers.
    pos = _hf.moved(table, pixel_values, layers.product_dtype(proj.weight))
    return ops.patch_embed(pixel_values.transpose(1, 2), proj.weight, proj.bias, plan, pos=pos)


def _videos_fit(videos: object, patches: nn.Module, count: int) -> bool:
    proj = patches.projection
    if torch.jit.is_tracing():
        return False
    if not layers.takes(videos, proj, 5, 2) or tuple(videos.shape[3:]) != tuple(patches.image_size):
        return False
    sizes, kernel = (videos.shape[1], *videos.shape[3:]), proj.kernel_size
    if any(size < k or size % k for size, k in zip(sizes, kernel)):
        return False
    grid = [size // k for size, k in zip(sizes, kernel)]
    return grid[0] * grid[1] * grid[2] == count


def model_forward(self: nn.Module, pixel_values: Tensor, bool_masked_pos=None, *args, **kwargs):
    if args or layers.hooked(self.encoder) or not _hf.usual_call(self, kwargs):
        return _swap.fall_back(self, "forward")(pixel_values, bool_masked_pos, *args, **kwargs)
    x = self.embeddings(pixel_values, bool_masked_pos)
    if not x.numel():  # nothing is visible: for the attention to refuse
        return _swap.fall_back(self, "forward")(pixel_values, bool_masked_pos, **kwargs)
    at = run_blocks(self.encoder.layer, x)
    x = at.value() if self.layernorm is None else layers.last_norm(self.layernorm, *at)
    return _hf.answer(_swap.setting(self, "output")(last_hidden_state=x), kwargs)


# --- decoder and loss ---------------------------------------------------------------------------------------


def decoder_forward(self: nn.Module, hidden_states: Tensor, return_token_num: int):
    count = return_token_num
    fits = isinstance(hidden_states, Tensor) and hidden_states.ndim == 3 and isinstance(count, (int, torch.SymInt))
    if not fits or not len(hidden_states) or not 0 < count <= hidden_states.shape[1]:
        return _swap.fall_back(self, "forward")(hidden_states, return_token_num)
    x, delta = run_tail(self.decoder_layers, hidden_states, count)
    logits = layers.linear(self.head, layers.norm(self.norm, x, delta)[1])
    return _swap.setting(self, "output")(logits=logits)


def forward(self: nn.Module, pixel_values: Tensor, bool_masked_pos, *args, **kwargs):
    plan = None
    if not args and _scores(self, pixel_values):
        plan = _plan(bool_masked_pos, pixel_values, self.position_embeddings.shape[1])
    if plan is None:
        return _swap.fall_back(self, "forward")(pixel_values, bool_masked_pos, *args, **kwargs)
    options = {k: v for k, v in kwargs.items() if k != "return_dict"}
    # The mask is read once: our own code takes the plan in its place.
    ours = is_fast(self.videomae, pixel_values) and is_fast(_hf.inner(self.videomae).embeddings, pixel_values)
    outputs = self.videomae(pixel_values, bool_masked_pos=plan if ours else bool_masked_pos, **options)
    x = layers.linear(self.encoder_to_decoder, outputs.last_hidden_state)
    pos = _hf.moved(self.position_embeddings, pixel_values, pixel_values.dtype)
    x = ops.restore_tokens(x, plan, self.mask_token, pos=pos, order="visible_first")
    logits = self.decoder(x, plan.max_masked).logits
    output = _swap.setting(self, "output")(
        loss=_score(self, pixel_values, layers.kept(logits), plan),
        logits=logits,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    return _hf.answer(output, {"return_dict": kwargs.get("return_dict")})


def _scores(model: nn.Module, videos: object) -> bool:
    """Whether the loss is one that the kernel computes."""
    config = model.config
    if not getattr(config, "return_dict", True) or (config.num_channels != 3 and not config.norm_pix_loss):
        return False  # the last raises
    if config.num_channels == 3 and [len(s) for s in _swap.setting(model, "statistics")] != [3, 3]:
        return False
    patch = (config.tubelet_size, config.patch_size, config.patch_size)
    if not all(isinstance(size, int) for size in patch) or patch[0] * patch[1] * patch[2] < 2:
        return False
    patches = _hf.inner(_hf.inner(_hf.inner(model.videomae).embeddings).patch_embeddings)
    fits = _videos_fit(videos, patches, model.position_embeddings.shape[1])
    return fits and tuple(patches.projection.kernel_size) == patch


def _score(model: nn.Module, videos: Tensor, logits: Tensor, plan: TokenMask) -> Tensor:
    """Mean squared error over masked tubelets; the videos, back in [0, 1], are normalised per channel and tubelet."""
    config = model.config
    frames = videos.detach().transpose(1, 2)
    if config.num_channels == 3:
        mean, std = (
            torch.as_tensor(s, dtype=videos.dtype, device=videos.device).view(1, 3, 1, 1, 1)
            for s in _swap.setting(model, "statistics")
        )
        frames = frames * std + mean
    else:
        frames = layers.kept_images(frames, logits, layers.convolution(_hf.inner(model.videomae).embeddings))
    patch = (config.tubelet_size, config.patch_size, config.patch_size)
    loss = ops.patch_loss(logits, frames, plan, patch, norm="videomae" if config.norm_pix_loss else "none")
    dtype = layers.share_dtype(logits, videos)
    if _checks.autocast(videos.device.type) is not None:  # which computes this error in float32
        dtype = torch.promote_types(dtype, torch.float32)
    return loss.to(dtype)

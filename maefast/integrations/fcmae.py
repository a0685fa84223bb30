"""FCMAE (Woo et al., 2023) as its public code has it: a ConvNeXt V2 encoder of MinkowskiEngine layers, a dense decoder.

The encoder is computed on packed cells from the parameters of its layers (`kernel` [k * k, Cin, Cout], `norm.ln`,
`pwconv1.linear`, ...), so that no function of MinkowskiEngine runs, and no coordinate map is built. Its GRN sums over
the active sites of the whole batch, as that code does. Mask, predictions and loss keep their contracts.

One case differs: a visible site whose stem features are all exactly zero is no site for MinkowskiEngine, and is one
here. It takes a norm without bias over equal numbers, such as a black patch before the first step.

Without MinkowskiEngine such a model cannot be built; `maefast.models.public_fcmae` stands for it then, with the
same parameters under the same names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.integrations import _layers as layers
from maefast.integrations import _swap
from maefast.integrations._steps import Options, Step
from maefast.models.convnames import dense_kernel
from maefast.nn.cells import Cells
from maefast.ops import CellMask, TokenMask

NAME = "facebookresearch/ConvNeXt-V2 FCMAE"
TOKENS = False  # as in `spark`
METHODS = ("forward", "forward_encoder", "forward_decoder", "forward_loss", "gen_random_mask", "patchify")
MODULES = ("encoder", "proj", "decoder", "pred")
BLOCK = ("dwconv", "norm", "pwconv1", "act", "pwconv2", "grn", "drop_path")
EPS = 1e-6  # of a GRN, written into its code
# What our methods read at every call, see `Step.live`.
SPARSE = {f"downsample_layers.{name}" for name in ("0.0", "0.1.weight", "*.*.kernel", "*.*.bias")}
SPARSE |= {f"stages.*.*.{name}" for name in ("dwconv.kernel", "dwconv.bias", "drop_path.drop_prob")}
SPARSE |= {f"stages.*.*.{name}" for name in ("grn.gamma", "grn.beta")}
DENSE = {f"decoder.*.{name}" for name in ("dwconv", "norm.weight", "norm.bias", "pwconv1", "act", "pwconv2")}
DENSE |= {f"decoder.*.{name}" for name in ("grn.gamma", "grn.beta", "drop_path")} | {"proj", "pred", "mask_token"}


def recognise(module: nn.Module) -> bool:
    return (
        all(hasattr(module, name) for name in METHODS)
        and all(isinstance(getattr(module, name, None), nn.Module) for name in MODULES)
        and isinstance(getattr(module, "mask_token", None), Tensor)
        and hasattr(module, "norm_pix_loss")
        and isinstance(getattr(module, "patch_size", None), int)
        and _unlike(module.encoder) is None
    )


def _unlike(encoder: nn.Module) -> str | None:
    """Why this is not the sparse encoder, or None."""
    downsample, stages = getattr(encoder, "downsample_layers", None), getattr(encoder, "stages", None)
    if not isinstance(downsample, nn.ModuleList) or not isinstance(stages, nn.ModuleList):
        return "it has no downsample_layers and stages"
    if len(downsample) != len(stages) or any(len(layer) != 2 for layer in downsample):
        return "its stages are others"
    if type(downsample[0][0]) is not nn.Conv2d or not hasattr(downsample[0][1], "eps"):
        return "its stem is another"
    for norm, conv in list(downsample)[1:]:
        if not isinstance(getattr(norm, "ln", None), nn.LayerNorm) or not _sparse_conv(conv, 3):
            return "its downsampling layers are not MinkowskiEngine's"
    for block in (block for stage in stages for block in stage):
        if not all(hasattr(block, name) for name in BLOCK) or not _sparse_conv(block.dwconv, 2):
            return "its blocks are not MinkowskiEngine's"
        linears = all(isinstance(getattr(p, "linear", None), nn.Linear) for p in (block.pwconv1, block.pwconv2))
        if not linears or not isinstance(getattr(block.norm, "ln", None), nn.LayerNorm):
            return "its blocks are not MinkowskiEngine's"
    return None


def _sparse_conv(module: nn.Module, ndim: int) -> bool:
    own = getattr(module, "_parameters", {})  # unread, see `layers.parametrised`
    kernel, bias = own.get("kernel"), own.get("bias")
    return isinstance(kernel, nn.Parameter) and kernel.ndim == ndim and isinstance(bias, nn.Parameter)


def steps(model: nn.Module, options: Options, keep: Callable[..., None]) -> Iterator[Step]:
    """What to replace; `keep(method, why)` notes what is not."""
    root = _swap.root_class(type(model), METHODS)
    kept = {name: _swap.overridden(model, name, root) for name in METHODS}
    kept["encoder.forward"] = _swap.overriding(model.encoder, "forward")
    kept["forward_loss"] = kept["forward_loss"] or kept["patchify"]
    images, mask = _probe(model)

    def step(name: str, fast: Callable, text: str, probe: Callable, live: Iterable = (), **settings) -> Iterator[Step]:
        path, _, method = name.rpartition(".")
        if kept[name]:
            keep(name, kept[name], gain=text)
            return
        module = model.get_submodule(path)
        yield Step(
            module, {method: fast}, {method: text}, probe, frozenset(live), hooks=False, settings=settings, path=path
        )
        if method not in _swap.methods(module):
            kept[name] = "it is not what it looks like"

    text = "active cells alone, from the parameters of the sparse layers; nothing of MinkowskiEngine runs"
    yield from step("encoder.forward", encode, text, lambda: model.encoder(images, mask), SPARSE)
    text = "pointwise layers as matrix products, norms and GELU fused"
    latent = _latent(model, mask)
    yield from step("forward_decoder", forward_decoder, text, lambda: model.forward_decoder(*latent), DENSE)
    text = "pixels read in place, no target tensor"
    yield from step("forward_loss", forward_loss, text, lambda: model.forward_loss(images, *_scored(model, mask)))
    parts = ("encoder.forward", "forward_encoder", "forward_decoder", "forward_loss")
    missing = [name for name in parts if kept[name]]
    if missing and not kept["forward"]:
        kept["forward"] = f"it calls {', '.join(missing)}, which stay as they are"
    ratio = inspect.signature(model.forward).parameters.get("mask_ratio")
    settings = {"ratio": 0.6 if ratio is None else ratio.default, "counted": kept["gen_random_mask"] is None}
    text = "one plan through encoder, decoder and loss; the encoder's map is never made"
    live = DENSE | {f"encoder.{name}" for name in SPARSE}
    yield from step("forward", forward, text, lambda: model(images), live, **settings)


# --- probes -------------------------------------------------------------------------------------------------


def _probe(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Two images, one of low contrast, where the epsilon of normalised targets shows, and a mask with both the first
    and the last cell visible: MinkowskiEngine infers the size of the map from its sites."""
    weight = model.proj.weight
    side = int(model.img_size) if hasattr(model, "img_size") else 2 * model.patch_size
    channels = model.encoder.downsample_layers[0][0].in_channels
    images = torch.randn(2, channels, side, side, device=weight.device, dtype=weight.dtype)
    images[1] *= 1e-3
    mask = torch.ones(2, (side // model.patch_size) ** 2, device=weight.device)
    mask[0, ::3] = mask[1, ::2] = mask[:, -1] = 0
    return images, mask


def _latent(model: nn.Module, mask: Tensor) -> tuple[Tensor, Tensor]:
    side = int(mask.shape[1] ** 0.5)
    weight = model.proj.weight
    return torch.randn(2, weight.shape[1], side, side, device=weight.device, dtype=weight.dtype), mask


def _scored(model: nn.Module, mask: Tensor) -> tuple[Tensor, Tensor]:
    side = int(mask.shape[1] ** 0.5)
    weight = model.pred.weight
    pred = torch.randn(2, weight.shape[0], side, side, device=weight.device, dtype=weight.dtype)
    return pred.requires_grad_(), mask


# --- the encoder --------------------------------------------------------------------------------------------


def _stem_fits(encoder: nn.Module, images: Tensor, mask: Tensor) -> bool:
    """Images and a mask [B, L] that the encoder would take."""
    stem = encoder.downsample_layers[0][0]
    if not all(isinstance(t, Tensor) for t in (images, mask)) or images.ndim != 4 or mask.ndim != 2:
        return False
    side, ratio = int(mask.shape[1] ** 0.5), stem.stride[0] * 2 ** (len(encoder.stages) - 1)
    fits = tuple(images.shape) == (len(mask), stem.in_channels, side * ratio, side * ratio) and len(mask)
    fits = bool(fits) and side * side == mask.shape[1] and not layers.parametrised(stem)
    return fits and layers.conv_dtype_fits(images, stem)


def _ready(encoder: nn.Module) -> bool:
    """Whether the layers inside may be passed over now, and their random numbers can be drawn."""
    if any(layers.watched(child) for child in encoder.children()) or _unlike(encoder):
        return False
    paths = (block.drop_path for stage in encoder.stages for block in stage)
    return all(_rate(path) == 0 or _source(path) is not None for path in paths)


def _rate(path: nn.Module) -> float:
    return getattr(path, "drop_prob", 0.0) if path.training else 0.0


def _source(path: nn.Module):
    """The generator that a drop path draws from: `random` in its module is numpy's in the public code."""
    source = getattr(inspect.unwrap(type(path).forward), "__globals__", {}).get("random")
    return getattr(source, "uniform", None)


def encode(self: nn.Module, x: Tensor, mask: Tensor, *args, **kwargs):
    if args or kwargs or not _stem_fits(self, x, mask) or not _ready(self):
        return _swap.fall_back(self, "forward")(x, mask, *args, **kwargs)
    visible = mask == 0
    counts = torch.stack([visible.sum(1), (mask == 1).sum(1)]).tolist()
    if any(kept + removed != mask.shape[1] for kept, removed in zip(*counts)) or not sum(counts[0]):
        return _swap.fall_back(self, "forward")(x, mask)
    return cells(self, x, _plan(~visible, counts[0])).dense()


def _plan(masked: Tensor, keep: int | list[int] | None) -> CellMask:
    side = int(masked.shape[1] ** 0.5)
    return CellMask.from_bool(masked.view(-1, side, side), keep)


def cells(encoder: nn.Module, images: Tensor, plan: CellMask) -> Cells:
    """The last level."""
    stem, norm = encoder.downsample_layers[0]
    x = layers.norm_rows(norm, stem(Cells.pack(images, plan)).rows)
    for i, stage in enumerate(encoder.stages):
        if i:
            norm, conv = encoder.downsample_layers[i]
            weight = dense_kernel(conv.kernel)
            x = ops.conv_cells(layers.norm_rows(norm.ln, x), plan, weight, conv.bias.flatten(), weight.shape[-1])
        for block in stage:
            x = x + _drop(block.drop_path, _branch(block, x, plan), plan)
    return Cells(x, plan)


def _branch(block: nn.Module, x: Tensor, plan: CellMask) -> Tensor:
    weight = dense_kernel(block.dwconv.kernel)
    y = ops.conv_cells(x, plan, weight, block.dwconv.bias.flatten(), 1, weight.shape[-1] // 2, 1, len(weight))
    first, second = block.pwconv1.linear, block.pwconv2.linear
    y = ops.bias_gelu(ops.linear(layers.norm_rows(block.norm.ln, y), first.weight), first.bias)
    y = ops.grn(y, plan, block.grn.gamma, block.grn.beta, EPS, "batch")
    return ops.linear(y, second.weight, second.bias)


def _drop(path: nn.Module, y: Tensor, plan: CellMask) -> Tensor:
    """Stochastic depth of whole samples, drawn as that code does: one number a sample, on the host."""
    rate = _rate(path)
    if rate == 0:
        return y
    factor = torch.tensor(_draw(path, rate, plan.batch)).to(y.device, non_blocking=True)
    if rate < 1 and getattr(path, "scale_by_keep", True):
        factor = factor / (1 - rate)
    return (Cells(y, plan) * factor[:, None, None, None]).rows


@torch._disable_dynamo  # without importing it, see `maefast.optim`
def _draw(path: nn.Module, rate: float, batch: int) -> list[float]:
    uniform = _source(path)
    return [float(uniform(0, 1) > rate) for _ in range(batch)]


# --- the decoder and the loss -------------------------------------------------------------------------------


def _pointwise(conv: nn.Module) -> bool:
    return type(conv) is nn.Conv2d and conv.weight.shape[2:] == (1, 1) and conv.groups == 1 and not layers.hooked(conv)


def _point(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution of a map [B, C, H, W], or the layer as it is."""
    if not _pointwise(conv):
        return conv(x)
    return ops.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def _dense_block(block: nn.Module) -> bool:
    """A block of the dense ConvNeXt V2 that nobody looks into."""
    own = block._modules
    return (
        all(name in own for name in BLOCK)
        and type(own["dwconv"]) is nn.Conv2d
        and all(layers.plain_linear(own[name]) for name in ("pwconv1", "pwconv2"))
        and not any(layers.parametrised(own[name]) for name in ("norm", "grn"))
        and all(hasattr(own["norm"], name) for name in ("weight", "bias", "eps"))
        and all(hasattr(own["grn"], name) for name in ("gamma", "beta"))
        and layers.gelu(own["act"]) == "none"
        and not layers.watched(block)
    )


def _decoder(decoder: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(decoder, nn.Sequential) or layers.hooked(decoder):
        return decoder(x)
    for block in decoder:
        if not _dense_block(block):
            x = block(x)
            continue
        y = layers.norm_rows(block.norm, block.dwconv(x).permute(0, 2, 3, 1))
        y = ops.bias_gelu(ops.linear(y, block.pwconv1.weight), block.pwconv1.bias)
        y = ops.grn(y, None, block.grn.gamma, block.grn.beta, EPS, "dense")
        y = ops.linear(y, block.pwconv2.weight, block.pwconv2.bias)
        x = x + block.drop_path(y.permute(0, 3, 1, 2))
    return x


def forward_decoder(self: nn.Module, x: Tensor, mask: Tensor, *args, **kwargs):
    side = int(mask.shape[1] ** 0.5) if mask.ndim == 2 else -1
    fits = x.ndim == 4 and len(x) and tuple(x.shape[2:]) == (side, side) and side * side == mask.shape[1]
    if args or kwargs or not fits:
        return _swap.fall_back(self, "forward_decoder")(x, mask, *args, **kwargs)
    x = _point(self.proj, x)
    weight = mask.view(-1, 1, side, side).to(x.dtype)
    x = x * (1 - weight) + self.mask_token * weight
    return _point(self.pred, _decoder(self.decoder, x))


def _square(model: nn.Module, images: Tensor) -> bool:
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        return False
    return images.shape[2] == images.shape[3] and images.shape[2] % model.patch_size == 0


def forward_loss(self: nn.Module, imgs: Tensor, pred: Tensor, mask: Tensor, *args, **kwargs):
    rows = pred.flatten(2).transpose(1, 2) if pred.ndim == 4 else pred
    if args or kwargs or not _square(self, imgs) or rows.ndim != 3 or mask.shape != rows.shape[:2]:
        return _swap.fall_back(self, "forward_loss")(imgs, pred, mask, *args, **kwargs)
    # The mask may hold any weights, so every patch is scored, as in the original.
    every = TokenMask.all_visible(*rows.shape[:2], rows.device).complement()
    each = _score(self, imgs, layers.kept(rows), every, "none").view(mask.shape)
    return (each * mask).sum() / mask.sum()


def _score(model: nn.Module, images: Tensor, rows: Tensor, plan: TokenMask, reduction: str) -> Tensor:
    norm = "mae" if model.norm_pix_loss else "none"
    images = layers.kept_images(images, rows, layers.convolution(model.encoder))
    loss = ops.patch_loss(rows, images, plan, model.patch_size, norm=norm, rows="all", reduction=reduction)
    return loss.to(torch.promote_types(rows.dtype, images.dtype))


def forward(self: nn.Module, imgs: Tensor, labels: object = None, mask_ratio: float = ..., *args, **kwargs):
    ratio = _swap.setting(self, "ratio") if mask_ratio is ... else mask_ratio  # None is one that the original refuses
    if args or kwargs or not _square(self, imgs) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
        return _swap.fall_back(self, "forward")(imgs, labels, ratio, *args, **kwargs)
    mask = self.gen_random_mask(imgs, ratio)
    number = (imgs.shape[2] // self.patch_size) ** 2
    keep = int(number * (1 - ratio))
    whole = _swap.setting(self, "counted") and 0 < keep < number and _stem_fits(self.encoder, imgs, mask)
    if not whole or layers.hooked(self.encoder) or not _ready(self.encoder):
        pred = self.forward_decoder(self.encoder(imgs, mask), mask)
        return self.forward_loss(imgs, pred, mask), pred, mask
    plan = _plan(mask.bool(), keep)
    last = cells(self.encoder, imgs, plan)
    if _pointwise(self.proj):
        x = Cells(ops.linear(last.rows, self.proj.weight.flatten(1), self.proj.bias), plan)
        x = x.dense(self.mask_token.flatten())
    else:
        x = self.proj(last.dense())
        x = torch.where(plan.mask[:, None], self.mask_token.to(x.dtype), x)
    pred = _point(self.pred, _decoder(self.decoder, x))
    loss = _score(self, imgs, layers.kept(pred).flatten(2).transpose(1, 2), plan.tokens, "mean")
    return loss, pred, mask

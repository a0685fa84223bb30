"""SparK (Tian et al., 2023): the public code's `SparK` around a `SparseEncoder` and a `LightDecoder`, and its forks.

There every convolution runs on the whole map and is multiplied by the mask, and norms gather the active sites. Here
the encoder gets packed cells (`maefast.Cells`) in the place of the map: the user's own network runs as it is, and its
sparse layers know what to do with either. So the parameters, running statistics and random draws are the model's own.
The decoder is dense; its batch norms take ReLU6 and the next skip into their pass.

``vis=True``, masks of other shapes, other image sizes, and an encoder called by itself go through the model's own code.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from maefast import ops
from maefast.integrations import _layers as layers
from maefast.integrations import _swap
from maefast.integrations._sites import base_of
from maefast.integrations._steps import Options, Step
from maefast.nn.batch_norm import batch_norm_map, norm_arguments
from maefast.nn.cell_functions import sync_batch_norm
from maefast.nn.cells import Cells, UnknownSparseOp
from maefast.ops import CellMask, _checks

NAME = "keyu-tian/SparK"
TOKENS = False  # no transformer: sizes that are worth it were measured for those
METHODS = ("forward", "mask", "patchify")
MODULES = ("sparse_encoder", "dense_decoder", "densify_norms", "densify_projs", "mask_tokens")
SIZES = ("len_keep", "fmap_h", "fmap_w", "downsample_raito")  # as it is spelt there
ARGUMENTS = ("inp_bchw", "active_b1ff", "vis")
BLOCK = ("dwconv", "norm", "pwconv1", "act", "pwconv2", "gamma", "drop_path", "sparse")
# What the methods of the model and of its decoder gain.
PACKED = "encoder on the active cells alone, densified in one pass, no target tensor in the loss"
NORMED = "batch norm with ReLU6, and batch norm with the skip, in one pass"
STRANGE = "its encoder has parts that were not there when it was compared"
ACTIVE = "_cur_active"  # the variable of a module through which the sparse layers are told the mask


def recognise(module: nn.Module) -> bool:
    return (
        all(hasattr(module, name) for name in METHODS)
        and all(isinstance(getattr(module, name, None), nn.Module) for name in MODULES)
        and all(isinstance(getattr(module, name, None), int) for name in SIZES)
        and isinstance(getattr(module.sparse_encoder, "sp_cnn", None), nn.Module)
        and isinstance(getattr(module.dense_decoder, "dec", None), nn.ModuleList)
    )


def steps(model: nn.Module, options: Options, keep: Callable[..., None]) -> Iterator[Step]:
    """Encoder, decoder and loss are compared as a whole; where that fails, the decoder alone."""
    decoder = model.dense_decoder
    fused = Step(
        decoder,
        {"forward": decode},
        {"forward": NORMED},
        lambda: _reconstruct(model),
        frozenset() if _unlike(decoder) else _live_decoder(decoder),
        path="dense_decoder",
    )
    odd = _swap.overriding(decoder, "forward") or _unlike(decoder)
    if odd:
        keep("dense_decoder.forward", odd, gain=NORMED)
    reason = _kept(model)
    if reason is None:
        yield from _all(model, None if odd else fused)
    else:
        keep("forward", reason, gain=PACKED)
    if not odd and not _swap.methods(decoder):
        yield fused


def _kept(model: nn.Module) -> str | None:
    """Why `forward` stays, or None."""
    root = _swap.root_class(type(model), METHODS)
    if reason := _swap.overridden(model, "forward", root) or _swap.overridden(model, "patchify", root):
        return reason
    names = tuple(inspect.signature(model.forward).parameters)[: len(ARGUMENTS)]
    return None if names == ARGUMENTS else f"its arguments are {', '.join(names)}"


def _all(model: nn.Module, decoder: Step | None) -> Iterator[Step]:
    layered = list(_sparse(model))
    teller = next((name for module, _ in layered if (name := _teller(module))), None)
    counted = _swap.overridden(model, "mask", _swap.root_class(type(model), METHODS)) is None
    for module, methods in layered:  # of no effect until `forward` gives them cells
        _swap.swap(module, methods)
    if decoder is not None:
        layered.append((decoder.module, decoder.methods))
        _swap.swap(decoder.module, decoder.methods, decoder.guards())
    texts = {"forward": PACKED}
    if decoder is not None:
        texts["dense_decoder.forward"] = decoder.texts["forward"]
    settings = {"teller": teller, "counted": counted, "kinds": frozenset(_kinds(model))}
    names = {id(module): name for name, module in model.named_modules()}
    beside = tuple(names[id(module)] for module, _ in layered)
    yield Step(model, {"forward": forward}, texts, lambda: _whole(model), _live(model, beside), beside, False, settings)
    if "forward" not in _swap.methods(model):
        for module, _ in layered:
            _swap.unswap(module)


def _live(model: nn.Module, beside: tuple[str, ...]) -> frozenset[str]:
    """What our methods read at every call, see `Step.live`: parts that are called, and what is in sparse layers."""
    called = {"sparse_encoder", "dense_decoder", "densify_norms", "densify_projs", "mask_tokens", ACTIVE}
    inside = {f"dense_decoder.{name}" for name in _live_decoder(model.dense_decoder)}
    for path in beside:
        if path == "dense_decoder":
            continue
        part = model.get_submodule(path)
        kept = (*part._parameters, *part._buffers, *part._modules)
        inside |= {f"{path}.{name}" for name in kept}
    return frozenset(called | inside)


def _live_decoder(decoder: nn.Module) -> frozenset[str]:
    """Convolutions and norms of its blocks; what is passed over is the forward of a block, and its ReLU6."""
    found = {"proj"}
    for i, up in enumerate(decoder.dec):
        names = (".up_sample", *(f".conv.{j}" for j in (0, 1, 3, 4))) if _up_block(up) else ("",)
        found |= {f"dec.{i}{name}" for name in names}
    return frozenset(found)


def _sparse(model: nn.Module) -> Iterator[tuple[nn.Module, Mapping[str, Callable]]]:
    """Layers whose own forward is written for a masked map, each with the one that takes cells too."""
    for module in (*model.sparse_encoder.sp_cnn.modules(), *model.densify_norms.modules()):
        if all(hasattr(module, name) for name in BLOCK):
            yield module, {"forward": block}
        for kind, fast in LAYERS.items():
            if isinstance(module, kind) and type(module).forward is not kind.forward:
                yield module, {"forward": fast}


def _kinds(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """What takes part where cells go through: the classes of all parts, and whether they have a forward of ours."""
    for parts in (model.sparse_encoder, model.densify_norms):
        for module in parts.modules():
            yield base_of(module), "forward" in _swap.methods(module)


def _teller(module: nn.Module) -> str | None:
    """Name of the python module that holds the variable `ACTIVE`."""
    space = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
    name = space.get("__name__")
    return name if ACTIVE in space and vars(sys.modules.get(name)) is space else None


def _unlike(decoder: nn.Module) -> str | None:
    """Why the decoder is not SparK's, or None."""
    if not isinstance(getattr(decoder, "proj", None), nn.Module):
        return "it has no proj"
    return next((f"dec.{i} is another kind of block" for i, b in enumerate(decoder.dec) if not _up_block(b)), None)


def _up_block(module: nn.Module) -> bool:
    """A block whose norms can be fused now: nobody looks at what goes in and out of them."""
    conv, up = module._modules.get("conv"), module._modules.get("up_sample")
    if not isinstance(conv, nn.Sequential) or up is None or len(conv) != 5:
        return False
    _, norm1, act, _, norm2 = conv
    norms = all(type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) for norm in (norm1, norm2))
    return norms and type(act) is nn.ReLU6 and not layers.hooked(module, conv, norm1, act, norm2)


# --- probes -------------------------------------------------------------------------------------------------


def _images(model: nn.Module) -> Tensor:
    """Two images, one of low contrast, where the epsilon of normalised targets shows."""
    size = (model.fmap_h * model.downsample_raito, model.fmap_w * model.downsample_raito)
    images = torch.randn(2, _channels(model), *size, device=_weight(model).device, dtype=torch.float64)
    images[1] *= 1e-3
    return images


def _weight(model: nn.Module) -> Tensor:
    return next(model.sparse_encoder.parameters())


def _channels(model: nn.Module) -> int:
    return getattr(model.dense_decoder.proj, "out_channels", 3)


def _precisely(module: nn.Module, *args) -> list[Tensor]:
    """What `module` returns, and its running statistics afterwards, in float64: norm after norm over few sites of two
    images, gradients in float32 are mostly rounding."""
    state = {name: p.double() for name, p in module.named_parameters()}
    buffers = {name: b.double() if b.is_floating_point() else b.clone() for name, b in module.named_buffers()}
    out = functional_call(module, {**state, **buffers}, args)
    return [out, *(b for name, b in buffers.items() if name.rpartition(".")[2].startswith(("running", "num_")))]


def _reconstruct(model: nn.Module) -> list[Tensor]:
    """Of the decoder alone, from maps such as it gets."""
    sides = enumerate(model.dense_decoder.dec[: len(model.mask_tokens)])
    shapes = [(2, up.up_sample.in_channels, model.fmap_h * 2**i, model.fmap_w * 2**i) for i, up in sides]
    maps = [torch.randn(shape, device=_weight(model).device, dtype=torch.float64) for shape in shapes]
    return _precisely(model.dense_decoder, maps)


def _whole(model: nn.Module) -> list[Tensor]:
    return _precisely(model, _images(model))


# --- layers that take a masked map or cells -------------------------------------------------------------------


def conv(self: nn.Module, x: Tensor | Cells):
    return nn.Conv2d.forward(self, x) if isinstance(x, Cells) else _swap.original(self, "forward")(x)


def max_pool(self: nn.Module, x: Tensor | Cells):
    return nn.MaxPool2d.forward(self, x) if isinstance(x, Cells) else _swap.original(self, "forward")(x)


def avg_pool(self: nn.Module, x: Tensor | Cells):
    return nn.AvgPool2d.forward(self, x) if isinstance(x, Cells) else _swap.original(self, "forward")(x)


def batch_norm(self: nn.Module, x: Tensor | Cells):
    if not isinstance(x, Cells):
        return _swap.original(self, "forward")(x)
    return sync_batch_norm(x, **norm_arguments(self))


def layer_norm(self: nn.Module, x: Tensor | Cells):
    if not isinstance(x, Cells):
        return _swap.original(self, "forward")(x)
    if not getattr(self, "sparse", True):
        raise UnknownSparseOp(f"a {type(self).__name__} over all sites")
    return x.like(layers.norm_rows(self, x.rows))


def block(self: nn.Module, x: Tensor | Cells):
    """Of a ConvNeXt."""
    if not isinstance(x, Cells):
        return _swap.original(self, "forward")(x)
    if not self.sparse:
        raise UnknownSparseOp(f"a {type(self).__name__} that does not mask its output")
    y = self.norm(self.dwconv(x).permute(0, 2, 3, 1)).rows
    approximate, first, second = layers.gelu(self.act), self.pwconv1, self.pwconv2
    if approximate is None or self.gamma is None or not (layers.plain_linear(first) and layers.plain_linear(second)):
        y = self.pwconv2(self.act(self.pwconv1(y)))
        y = y if self.gamma is None else self.gamma * y
    else:  # gamma * (W y + b), without another pass over y
        y = ops.bias_gelu(ops.linear(y, first.weight), first.bias, approximate=approximate)
        bias = None if second.bias is None else self.gamma * second.bias
        y = ops.linear(y, self.gamma[:, None] * second.weight, bias)
    return x + self.drop_path(x.like(y))


LAYERS: dict[type[nn.Module], Callable] = {
    nn.Conv2d: conv,
    nn.MaxPool2d: max_pool,
    nn.AvgPool2d: avg_pool,
    _BatchNorm: batch_norm,
    nn.LayerNorm: layer_norm,
}


# --- the methods --------------------------------------------------------------------------------------------


def decode(self: nn.Module, to_dec: list[Tensor | None]):
    maps = list(to_dec)
    if not maps or maps[0] is None or not len(maps[0]):
        return _swap.fall_back(self, "forward")(to_dec)
    maps += [None] * (len(self.dec) + 1 - len(maps))
    x = maps[0]
    for i, up in enumerate(self.dec, 1):
        skip = maps[i] if i < len(self.dec) else None
        if _up_block(up):
            first, norm1, _, second, norm2 = up.conv
            x = batch_norm_map(norm1, first(up.up_sample(x)), "relu6")
            x = batch_norm_map(norm2, second(x), residual=skip)
        else:
            x = up(x) if skip is None else up(x) + skip
    return self.proj(x)


def _usual(model: nn.Module, images: Tensor) -> bool:
    """Images that the model would take; what it would refuse is left to it."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images) or images.shape[1] != _channels(model):
        return False
    size = (model.fmap_h * model.downsample_raito, model.fmap_w * model.downsample_raito)
    fits = images.dtype is _weight(model).dtype or _checks.autocast(images.device.type) is not None
    return fits and tuple(images.shape[2:]) == size and not layers.watched(model.sparse_encoder, model.densify_norms)


def forward(self: nn.Module, inp_bchw: Tensor, active_b1ff: Tensor | None = None, vis: bool = False, *args, **kwargs):
    if args or kwargs or vis or not _usual(self, inp_bchw):
        return _swap.fall_back(self, "forward")(inp_bchw, active_b1ff, vis, *args, **kwargs)
    if not _swap.setting(self, "kinds").issuperset(_kinds(self)):
        return _swap.fall_back(self, "forward", STRANGE)(inp_bchw, active_b1ff)
    keep = None
    if active_b1ff is None:
        active_b1ff = self.mask(inp_bchw.shape[0], inp_bchw.device)
        keep = self.len_keep if _swap.setting(self, "counted") else None  # no sync where the count is known
    shape = (len(inp_bchw), 1, self.fmap_h, self.fmap_w)
    if active_b1ff.dtype is not torch.bool or tuple(active_b1ff.shape) != shape:
        return _swap.fall_back(self, "forward")(inp_bchw, active_b1ff)
    if teller := _swap.setting(self, "teller"):
        setattr(sys.modules[teller], ACTIVE, active_b1ff)
    plan = CellMask.from_bool(~active_b1ff[:, 0], keep)
    if not plan.total or not plan.tokens.total_masked:
        return _swap.fall_back(self, "forward")(inp_bchw, active_b1ff)
    maps = self.sparse_encoder(Cells.pack(inp_bchw, plan))
    rec = self.dense_decoder([_densify(self, i, level) for i, level in enumerate(reversed(maps))])
    pred, images = _patches(self, rec), layers.kept_images(inp_bchw, rec)  # the original keeps images times a mask
    loss = ops.patch_loss(pred, images, plan.tokens, self.downsample_raito, norm="mae", rows="all")
    # The original divides by a count in the default dtype.
    return loss.to(torch.promote_types(layers.share_dtype(rec, inp_bchw), torch.get_default_dtype()))


def _densify(model: nn.Module, i: int, level: Cells | None) -> Tensor | None:
    """The map of a level, mask tokens at its masked sites."""
    if level is None:
        return None
    return model.densify_projs[i](model.densify_norms[i](level).dense(model.mask_tokens[i].flatten()))


def _patches(model: nn.Module, picture: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, N, K] in (ph, pw, C) order."""
    side, rows, columns = model.downsample_raito, model.fmap_h, model.fmap_w
    blocks = picture.permute(0, 2, 3, 1).reshape(len(picture), rows, side, columns, side, -1)
    return blocks.transpose(2, 3).reshape(len(picture), rows * columns, -1)

"""Small parts that every family needs: other people's layers through our ops, where they are what they look like."""

from __future__ import annotations

from functools import partial
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import ops
from maefast.integrations._guards import HOOKS
from maefast.integrations._sites import parametrised
from maefast.nn.watched import hooked, plain_tensor, touched, watched, wrapper
from maefast.ops import _checks

# Of other modules, by one name with the rest.
__all__ = ["hooked", "parametrised", "plain_tensor", "touched", "watched", "wrapper"]

_TANH = {"approximate": "tanh"}


def only_sharded(module: nn.Module) -> bool:
    """Whether all hooks of a module are FSDP2's: they gather parameters, cast whatever passes, and look at nothing."""
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    return bool(hooks) and all(type(getattr(hook, "__self__", None)).__name__ == "FSDPState" for hook in hooks)


def plain_linear(module: nn.Module) -> bool:
    """A torch Linear and nothing else: not quantised, not adapted, not sharded, not watched."""
    return type(module) is nn.Linear and plain_tensor(module.weight) and not hooked(module)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    return ops.linear(x, module.weight, module.bias) if plain_linear(module) else module(x)


def plain_norm(module: nn.Module) -> bool:
    """A LayerNorm over the last dimension with weight and bias: torch's, or timm's class of the same meaning."""
    kind = type(module)  # the first question: that of a parametrised one is another, see `parametrised`
    if kind is not nn.LayerNorm:
        # timm's fast path for autocast computes in 16 bits, ours in float32: only without it they are the same.
        timm = kind.__name__ == "LayerNorm" and kind.__module__ == "timm.layers.norm"
        if not timm or not isinstance(module, nn.LayerNorm) or module._fast_norm:
            return False
    if module.weight is None or module.bias is None or hooked(module):
        return False
    return len(module.normalized_shape) == 1 and module.eps > 0 and plain_tensor(module.weight)


def norm(module: nn.Module, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(r, LayerNorm(r)) for r = x + delta. The norm may come in the autocast dtype: a matrix product follows."""
    if plain_norm(module):
        return ops.add_norm(x, delta, module.weight, module.bias, module.eps)
    x = x if delta is None else x + delta
    return x, module(x)


def last_norm(module: nn.Module, x: Tensor, delta: Tensor | None = None) -> Tensor:
    """LayerNorm(x + delta) in the dtype that the model itself gives it: somebody may look at it."""
    if not plain_norm(module):
        return module(x if delta is None else x + delta)
    stream = x.dtype if delta is None else torch.promote_types(x.dtype, delta.dtype)
    if stream.itemsize == 2 and x.is_cuda and torch.is_autocast_enabled("cuda"):
        return module(x if delta is None else x + delta)  # answers in float32 there
    return ops.add_norm(x, delta, module.weight, module.bias, module.eps, dtype=stream)[1]


def norm_rows(module: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm over the last dimension by the parameters of a module of any class; they may be missing."""
    weight, bias = module.weight, module.bias
    if weight is None or bias is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, module.eps)
    return ops.add_norm(x, None, weight, bias, module.eps)[1]


def gelu(module: nn.Module) -> str | None:
    """How a GELU approximates ("none" or "tanh"), or None for another activation."""
    if not isinstance(module, nn.Module) or hooked(module):
        return None
    if type(module) is nn.GELU:
        return module.approximate
    kind = type(module)
    if kind.__name__ == "GELUActivation" and getattr(module, "act", None) is F.gelu:
        return "none"  # of HF transformers
    if kind.__name__ in ("GELUTanh", "PytorchGELUTanh") and kind.__module__ == "transformers.activations":
        act = getattr(module, "act", None)  # of new versions a partial function, of old ones in the forward
        known = not hasattr(module, "act") or (isinstance(act, partial) and act.func is F.gelu)
        return "tanh" if known and getattr(act, "keywords", _TANH) == _TANH else None
    if kind.__name__ == "GELU" and kind.__module__.startswith("timm."):
        return "none"
    return None


def mlp(fc1: nn.Module, act: nn.Module, fc2: nn.Module, x: Tensor) -> Tensor:
    """fc2(act(fc1(x))), the bias of fc1 added in the pass of the GELU."""
    kind = gelu(act)
    if kind is None or not plain_linear(fc1):
        return linear(fc2, act(linear(fc1, x)))
    return linear(fc2, ops.bias_gelu(ops.linear(x, fc1.weight), fc1.bias, approximate=kind))


def still(module: nn.Module | float | None) -> bool:
    """A dropout or identity that does nothing now, or a rate of zero. Stochastic depth is not asked: it is called, and
    draws."""
    if module is None or (isinstance(module, (int, float)) and module == 0):
        return True
    kind = type(module)
    if kind is nn.Identity:
        return not hooked(module)
    return kind is nn.Dropout and (module.p == 0 or not module.training) and not hooked(module)


def then(x: Tensor, *modules: nn.Module | None) -> Tensor:
    """Through modules that may be missing or do nothing."""
    for module in modules:
        x = x if still(module) else module(x)
    return x


def scales(end: Tensor | nn.Module | None) -> bool:
    """Whether a part at the end of a branch does nothing or multiplies by one factor a channel or a sample, whatever it
    is given: `factors` takes it for that."""
    known = "LayerScale", "DropPath"
    return isinstance(end, Tensor) or still(end) or type(end).__name__.endswith(known)  # `still`: of None too


def factors(
    ends: tuple[Tensor | nn.Module | None, ...], x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(factor of each channel [D], of each sample [B]) of what comes behind a branch for x [B, S, D], or None. Modules
    are called on ones: they may draw, and have gradients."""
    scale = drop = None
    for end in ends:
        if isinstance(end, Tensor):
            scale = end
        elif not still(end):
            dtype = product_dtype(weight) if scale is None else torch.promote_types(product_dtype(weight), scale.dtype)
            if type(end).__name__.endswith("DropPath"):
                ones = torch.ones(len(x), 1, 1, dtype=dtype, device=x.device)
                found = end(ones)
                drop = None if found is ones else found.view(len(x))
            else:
                scale = end(torch.ones(1, 1, x.shape[-1], dtype=dtype, device=x.device)).view(-1)
    return scale, drop


def drawn(noise: Tensor, keep: int, order: str = "score") -> ops.TokenMask:
    """The plan of noise [B, N] that a model sorts by ``torch.argsort``: the `keep` lowest are visible.

    Where values are equal (of a thousand draws in float32, in one sample of thirty), torch's sort on a CPU follows no
    order that could be told: so it is asked itself. On CUDA it is stable, as ours is.
    """
    scores = noise if noise.is_cuda else noise.argsort(dim=1).argsort(dim=1).float()
    return ops.TokenMask.from_scores(scores, index(keep), order=order)  # a number to torch.compile: see `keep_count`


def ordered(ids_restore: Tensor, keep: int) -> ops.TokenMask | None:
    """The plan of somebody's `ids_restore`, or None where that is no order, as far as can be told without waiting."""
    try:
        return ops.TokenMask.from_ids_restore(ids_restore, keep)
    except ValueError:  # the originals gather by whatever they are given
        return None


def strided_patches(conv: nn.Module) -> str | None:
    """Why a convolution is not a linear map of disjoint patches, or None if it is."""
    if type(conv) not in (nn.Conv2d, nn.Conv3d):
        return f"the patch embedding is a {type(conv).__module__}.{type(conv).__qualname__}, not torch's convolution"
    if hooked(conv):
        return "the patch embedding has hooks"
    if tuple(conv.kernel_size) != tuple(conv.stride) or conv.groups != 1 or set(conv.dilation) != {1}:
        return "the patches of the embedding overlap or have gaps"
    if conv.padding not in (0, (0, 0), (0, 0, 0), "valid"):
        return "the patch embedding pads its input"
    return None


def convolution(module: nn.Module) -> nn.Module:
    """The patch convolution itself, or the one inside an adapter."""
    return _inside(module, (nn.Conv2d, nn.Conv3d))


def inner_linear(module: nn.Module) -> nn.Module:
    """The linear layer itself, or the one inside an adapter."""
    return _inside(module, (nn.Linear,))


def _inside(module: nn.Module, kinds: tuple[type, ...]) -> nn.Module:
    return next((part for part in module.modules() if isinstance(part, kinds)), module)


def conv_dtype_fits(images: Tensor, conv: nn.Module) -> bool:
    """Whether images and weights go together as the convolution itself would have it."""
    return images.dtype is conv.weight.dtype or _checks.autocast(images.device.type) is not None


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a convolution or linear layer with this weight answers here."""
    dtype = _checks.autocast(weight.device.type)
    return weight.dtype if dtype is None or weight.dtype is torch.float64 else dtype


def share_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def takes(images: object, conv: nn.Module, ndim: int = 4, channels: int = 1) -> bool:
    """Images that a patch convolution may take: a batch that is not empty, channels in this dimension, on its device.

    False for what stands in the place of a convolution (an adapter), too.
    """
    return (
        strided_patches(conv) is None
        and isinstance(images, Tensor)
        and images.ndim == ndim
        and len(images) > 0
        and images.shape[channels] == conv.in_channels
        and images.device == conv.weight.device
        and images.is_floating_point()
        and conv_dtype_fits(images, conv)
    )


def kept(pred: Tensor) -> Tensor:
    """A copy of predictions for the loss kernel to keep: somebody may write into theirs before the backward. The
    originals keep a difference, and leave them free."""
    return pred.clone() if pred.requires_grad else pred


def kept_images(images: Tensor, pred: Tensor, conv: nn.Module | None = None) -> Tensor:
    """A copy of images for the loss kernel to keep: who fills one buffer with batch after batch may do so before the
    backward. The originals keep no images, unless a patch convolution does for the gradient of its weight."""
    if not (pred.requires_grad and torch.is_grad_enabled()):
        return images
    weight = None if conv is None or parametrised(conv) else getattr(conv, "weight", None)
    if weight is not None and weight.requires_grad:
        return images
    return images.clone(memory_format=torch.contiguous_format)

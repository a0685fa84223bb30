"""Networks that a recipe learns from and does not train."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of its images

_around: ContextVar[tuple[str, torch.dtype] | None] = ContextVar("_around", default=None)


@contextmanager
def autocast_for_teachers_only(device: str) -> Iterator[None]:
    """Autocast is off, but within `teaching`: masks and targets that a recipe prepares are exact, and teachers as fast
    as what is trained."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        yield
        return
    token = _around.set((device, torch.get_autocast_dtype(device)))
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        _around.reset(token)


@contextmanager
def teaching() -> Iterator[None]:
    """Without gradients, and in the autocast that `autocast_for_teachers_only` set aside."""
    around = _around.get()
    with torch.no_grad(), nullcontext() if around is None else torch.autocast(*around):
        yield


class Frozen:
    """A network that never learns, held so that the recipe's `parameters()`, state_dict, DDP and optimizer do not see
    it. `maefast.recipe.Recipe` takes it along to devices and dtypes. Always in eval mode; called without gradients.

    Args:
        module: not copied: it is set to eval mode, and its parameters to need no gradient.
        exact: it computes in full precision where students do not.

    >>> teacher = Frozen(nn.Linear(2, 3))
    >>> teacher(torch.zeros(1, 2)).requires_grad
    False
    """

    def __init__(self, module: nn.Module, exact: bool = False) -> None:
        self.module, self._how = module.eval().requires_grad_(False), torch.no_grad if exact else teaching

    def __call__(self, *args: Any, **options: Any) -> Any:
        with self._how():
            return self.module(*args, **options)

    def states(self, *args: Any, **options: Any) -> Any:
        """Of the network, see `maefast.nn.Encoder.states`: no block behind the last one that is asked for is run."""
        with self._how():
            return self.module.states(*args, **options)


class Averaged(nn.Module):
    """A running average of networks that learn, as in BYOL and DINO: part of the state_dict, never of the gradient.
    Always in eval mode; call its parts, which have the names they are given, under `teaching`.

    Args:
        parts: what is averaged; copied.
    """

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, copy.deepcopy(part))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Averaged:
        return super().train(False)

    @torch.no_grad()
    def follow(self, decay: float, **parts: nn.Module) -> None:
        """average <- decay * average + (1 - decay) * part, of parameters and buffers; counts are taken over. Parts may
        lie in shards (DTensor); averages are whole."""
        for name, part in parts.items():
            learned = part.state_dict()
            for key, old in getattr(self, name).state_dict().items():
                new = learned[key]
                new = new.full_tensor() if hasattr(new, "full_tensor") else new
                if old.is_floating_point():
                    old.lerp_(new.to(old), 1 - decay)
                else:
                    old.copy_(new)


def cosine_decay(base: float, step: int, total: int) -> float:
    """The decay of an average at `step` (from 0) of `total`: from `base` to 1 along half a cosine (BYOL)."""
    return 1 - (1 - base) * (math.cos(math.pi * step / total) + 1) / 2


def cls_attention(q: Tensor, k: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """How much the class token looks at each patch, the mean of the heads, from queries and keys [B, 1 + N, D] of a
    layer: [B, N], in float32 at least. Its row alone is computed, not all (1 + N)^2 pairs. The row sums to less than 1:
    the class token looks at itself too."""
    q, k = (t.unflatten(-1, (num_heads, -1)) for t in (q[:, 0], k))
    scores = torch.einsum("bhd,bnhd->bhn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    exact = torch.promote_types(scores.dtype, torch.float32)  # half precision widened, float64 left alone
    return scores.to(exact).softmax(-1).mean(1)[:, 1:]


KINDS = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "ViTModel")  # of transformers


class ImageTeacher(nn.Module):
    """A ViT that tells states and where its class token looks: of `maefast.models` (a MaskedAutoencoderViT), or of
    transformers (CLIPVisionModel, with its projection or without, ViTModel). It takes images normalised as ImageNet's.

    Args:
        model: of 1 + N tokens, class token first.

    Attributes:
        width: D. depth: blocks. CLIP: the class of transformers that has all that is told of a CLIP.
    """

    CLIP = "CLIPVisionModel"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        kind = type(model).__name__
        if hasattr(model, "states"):
            self.width, self.depth, self._run = model.config["embed_dim"], model.config["depth"], self._own
            if self.depth < 2:
                raise ValueError(f"a teacher has two blocks at least, got {self.depth}")
        elif kind in KINDS:
            self.width, self.depth = model.config.hidden_size, model.config.num_hidden_layers
            self._run = self._hf
        else:
            raise TypeError(f"a teacher is a mae_* model, CLIPVisionModel or ViTModel, got {kind}")
        self.clip = kind.startswith("CLIP")

    def forward(self, images: Tensor, at: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """The outputs of blocks `at`, from 0, [B, 1 + N, D] each; and `cls_attention` of the last block."""
        return self._run(images, at)

    def _own(self, images: Tensor, at: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        last = self.depth - 1
        *states, before = self.model.states(images, at=(*at, last - 1))
        block = self.model.blocks[last]
        q, k, _ = block.attn.qkv(block.norm1(before)).chunk(3, -1)
        return states, cls_attention(q, k, block.attn.num_heads)

    def _hf(self, images: Tensor, at: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        if self.clip:
            images = _as_clip(images)
        seen: list[Tensor] = []
        norm, query, key = self._last_block()
        hook = norm.register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            states = self.model(pixel_values=images, output_hidden_states=True).hidden_states
        finally:
            hook.remove()
        heads = self.model.config.num_attention_heads
        return [states[1 + index] for index in at], cls_attention(query(seen[0]), key(seen[0]), heads)

    def _last_block(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The first norm of the last block, and the block's maps to queries and keys; names of transformers 4 and 5."""
        inner = getattr(self.model, "vision_model", self.model)
        encoder = inner.encoder if hasattr(inner, "encoder") else inner
        block = (encoder.layers if hasattr(encoder, "layers") else encoder.layer)[-1]
        norm = next(getattr(block, n) for n in ("layer_norm1", "layernorm_before") if hasattr(block, n))
        named = dict(block.named_modules())
        query, key = (
            next(part for name, part in named.items() if name.rsplit(".", 1)[-1] in names)
            for names in (("q_proj", "query"), ("k_proj", "key"))
        )
        return norm, query, key


class FeatureTeacher(ImageTeacher):
    """An `ImageTeacher` that tells the features of each patch behind its final norm, and behind the projection of a
    CLIPVisionModelWithProjection.

    Attributes:
        width: of the features. clip: images are given a CLIP's own mean and standard deviation; else it sees them with
            ImageNet's, as they come.
    """

    CLIP = "CLIPVisionModelWithProjection"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        inner = getattr(model, "vision_model", model)
        names = ("norm", "post_layernorm", "layernorm")
        self._norm = next(getattr(inner, name) for name in names if hasattr(inner, name))
        self._project = getattr(model, "visual_projection", nn.Identity())
        self.width = getattr(self._project, "out_features", self.width)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, width]; and `cls_attention` of the last block, [B, N]."""
        (state,), attention = super().forward(images, (self.depth - 1,))
        return self._project(self._norm(state[:, 1:])), attention


class HiddenStates(nn.Module):
    """A ViT of transformers, such as Dinov2WithRegistersModel, as one that tells `states`.

    Attributes:
        config: its "embed_dim" and "depth".
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = {"embed_dim": model.config.hidden_size, "depth": model.config.num_hidden_layers}

    def states(self, images: Tensor, at: Sequence[int]) -> list[Tensor]:
        """Outputs of the blocks `at` (from 0; negative numbers count from the last), [B, tokens, D] each, before any
        final norm. Images as the model takes them."""
        found = self.model(pixel_values=images, output_hidden_states=True).hidden_states[1:]
        return [found[index] for index in at]


def _as_clip(images: Tensor) -> Tensor:
    """From ImageNet's mean and standard deviation to CLIP's."""
    numbers = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), CLIP_MEAN, CLIP_STD)
    mean, std, clip_mean, clip_std = (torch.tensor(n).to(images).view(3, 1, 1) for n in numbers)
    return (images * std + mean - clip_mean) / clip_std

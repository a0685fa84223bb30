"""Layouts of Hugging Face's blocks whose attention knows positions: a bias of each pair, or rotated queries and keys.

What computes the tables is the model's own: BEiT's module for the bias, DINOv3's tables as they are handed to each
layer, V-JEPA 2's rotation, which is asked what it does to the two elements of each pair.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.integrations import _hf
from maefast.integrations import _layers as layers
from maefast.integrations import _layouts_parts as common
from maefast.integrations._layouts_hf import HuggingFace5
from maefast.integrations._layouts_parts import NOWHERE, Positions
from maefast.integrations._steps import given
from maefast.ops import _checks

_LEAST = -1e30  # scores below this are taken for ruled out


class Beit(HuggingFace5):
    """With layer scale in the block itself and, maybe, relative positions (Bao et al., 2022): a table of the block's
    own, or of the model's, which comes as the attention mask."""

    name = "transformers BEiT"
    ENDS = (("dropout", "lambda_1", "drop_path"), ("dropout", "lambda_2", "drop_path"))
    arguments = ("attention_mask", "interpolate_pos_encoding", "resolution")

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        return hasattr(block, "lambda_1") and hasattr(block, "lambda_2") and super().fits(block)

    @classmethod
    def live(cls, block: nn.Module, settings: dict) -> frozenset[str]:
        return super().live(block, settings) | {"relative_position_bias", "patch_size"}

    @classmethod
    def passes(cls, block: nn.Module, args: tuple, kwargs: dict) -> bool:
        rest = common.named(block, args, kwargs)
        if rest is None:
            return False
        mask, resolution = rest.pop("attention_mask", None), rest.pop("resolution", None)
        rest.pop("interpolate_pos_encoding", None)
        if mask is not None and not isinstance(mask, Tensor):
            return False
        if getattr(block, "relative_position_bias", None) is not None and not is_pair(resolution):
            return False
        return _hf.passes((), rest)

    @classmethod
    def placed(cls, block: nn.Module, args: tuple, kwargs: dict) -> bool:
        mask = common.named(block, args, kwargs).get("attention_mask")
        return mask is not None or getattr(block, "relative_position_bias", None) is not None

    @classmethod
    def positions(cls, block: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Positions | None:
        """None where the mask is another one than a bias of each pair for all samples."""
        call = common.named(block, args, kwargs)
        bias, resize = call.get("attention_mask"), call.get("interpolate_pos_encoding", False)
        if bias is not None and not is_bias(bias, x, cls.heads(block)):
            return None
        if getattr(block, "relative_position_bias", None) is not None:
            height, width = call["resolution"]
            window = height // block.patch_size, width // block.patch_size
            own = block.relative_position_bias(window, resize, dim_size=x.shape[1])
            bias = own if bias is None else own + bias
            if not is_bias(own, x, cls.heads(block), rows=False):
                return None
        return NOWHERE if bias is None else Positions(bias=bias, arguments={"attention_mask": bias})

    @classmethod
    def calls(cls, block: nn.Module, x: Tensor) -> list[tuple[Tensor, dict]]:
        resolution = None
        if getattr(block, "relative_position_bias", None) is not None:  # six patches and a class token
            resolution = 2 * block.patch_size, 3 * block.patch_size
            x = given(torch.cat([x, x[:, :1]], 1))
        heads, count = cls.heads(block), x.shape[1]
        bias = given(torch.randn(1, heads, count, count, dtype=x.dtype, device=x.device))
        calls = ({"attention_mask": mask, "resolution": resolution} for mask in (None, bias))
        return [(x, call) for call in calls]


class Dinov3(HuggingFace5):
    """With the tables of a rotation (cos, sin), [patches, head width] each, which are handed to every layer and leave
    the tokens in front of the patches as they are (Simeoni et al., 2025)."""

    name = "transformers DINOv3"
    HEADS, DROPOUT = "num_heads", "dropout"
    arguments = ("attention_mask", "position_embeddings")

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        return super().fits(block) and "position_embeddings" in common.parameters(type(block).forward)

    @classmethod
    def passes(cls, block: nn.Module, args: tuple, kwargs: dict) -> bool:
        rest = common.named(block, args, kwargs)
        if rest is None or not is_pair(rest.pop("position_embeddings", None)):
            return False
        return _hf.passes((), rest)

    @classmethod
    def positions(cls, block: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Positions | None:
        tables = common.named(block, args, kwargs)["position_embeddings"]
        width = x.shape[-1] // cls.heads(block)
        if not all(_is_table(table, x, width) for table in tables) or tables[0].shape != tables[1].shape:
            return None
        cos, sin = tables
        before = x.shape[1] - cos.shape[0]  # class token and registers
        if before:
            cos = torch.cat([cos.new_ones(before, width), cos])
            sin = torch.cat([sin.new_zeros(before, width), sin])
        return Positions(rope=ops.Rope(cos, sin, False), arguments={"position_embeddings": tables})

    @classmethod
    def calls(cls, block: nn.Module, x: Tensor) -> list[tuple[Tensor, dict]]:
        width = x.shape[-1] // cls.heads(block)
        calls = []
        for patches in (4, x.shape[1]):
            angles = torch.randn(patches, width // 2, dtype=x.dtype, device=x.device).tile(2)
            calls.append((x, {"position_embeddings": (angles.cos(), angles.sin())}))
        return calls


class VJepa2(HuggingFace5):
    """With rotated queries and keys, by the frame, row and column of each token (Assran et al., 2025)."""

    name = "transformers V-JEPA 2"
    PROJECTIONS = ("query", "key", "value", "proj")
    DROPOUT = "dropout_prob"
    ENDS = (("drop_path",), ("drop_path",))
    arguments = ("position_mask",)
    returns_pair = True

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        attn = getattr(block, cls.ATTENTION, None)
        named = all(callable(getattr(attn, name, None)) for name in ("get_position_ids", "apply_rotary_embeddings"))
        return named and super().fits(block)

    @classmethod
    def passes(cls, block: nn.Module, args: tuple, kwargs: dict) -> bool:
        rest = common.named(block, args, kwargs)
        if rest is None:
            return False
        mask = rest.pop("position_mask", None)
        return (mask is None or isinstance(mask, Tensor)) and _hf.passes((), rest)

    @classmethod
    @torch.no_grad()
    def positions(cls, block: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Positions | None:
        mask, attn = common.named(block, args, kwargs).get("position_mask"), getattr(block, cls.ATTENTION)
        if mask is not None and (mask.shape != x.shape[:2] or mask.device != x.device or mask.is_floating_point()):
            return None
        places = attn.get_position_ids(x, masks=mask)
        places = tuple(ids if mask is None else ids[:, :1] for ids in places)  # they are the same for all heads
        # Rotated are (1, 0, 1, 0, ...) and (0, 1, 0, 1, ...), in the places of two heads: a linear map of each pair.
        width = x.shape[-1] // cls.heads(block)
        even = torch.arange(width, device=x.device) % 2 == 0
        pairs = torch.stack([even, ~even]).to(layers.product_dtype(cls.norms(block)[0].weight))
        pairs = pairs[None, :, None].expand(1 if mask is None else len(x), 2, x.shape[1], width)
        first, second = attn.apply_rotary_embeddings(pairs, places).unbind(1)
        cos, sin = torch.where(even, first, second), torch.where(even, -second, first)
        if mask is None:
            cos, sin = cos[0], sin[0]
        return Positions(rope=ops.Rope(cos, sin, True), arguments={"position_mask": mask})

    @classmethod
    def calls(cls, block: nn.Module, x: Tensor) -> list[tuple[Tensor, dict]]:
        attn = getattr(block, cls.ATTENTION)
        last = max(x.shape[1], getattr(attn, "grid_depth", 1) * getattr(attn, "grid_size", 1) ** 2)
        mask = torch.stack([torch.randperm(last)[: x.shape[1]].sort().values for _ in x]).to(x.device)
        return [(x, {"position_mask": None}), (x, {"position_mask": mask})]


def is_pair(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def fits_dtype(table: Tensor, x: Tensor) -> bool:
    """Whether a table goes with the tokens, as the model's own attention would have it, and with our kernels."""
    dtype = _checks.autocast(x.device.type)
    fits = table.dtype is x.dtype if dtype is None else table.dtype in (torch.float32, x.dtype, dtype)
    return fits and table.device == x.device and layers.plain_tensor(table)


def _is_table(table: object, x: Tensor, width: int) -> bool:
    if not isinstance(table, Tensor) or table.ndim != 2 or table.shape[1] != width or table.requires_grad:
        return False
    return width % 2 == 0 and 0 < table.shape[0] <= x.shape[1] and fits_dtype(table, x)


def is_bias(bias: Tensor, x: Tensor, heads: int, rows: bool = True) -> bool:
    """A bias of each head and pair for all samples. A mask of one sample would look alike: one that rules out all keys
    of a query gives an average in the model's own code and zeros in ours, so such `rows` are looked for."""
    count = x.shape[1]
    if bias.shape != (1, heads, count, count) or not bias.is_floating_point() or not fits_dtype(bias, x):
        return False
    if not rows or bias.requires_grad or torch.compiler.is_compiling():
        return True
    return bool(bias.amax(-1).amin() > _LEAST) if bias.is_cpu else len(x) > 1

"""Layouts of Hugging Face's Swin blocks: attention inside windows, shifted in every second block (Liu et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.integrations import _hf
from maefast.integrations import _layers as layers
from maefast.integrations import _layouts_parts as common
from maefast.integrations._layouts_hf import HuggingFace5
from maefast.integrations._layouts_hf4 import HuggingFace4
from maefast.integrations._layouts_parts import NOWHERE, Positions
from maefast.integrations._layouts_placed import fits_dtype
from maefast.integrations._steps import given


class _Windows:
    """Windows are sequences of a batch, [B * windows, size^2, D], with one table of relative positions and, where the
    grid is shifted, a mask for each window of an image. Padding and mask are the block's own methods, and so is the one
    that makes windows smaller for small grids."""

    METHODS = ("set_shift_and_window_size", "get_attn_mask", "maybe_pad")
    arguments = ("input_dimensions", "always_partition")
    returns_pair = True

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        known = all(callable(getattr(block, name, None)) for name in cls.METHODS)
        return known and "input_dimensions" in common.parameters(type(block).forward) and super().fits(block)

    @classmethod
    def live(cls, block: nn.Module, settings: dict) -> frozenset[str]:
        return super().live(block, settings) | {"window_size", "shift_size", "drop_path"}

    @classmethod
    def passes(cls, block: nn.Module, args: tuple, kwargs: dict) -> bool:
        rest = common.named(block, args, kwargs)
        if rest is None:
            return False
        grid = rest.pop("input_dimensions", None)
        rest.pop("always_partition", None)
        known = isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(n, int) for n in grid)
        return known and _hf.passes((), rest)

    @classmethod
    def positions(cls, block: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Positions | None:
        call = common.named(block, args, kwargs)
        height, width = call["input_dimensions"]
        if height * width != x.shape[1]:
            return None
        if not call.get("always_partition", False):
            block.set_shift_and_window_size((height, width))
        bias, area = cls.bias(block), block.window_size**2
        if bias is None or bias.shape != (cls.heads(block), area, area) or not fits_dtype(bias, x):
            return None
        return Positions(bias=bias, grid=(height, width))

    @classmethod
    def no_kernel(cls, block: nn.Module, length: int = 1) -> str | None:
        return super().no_kernel(block, block.window_size**2)

    @classmethod
    def attend(cls, block: nn.Module, y: Tensor, count: int | None, positions: Positions = NOWHERE) -> Tensor:
        size, (height, width) = block.window_size, positions.grid
        image, _ = block.maybe_pad(y.unflatten(1, (height, width)), height, width)
        padded = image.shape[1:3]
        windows = _cut(cls.shift(block, image, reverse=False), size)
        mask = block.get_attn_mask(*padded, dtype=y.dtype, device=y.device)
        bias = positions.bias if mask is None else positions.bias + mask[:, None]  # [windows, H, size^2, size^2]
        out = cls.attention(block, windows, None, Positions(bias, arguments={"attention_mask": mask}))
        out = common.ended(out, cls.ends(block)[0])
        out = cls.shift(block, _joined(out, size, *padded), reverse=True)
        return common.ended(out[:, :height, :width].flatten(1, 2), (block.drop_path,))

    @classmethod
    def whole(cls, block: nn.Module, positions: Positions = NOWHERE) -> None:
        return None

    @classmethod
    def calls(cls, block: nn.Module, x: Tensor) -> list[tuple[Tensor, dict]]:
        size = block.window_size
        grid = 2 * size, size + 1  # padded, and larger than a window in both directions
        x = given(torch.randn(len(x), grid[0] * grid[1], x.shape[2], dtype=x.dtype, device=x.device))
        return [(x, {"input_dimensions": grid})]


class Swin(_Windows, HuggingFace5):
    """Of transformers 5, whose blocks shift in a method and have a module for their table."""

    name = "transformers Swin"
    METHODS = (*_Windows.METHODS, "cyclic_shift")
    ENDS = (("dropout",), ("dropout",))
    arguments, returns_pair = _Windows.arguments, True

    @classmethod
    def live(cls, block: nn.Module, settings: dict) -> frozenset[str]:
        return super().live(block, settings) | {"attention.relative_position_bias"}

    @classmethod
    def bias(cls, block: nn.Module) -> Tensor | None:
        bias = block.attention.relative_position_bias()
        return bias[0] if bias.ndim == 4 and len(bias) == 1 else None

    @classmethod
    def shift(cls, block: nn.Module, image: Tensor, reverse: bool) -> Tensor:
        return block.cyclic_shift(image, reverse=reverse)


class Swin4(_Windows, HuggingFace4):
    """Of transformers 4, and of Donut in 5."""

    name = "transformers 4 Swin"
    INNER = "self"
    LIVE_ATTENTION = (*HuggingFace4.LIVE_ATTENTION, "relative_position_bias_table", "relative_position_index")
    PARTS = frozenset(("drop_path",))
    arguments, returns_pair = _Windows.arguments, True

    @classmethod
    def bias(cls, block: nn.Module) -> Tensor | None:
        attn = getattr(block.attention, cls.INNER)
        table, index = attn.relative_position_bias_table, attn.relative_position_index
        return ops.relative_bias(table, index) if layers.plain_tensor(table) else None

    @classmethod
    def shift(cls, block: nn.Module, image: Tensor, reverse: bool) -> Tensor:
        by = block.shift_size if reverse else -block.shift_size
        return image.roll((by, by), (1, 2)) if block.shift_size > 0 else image


def _cut(image: Tensor, size: int) -> Tensor:
    """[B, H, W, D] -> [B * windows, size * size, D], image after image."""
    batch, height, width, dim = image.shape
    windows = image.reshape(batch, height // size, size, width // size, size, dim).transpose(2, 3)
    return windows.reshape(-1, size * size, dim)


def _joined(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """The way back: [B, height, width, D]."""
    windows = windows.reshape(-1, height // size, width // size, size, size, windows.shape[-1]).transpose(2, 3)
    return windows.reshape(-1, height, width, windows.shape[-1])

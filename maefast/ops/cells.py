"""The plan of a masked convnet and its packed layout: `CellMask`, `pack_cells`, `unpack_cells`.

The mask is drawn on a coarse grid of cells, so that active sites come as whole cells (SparK, Tian et al., 2023;
ConvNeXt V2, Woo et al., 2023). A feature map of H x W sites over GH x GW cells is stored as its active cells alone,
[T, h, w, C] with h = H / GH and w = W / GW: no hash map, no rulebook, and one plan for every level of a network.
Volumes have a side more: D x H x W sites over GD x GH x GW cells, stored as [T, d, h, w, C].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _autograd, _checks, _dispatch, _registry
from maefast.ops.mask import TokenMask

_raw_op = _registry.family("cells")

MASKED, OUTSIDE = -1, -2  # in the neighbour tables


@dataclass(frozen=True, eq=False)
class CellMask:
    """Which cells of a grid are active in each sample.

    Attributes:
        tokens: the plan over the GH*GW cells as tokens; visible = active. Packed cells stand in its order.
        grid: (GH, GW), or (GD, GH, GW) of volumes.
    """

    tokens: TokenMask
    grid: tuple[int, ...]
    _tables: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _coarse: dict[tuple[int, ...], CellMask] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.grid) not in (2, 3):
            raise ValueError(f"a grid has two or three sides, got {self.grid}")
        if min(self.grid) < 1 or math.prod(self.grid) != self.tokens.num_tokens:
            raise ValueError(
                f"a plan of {self.tokens.num_tokens} tokens does not fit a grid of {times(self.grid)} cells"
            )
        if self.tokens.total_absent:
            raise ValueError(
                f"a cell is active or masked, but {self.tokens.total_absent} tokens of this plan are absent"
            )

    @property
    def sides(self) -> int:
        """2, or 3 of volumes."""
        return len(self.grid)

    @property
    def batch(self) -> int:
        return self.tokens.batch

    @property
    def cells(self) -> Tensor:
        """int32 [T], flat indices ``(b * GH + y) * GW + x`` of the active cells; with depth, b is b * GD + z."""
        return self.tokens.visible

    @property
    def cu_cells(self) -> Tensor:
        """int32 [B+1], where each sample's cells start."""
        return self.tokens.cu_visible

    @property
    def slot(self) -> Tensor:
        """int32 [B * cells of the grid], the packed index of each cell, negative where it is masked."""
        return self.tokens.slot

    @property
    def total(self) -> int:
        """T, the number of active cells in the batch."""
        return self.tokens.total_visible

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def mask(self) -> Tensor:
        """bool [B, GH, GW] or [B, GD, GH, GW], True where the cell is masked (removed)."""
        return self.tokens.mask.view(self.batch, *self.grid)

    def neighbours(self, radius: int = 1) -> Tensor:
        """int32 [T, (2 radius + 1)^2], or ^3 of volumes: packed index of the cells around each active one, row by row
        (the middle one is itself); -1 where that cell is masked, -2 where it lies outside the grid. Made once, then
        kept."""
        if not _serves(self._tables.get(radius)):
            self._tables[radius] = self._neighbours(radius)
        return self._tables[radius]

    def _neighbours(self, radius: int) -> Tensor:
        if radius < 0:
            raise ValueError(f"radius must not be negative, got {radius}")
        slot = self.slot.clamp(min=MASKED).view(self.batch, *self.grid)
        slot = F.pad(slot, (radius,) * (2 * self.sides), value=OUTSIDE).flatten()
        step = torch.arange(2 * radius + 1, device=self.device)
        rest = self.cells.long()
        corner, around, stride = 0, step.new_zeros(1), 1
        for size in reversed(self.grid):  # from the innermost side out; a side is wider by a radius on both ends
            corner, rest = corner + rest % size * stride, torch.div(rest, size, rounding_mode="floor")
            around = (step[:, None] * stride + around).flatten()
            stride *= size + 2 * radius
        return slot[(corner + rest * stride)[:, None] + around]

    def coarser(self, grid: Sequence[int]) -> CellMask:
        """The plan of a level of `grid` sites that is coarser than the cells, all of them visible. Made once and kept,
        so that maps which became dense by different ways go together."""
        grid = tuple(grid)
        if grid not in self._coarse or not _serves(self._coarse[grid].cells):
            self._coarse[grid] = CellMask.all_visible(self.batch, grid, self.device)
        return self._coarse[grid]

    def upsampled_mask(self, size: Sequence[int]) -> Tensor:
        """bool [B, 1, H, W] or [B, 1, D, H, W] of the active sites of a level of `size`, as published code multiplies
        by."""
        mask = self.mask
        for dim, sites in enumerate(self.cell_size(size), 1):
            mask = mask.repeat_interleave(sites, dim)
        return ~mask[:, None]

    def cell_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """(h, w), the sites of one cell where the level has `size` = (H, W) sites; (d, h, w) of volumes."""
        if len(size) != self.sides:
            raise ValueError(f"a level of {times(size)} sites does not fit a grid of {times(self.grid)} cells")
        if any(sites < cells or sites % cells for sites, cells in zip(size, self.grid)):
            raise ValueError(
                f"{times(size)} sites are no multiple of the grid of {times(self.grid)} cells: choose an image"
                " side that is a multiple of the cell, and a level that is not coarser than the cells"
            )
        return tuple(sites // cells for sites, cells in zip(size, self.grid))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CellMask:
        """The same plan on another device."""
        return CellMask(self.tokens.to(device, non_blocking), self.grid)

    def __repr__(self) -> str:
        kept = f"keep={self.tokens.keep}" if self.tokens.keep is not None else f"ragged, {self.total} active"
        return f"CellMask(batch={self.batch}, grid={'x'.join(map(str, self.grid))}, {kept}, device={self.device})"

    @staticmethod
    def from_bool(masked: Tensor, keep: int | Sequence[int] | None = None) -> CellMask:
        """From a boolean map [B, GH, GW] or [B, GD, GH, GW], True = masked; see `TokenMask.from_bool` for `keep`."""
        _checks.tensor("masked", masked, ndim=(3, 4), floating=False)
        if 0 in masked.shape:
            raise ValueError(f"masked must have at least one sample and one cell, got shape {tuple(masked.shape)}")
        return CellMask(TokenMask.from_bool(masked.flatten(1), keep), tuple(masked.shape[1:]))

    @staticmethod
    def all_visible(batch: int, grid: Sequence[int], device: torch.device | str = "cpu") -> CellMask:
        """A plan that masks nothing: the network is then the dense one."""
        grid = _checks.grid("grid", grid, solid=True)
        return CellMask(TokenMask.all_visible(batch, math.prod(grid), device), grid)


def _serves(kept: Tensor | None) -> bool:
    """Whether a table is there and of use: one that was made in inference mode is none to what trains."""
    if kept is None or torch.compiler.is_compiling():
        return kept is not None
    return not kept.is_inference() or torch.is_inference_mode_enabled()


def times(sizes: Sequence[int]) -> str:
    """As messages say it: "4 x 4"."""
    return " x ".join(map(str, sizes))


def layout(sides: int) -> str:
    """Of packed cells, as messages say it."""
    return "[T, h, w, C]" if sides == 2 else "[T, d, h, w, C]"


def check_plan(plan: object) -> None:
    if not isinstance(plan, CellMask):
        raise TypeError(f"plan must be a maefast.ops.CellMask, got {type(plan).__name__}")


def check_cells(plan: object, x: Tensor, name: str = "x") -> None:
    """`plan` is a CellMask, `x` packed cells [T, h, w, C] of it ([T, d, h, w, C] of volumes) on the same device."""
    check_plan(plan)
    _checks.tensor(name, x, ndim=plan.sides + 2)
    if x.shape[0] != plan.total or 0 in x.shape[1:]:
        want = layout(plan.sides).replace("T", str(plan.total))
        raise ValueError(f"{name} must be packed cells {want} of this plan, got {tuple(x.shape)}")
    _checks.same_device(**{name: x}, plan=plan.slot)


# --- pack and unpack ---------------------------------------------------------------------------------------


def pack_cells(x: Tensor, plan: CellMask, *, backend: str | None = None) -> Tensor:
    """Take the active cells of a feature map. An exact copy.

    Args:
        x: [B, C, H, W], or [B, C, D, H, W] where the grid has three sides; contiguous or channels last (others are
            copied first), every side a multiple of the grid's.

    Returns:
        [T, h, w, C] with h = H / GH, w = W / GW; [T, d, h, w, C] of volumes.

    Raises:
        TypeError, ValueError: x does not fit the plan.
    """
    check_plan(plan)
    _checks.tensor("x", x, ndim=plan.sides + 2)
    if x.shape[0] != plan.batch or x.shape[1] == 0:
        want = f"[{plan.batch}, C, {'H, W' if plan.sides == 2 else 'D, H, W'}]"
        raise ValueError(f"x must be a map {want} for this plan, got {tuple(x.shape)}")
    plan.cell_size(x.shape[2:])
    _checks.same_device(x=x, plan=plan.slot)
    name = _dispatch.choose("pack_cells", x.device.type, x.dtype, backend, solid=plan.sides == 3)
    if name == "reference":
        return pack_cells_reference(x, plan)
    channels_last = not x.is_contiguous() and x.stride(1) == 1
    memory = x.movedim(1, -1) if channels_last else x
    return _autograd.apply(_PackCells, memory, plan.cells, plan.slot, plan.batch, plan.grid, channels_last, name)


def pack_cells_reference(x: Tensor, plan: CellMask) -> Tensor:
    """The definition, differentiable."""
    sites, sides = plan.cell_size(x.shape[2:]), plan.sides
    cells = x.reshape(*x.shape[:2], *(size for pair in zip(plan.grid, sites) for size in pair))
    cells = cells.permute(0, *range(2, 2 * sides + 2, 2), *range(3, 2 * sides + 3, 2), 1)
    return cells.reshape(-1, *sites, x.shape[1])[plan.cells.long()]


@_raw_op("pack_cells(Tensor x, Tensor cells, SymInt[] grid, bool channels_last) -> Tensor")
def _pack_cells_fake(x, cells, grid, channels_last):
    sizes, channels = (x.shape[1:-1], x.shape[-1]) if channels_last else (x.shape[2:], x.shape[1])
    return x.new_empty((cells.shape[0], *(size // g for size, g in zip(sizes, grid)), channels))


@_raw_op("unpack_cells(Tensor x, Tensor slot, SymInt[] grid, Tensor? fill, bool channels_last) -> Tensor")
def _unpack_cells_fake(x, slot, grid, fill, channels_last):
    batch, channels = grid[0], x.shape[-1]
    size = tuple(g * sites for g, sites in zip(grid[1:], x.shape[1:-1]))
    return x.new_empty((batch, *size, channels) if channels_last else (batch, channels, *size))


@_raw_op("fill_sum(Tensor grad, Tensor slot, SymInt[] grid) -> Tensor")
def _fill_sum_fake(grad, slot, grid):
    wide = torch.float64 if grad.dtype is torch.float64 else torch.float32
    return grad.new_empty(grad.shape[-1:], dtype=wide)


class _PackCells(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cells, slot, batch, grid, channels_last, name):
        if ctx is not None:
            ctx.save_for_backward(slot)
            ctx.grid, ctx.channels_last, ctx.backend = [batch, *grid], channels_last, name
        return _registry.raw("pack_cells", name)(x.contiguous(), cells, list(grid), channels_last)

    @staticmethod
    @_autograd.once("pack_cells")
    def backward(ctx, grad):
        run = _registry.raw("unpack_cells", ctx.backend)
        return run(grad.contiguous(), *ctx.saved_tensors, ctx.grid, None, ctx.channels_last), *(None,) * 6


def unpack_cells(x: Tensor, plan: CellMask, fill: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Put packed cells back on the map; SparK's densify when `fill` is its mask token.

    Args:
        x: [T, h, w, C], or [T, d, h, w, C] of volumes. fill: C values, those of every masked site; zero if None.

    Returns:
        [B, C, H, W] or [B, C, D, H, W] in channels-last memory, in x's dtype. The gradient of `fill`, a sum over all
        masked sites, is deterministic, summed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: x or fill does not fit the plan.
    """
    check_cells(plan, x)
    if fill is not None:
        fill = _checks.vector("fill", fill, x.shape[-1])
        _checks.same_device(x=x, fill=fill)
    name = _dispatch.choose("unpack_cells", x.device.type, x.dtype, backend, solid=plan.sides == 3)
    if name == "reference":
        return unpack_cells_reference(x, plan, fill)
    full = _autograd.apply(_UnpackCells, x, fill, plan.cells, plan.slot, plan.batch, plan.grid, name)
    return full.movedim(-1, 1)


def unpack_cells_reference(x: Tensor, plan: CellMask, fill: Tensor | None = None) -> Tensor:
    """The definition, differentiable."""
    sites, channels, sides = x.shape[1:-1], x.shape[-1], plan.sides
    full = x.new_zeros(channels) if fill is None else fill.to(x.dtype)
    full = full.expand(plan.batch * plan.tokens.num_tokens, *sites, channels).index_copy(0, plan.cells.long(), x)
    full = full.view(plan.batch, *plan.grid, *sites, channels)
    full = full.permute(0, *(side + at for side in range(1, sides + 1) for at in (0, sides)), -1)
    return full.reshape(plan.batch, *(g * n for g, n in zip(plan.grid, sites)), channels).movedim(-1, 1)


class _UnpackCells(torch.autograd.Function):
    """To [B, H, W, C] or [B, D, H, W, C]."""

    @staticmethod
    def forward(ctx, x, fill, cells, slot, batch, grid, name):
        if ctx is not None:
            ctx.save_for_backward(cells, slot)
            ctx.batch, ctx.grid, ctx.backend = batch, grid, name
            ctx.fill_dtype = None if fill is None else fill.dtype
        value = None if fill is None else fill.to(x.dtype).contiguous()
        return _registry.raw("unpack_cells", name)(x.contiguous(), slot, [batch, *grid], value, True)

    @staticmethod
    @_autograd.once("unpack_cells")
    def backward(ctx, grad):
        cells, slot = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_fill = None
        if ctx.needs_input_grad[0]:
            grad_x = _registry.raw("pack_cells", ctx.backend)(grad, cells, list(ctx.grid), True)
        if ctx.needs_input_grad[1]:
            grad_fill = _registry.raw("fill_sum", ctx.backend)(grad, slot, [ctx.batch, *ctx.grid])
            grad_fill = grad_fill.to(ctx.fill_dtype)
        return grad_x, grad_fill, *(None,) * 5

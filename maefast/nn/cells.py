"""`Cells`: the active cells of a masked feature map, in the place of the [B, C, H, W] tensor a convnet expects.

A plain convnet runs on them unchanged: torch's functions look for `__torch_function__` and find the ops of maefast
here (`cell_functions`). What is not there raises and names the module, so that nothing is computed on a wrong shape.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.ops import CellMask

HANDLERS: dict[Callable, Callable] = {}  # filled by maefast/nn/cell_functions.py


class UnknownSparseOp(NotImplementedError):
    """A function or module that has no meaning on packed cells (yet)."""


class UnknownSparseAttribute(UnknownSparseOp, AttributeError):
    """The same for a method or attribute of a tensor."""


class Cells:
    """Active cells of a batch of feature maps.

    Args:
        rows: [T, h, w, C], packed cells of `plan`.
        plan: the CellMask.
        channels_last: present the shape as (B, H, W, C), after the ``permute(0, 2, 3, 1)`` of a ConvNeXt block.

    A map's values at masked sites are absent: convolutions and pooling read zeros there, norms leave them out.
    """

    def __init__(self, rows: Tensor, plan: CellMask, channels_last: bool = False) -> None:
        self._rows: Tensor | None = rows
        self._norm: PendingNorm | None = None
        self.plan, self.channels_last = plan, channels_last
        self._sites, self._channels = tuple(rows.shape[1:3]), rows.shape[3]
        self.dtype, self.device = rows.dtype, rows.device

    @staticmethod
    def pack(images: Tensor, plan: CellMask) -> Cells:
        """The active cells of images [B, C, H, W]."""
        return Cells(ops.pack_cells(images, plan), plan)

    @property
    def rows(self) -> Tensor:
        """[T, h, w, C]."""
        if self._rows is None:
            self._rows, self._norm = self._norm.run("none"), None
        return self._rows

    def dense(self, fill: Tensor | None = None) -> Tensor:
        """[B, C, H, W] in channels-last memory; masked sites are `fill` [C], or zero."""
        return ops.unpack_cells(self.rows, self.plan, fill)

    def like(self, rows: Tensor) -> Cells:
        """Other values on the same plan and in the same layout."""
        return Cells(rows, self.plan, self.channels_last)

    @property
    def shape(self) -> torch.Size:
        """Of the map that this stands for: (B, C, H, W), or (B, H, W, C)."""
        size = tuple(s * g for s, g in zip(self._sites, self.plan.grid))
        if self.channels_last:
            return torch.Size((self.plan.batch, *size, self._channels))
        return torch.Size((self.plan.batch, self._channels, *size))

    @property
    def channel_dim(self) -> int:
        return 3 if self.channels_last else 1

    ndim = 4
    is_nested = is_mkldnn = is_sparse = False

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    @property
    def requires_grad(self) -> bool:
        return self.rows.requires_grad

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def new_empty(self, *args, **kwargs) -> Tensor:
        return self.rows.new_empty(*args, **kwargs)

    def permute(self, *dims: int) -> Cells:
        order = tuple(d % 4 for d in (dims[0] if len(dims) == 1 else dims))
        if order == ((0, 3, 1, 2) if self.channels_last else (0, 2, 3, 1)):
            return Cells(self.rows, self.plan, not self.channels_last)
        raise UnknownSparseOp(f"cells can be permuted between (B, C, H, W) and (B, H, W, C) only, not by {order}")

    def contiguous(self, **kwargs) -> Cells:
        return self

    def to(self, *args, **kwargs) -> Cells:
        return self.like(self.rows.to(*args, **kwargs))

    def mean(self, *args, **kwargs) -> Tensor:
        return torch.mean(self, *args, **kwargs)

    def replace(self, other: Cells) -> Cells:
        """Take the other's values: what an in-place function does."""
        self._rows, self._norm = other._rows, other._norm
        self._sites, self._channels, self.dtype = other._sites, other._channels, other.dtype
        return self

    def __add__(self, other):
        return torch.add(self, other)

    def __sub__(self, other):
        return torch.sub(self, other)

    def __mul__(self, other):
        return torch.mul(self, other)

    def __truediv__(self, other):
        return torch.div(self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __iadd__(self, other):
        return self.replace(torch.add(self, other))

    def __imul__(self, other):
        return self.replace(torch.mul(self, other))

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        raise UnknownSparseAttribute(f"{where()}packed cells have no Tensor.{name}: only what convnets need is there")

    def __repr__(self) -> str:
        return f"Cells(shape={tuple(self.shape)}, {self.plan!r}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        handler = HANDLERS.get(func)
        if handler is None:
            name = getattr(func, "__qualname__", None) or getattr(func, "__name__", str(func))
            raise UnknownSparseOp(f"{where()}{name} is not known on packed cells (see maefast/nn/cell_functions.py)")
        return handler(*args, **(kwargs or {}))


def where() -> str:
    """ "in layer1.0 (Bottleneck): " for the module whose forward is running, as far as it can be told."""
    frame, owner = sys._getframe(1), None
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, nn.Module):
            if owner is None:
                owner = found
            root = found
        frame = frame.f_back
    if owner is None:
        return ""
    name = next((name for name, module in root.named_modules() if module is owner), "")
    return f"in {name or 'the model'} ({type(owner).__name__}): "


class PendingNorm:
    """A batch norm that waits for what follows it, so that a residual and a ReLU are done in the same pass.

    The running statistics move once, at the first `run`.
    """

    def __init__(self, cells: Cells, **args) -> None:
        self.x, self.residual, self.args, self.done = cells.rows, None, args, [False]

    def plus(self, other: Cells) -> PendingNorm | None:
        """With a residual, if there is none yet and it can take one."""
        if self.residual is not None or other.dtype is not self.x.dtype:
            return None
        new = object.__new__(PendingNorm)
        # Its values, not the object: after ``other += norm`` that object waits for this norm itself.
        new.x, new.residual, new.args, new.done = self.x, other.rows, self.args, self.done
        return new

    def run(self, act: str) -> Tensor:
        args = dict(self.args)
        if self.done[0] and args["training"]:
            args.update(running_mean=None, running_var=None)
        self.done[0] = True
        return ops.batch_norm_act(self.x, act=act, residual=self.residual, **args)


def pending(norm: PendingNorm, like: Cells) -> Cells:
    out = object.__new__(Cells)
    out.__dict__.update(like.__dict__)
    out._rows, out._norm = None, norm
    return out

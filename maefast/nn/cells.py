"""`Cells`: the active cells of a masked feature map, in the place of the tensor a convnet expects: [B, C, H, W], or
[B, C, D, H, W] of volumes.

A plain convnet runs on them unchanged: torch's functions look for `__torch_function__` and find the ops of maefast
(`cell_functions`), what goes along channels (`cell_channels`), or torch's own function on the packed values
(`cell_elementwise`). What is in none of them raises and names the module, so that nothing is computed on a wrong shape.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.cell_views import Part, Shared
from maefast.ops import CellMask
from maefast.ops.cell_norm import BatchNorm
from maefast.ops.cells import pack_cells_reference, unpack_cells_reference

HANDLERS: dict[Callable, Callable] = {}  # of torch functions, written out in maefast/nn/cell_*.py
ELEMENTWISE: dict[Callable, Callable] = {}  # made when it is first needed, by maefast/nn/cell_elementwise.py


class UnknownSparseOp(NotImplementedError):
    """A function or module that has no meaning on packed cells (yet)."""


class UnknownSparseAttribute(UnknownSparseOp, AttributeError):
    """The same for a method or attribute of a tensor."""


class UnknownSparseFunction(UnknownSparseOp, TypeError):
    """The same for a function or operator: whoever tries whether cells can be iterated expects a TypeError."""


class UnknownSparseArgument(UnknownSparseOp, ValueError, TypeError):
    """A known function with arguments that have no meaning on packed cells."""


class Cells:
    """Active cells of a batch of feature maps.

    Args:
        rows: [T, h, w, C], packed cells of `plan`; [T, d, h, w, C] where its grid has three sides.
        plan: the CellMask.
        channels_last: present the shape as (B, H, W, C), after the ``permute(0, 2, 3, 1)`` of a ConvNeXt block.

    A map's values at masked sites are absent: convolutions and pooling read zeros there, norms leave them out. So it
    stays after a function with f(0) != 0: ``torch.sigmoid`` or ``x + 1`` changes the sites that are seen, no other.
    """

    _shared: Shared | None = None  # with the cells that are views of these, or that these are a view of
    _is_view = False

    def __init__(self, rows: Tensor, plan: CellMask, channels_last: bool = False) -> None:
        self._rows: Tensor | None = rows
        self._norm: PendingNorm | None = None
        self.plan, self.channels_last = plan, channels_last
        self._sites, self._channels = tuple(rows.shape[1:-1]), rows.shape[-1]
        self.ndim = rows.ndim
        self.dtype, self.device = rows.dtype, rows.device

    @staticmethod
    def pack(images: Tensor, plan: CellMask) -> Cells:
        """The active cells of images [B, C, H, W] or volumes [B, C, D, H, W], as the plan's grid has sides."""
        run = ops.pack_cells if images.is_floating_point() else pack_cells_reference
        return Cells(run(images, plan), plan)

    @property
    def rows(self) -> Tensor:
        """[T, h, w, C] or [T, d, h, w, C]."""
        if self._rows is None:
            self._rows, self._norm = self._norm.run("none"), None
        elif self._shared is not None and self._version != self._shared.version:
            self._rows, self._version = self._shared.take(self._parts), self._shared.version
        return self._rows

    def dense(self, fill: Tensor | None = None) -> Tensor:
        """[B, C, H, W] or [B, C, D, H, W] in channels-last memory; masked sites are `fill` [C], or zero."""
        run = ops.unpack_cells if self.dtype.is_floating_point else unpack_cells_reference
        return run(self.rows, self.plan, fill)

    def like(self, rows: Tensor) -> Cells:
        """Other values on the same plan and in the same layout."""
        return Cells(rows, self.plan, self.channels_last)

    @property
    def shape(self) -> torch.Size:
        """Of the map that this stands for: (B, C, H, W), or (B, H, W, C); volumes with D in front of H."""
        size = tuple(s * g for s, g in zip(self._sites, self.plan.grid))
        if self.channels_last:
            return torch.Size((self.plan.batch, *size, self._channels))
        return torch.Size((self.plan.batch, self._channels, *size))

    @property
    def channel_dim(self) -> int:
        return self.ndim - 1 if self.channels_last else 1

    @property
    def site_dims(self) -> tuple[int, ...]:
        """The sides of the map: (2, 3), or (1, 2); of volumes (2, 3, 4), or (1, 2, 3)."""
        first = 1 if self.channels_last else 2
        return tuple(range(first, first + self.ndim - 2))

    @property
    def layouts(self) -> tuple[str, str]:
        """As messages say it."""
        sides = ("D, " if self.ndim == 5 else "") + "H, W"
        return f"(B, C, {sides})", f"(B, {sides}, C)"

    is_nested = is_mkldnn = is_sparse = is_quantized = is_meta = False
    layout = torch.strided

    def dim(self) -> int:
        return self.ndim

    ndimension = dim

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Of the whole map, as `shape`."""
        return self.shape.numel()

    nelement = numel

    @property
    def requires_grad(self) -> bool:
        return self.rows.requires_grad

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def new_empty(self, *args, **kwargs) -> Tensor:
        return self.rows.new_empty(*args, **kwargs)

    def new_zeros(self, *args, **kwargs) -> Tensor:
        return self.rows.new_zeros(*args, **kwargs)

    def new_ones(self, *args, **kwargs) -> Tensor:
        return self.rows.new_ones(*args, **kwargs)

    def new_full(self, *args, **kwargs) -> Tensor:
        return self.rows.new_full(*args, **kwargs)

    def new_tensor(self, *args, **kwargs) -> Tensor:
        return self.rows.new_tensor(*args, **kwargs)

    def part(self, *parts: Part, channels_last: bool | None = None) -> Cells:
        """Cells that share these values, or a part of them, as a view of a tensor does."""
        if self._shared is None:
            self._shared, self._parts, self._version = Shared(self.rows), (), 0
        rows = self.rows
        for take, _ in parts:
            rows = take(rows)
        out = Cells(rows, self.plan, self.channels_last if channels_last is None else channels_last)
        out._shared, out._parts, out._version = self._shared, (*self._parts, *parts), self._shared.version
        out._is_view = True
        return out

    def permute(self, *order: int, dims: Sequence[int] = ()) -> Cells:
        order = tuple(d % self.ndim for d in dims or (order[0] if len(order) == 1 else order))
        if order == tuple(range(self.ndim)):
            return self
        other = (self.ndim - 1, *self.site_dims) if self.channels_last else (*self.site_dims, 1)
        if order == (0, *other):
            return self.part(channels_last=not self.channels_last)
        raise UnknownSparseOp(
            f"{where()}cells can be permuted between {' and '.join(self.layouts)} only, not by {order}"
        )

    def contiguous(self, **kwargs) -> Cells:
        """Of a view a copy, as in torch. Rows are replaced, never written, so it may have the same ones."""
        return self.like(self.rows) if self._is_view else self

    def is_contiguous(self, **kwargs) -> bool:
        return True

    def mean(self, *args, **kwargs) -> Tensor | Cells:
        return torch.mean(self, *args, **kwargs)

    def replace(self, other: Cells) -> Cells:
        """Take the other's values: what an in-place function does."""
        if self._shared is not None:
            self._shared.put(self._parts, other.rows)
        else:
            self._rows, self._norm = (other.rows, None) if other._norm is None else (None, other._norm)
        self._sites, self._channels, self.dtype = other._sites, other._channels, other.dtype
        return self

    __hash__ = object.__hash__  # == is elementwise, as a tensor's
    __array_priority__ = 1000  # numpy's operators leave it to ours

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        if not ELEMENTWISE and hasattr(torch.Tensor, name):
            complete()
            if hasattr(Cells, name):
                return getattr(self, name)
        raise UnknownSparseAttribute(
            f"{where()}packed cells have no Tensor.{name}: it mixes sites, or leaves the layout of a map"
        )

    def __repr__(self) -> str:
        return f"Cells(shape={tuple(self.shape)}, {self.plan!r}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        handler = HANDLERS.get(func)
        if handler is None:
            if not ELEMENTWISE:
                complete()
            handler = ELEMENTWISE.get(func)
        if handler is None:
            raise UnknownSparseFunction(f"{where()}{name_of(func)} is not known on packed cells (docs/convnets.md)")
        return serve(handler, func, args, kwargs)


def serve(handler: Callable, func: Callable, args: tuple, kwargs: dict | None):
    """Call the handler of `func`; what it cannot do with its arguments names the module, too."""
    try:
        return handler(*args, **(kwargs or {}))
    except (TypeError, ValueError) as error:
        if isinstance(error, UnknownSparseOp):
            raise
        raise UnknownSparseArgument(f"{where()}{name_of(func)} on packed cells: {error}") from error


def complete() -> None:
    """Make the table of elementwise functions, which takes some 30 ms: not at import."""
    from maefast.nn.cell_elementwise import fill

    fill()


def name_of(func: Callable) -> str:
    name = getattr(func, "__qualname__", None) or getattr(func, "__name__", str(func))
    return name.replace("_VariableFunctionsClass.", "torch.").replace("TensorBase.", "Tensor.")


def method(func: Callable) -> Callable:
    """A function of torch as a method of `Cells`."""

    def call(self, *args, **kwargs):
        return Cells.__torch_function__(func, (), (self, *args), kwargs)

    return call


# Python looks for operators on the class, not in __getattr__. Those without a handler name the module, as functions do.
_OPERATORS = """
    add sub mul truediv and or xor lshift rshift floordiv mod pow matmul radd rsub rmul rtruediv rand ror rxor rlshift
    rrshift rfloordiv rmod rpow rmatmul iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift neg
    pos abs invert lt le gt ge eq ne getitem setitem contains len iter bool float int complex index array reversed
"""
for _name in (f"__{name}__" for name in _OPERATORS.split()):
    setattr(Cells, _name, method(getattr(Tensor, _name)))


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

    Its statistics are taken, and the running ones moved, at the call; the rest is computed as it would have been then:
    with or without gradients, from the weights of then.
    """

    def __init__(self, cells: Cells, weight: Tensor | None, bias: Tensor | None, **args) -> None:
        self.x, self.residual, self.mode = cells.rows, None, _mode()
        if not self.mode[0]:  # values alone, a few of them
            weight, bias = (t if t is None else t.clone() for t in (weight, bias))
        if not args["training"]:
            args["running_mean"] = args["running_mean"].clone()
        self.affine = () if torch.compiler.is_compiling() or not self.mode[0] else (weight, bias)
        self.versions = [t._version for t in self.affine if t is not None]
        self.norm = BatchNorm(self.x, weight, bias, **args)

    def plus(self, other: Cells) -> PendingNorm | None:
        """With a residual, if there is none yet and it can take one."""
        if self.residual is not None or other.dtype is not self.x.dtype or not self.fits():
            return None
        new = object.__new__(PendingNorm)
        new.__dict__.update(self.__dict__)
        # Its values, not the object: after ``other += norm`` that object waits for this norm itself.
        new.residual = other.rows
        return new

    def fits(self) -> bool:
        """Whether what follows is computed with gradients, or without, as the norm is."""
        return self.mode == _mode()

    def run(self, act: str) -> Tensor:
        if self.versions != [t._version for t in self.affine if t is not None]:
            raise RuntimeError(
                "the weight or bias of a batch norm was changed in place before its output on packed cells was used;"
                " read the output first (`cells.rows`)"
            )
        if self.fits():
            return self.norm(act, self.residual)
        grads, inference = self.mode
        outside = nullcontext() if inference == _mode()[1] else torch.inference_mode(inference)
        with outside, torch.set_grad_enabled(grads):
            return self.norm(act, self.residual)


def _mode() -> tuple[bool, bool]:
    """(whether gradients are recorded, whether in inference mode, of which a compiled graph knows nothing)."""
    return torch.is_grad_enabled(), not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def pending(norm: PendingNorm, like: Cells) -> Cells:
    out = object.__new__(Cells)
    out.__dict__.update(like.__dict__)
    out._rows, out._norm, out._shared, out._is_view = None, norm, None, False
    return out

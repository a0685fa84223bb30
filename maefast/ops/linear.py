"""Linear layers on the faster of two libraries.

torch sends float32 products on a CPU to MKL, which takes a slow path on processors of other makers; oneDNN, which the
same torch carries for other uses, does not. Which one wins is measured once on each machine and kept.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _autograd, _checks, _dispatch, _registry

_raw_op = _registry.family("linear", triton=False)  # a GPU has no use for it

LIBRARIES = ("torch", "onednn")
MARGIN = 1.25  # oneDNN must win by this much: a near tie must not be decided by noise
MIN_WORK = 2**20  # multiply-adds below which the overhead of a call decides, and torch's is lower
MIN_APART = 2**18  # values of weights below which a copy of them costs less than more calls

_choice: tuple[str, str] | None = None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``, as `torch.nn.functional.linear`; equal to it up to float32 rounding.

    Args:
        x: [..., K]. weight: [N, K]. bias: [N] or None.

    Returns:
        [..., N]. float32 on a CPU runs on the library that `linear_library` names, forward and both gradients;
        everything else, and the backend "reference", is `F.linear` itself.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
    """
    try:  # a small call is cheap, and so are its checks: they are made where it fails
        if (
            x.device.type != "cpu"
            or x.dtype is not torch.float32
            or weight.dtype is not torch.float32
            or x.numel() * weight.shape[0] < MIN_WORK
            or torch.is_autocast_enabled("cpu")
            or _dispatch.forced() == "reference"
            or linear_library()[0] == "torch"
        ):
            return F.linear(x, weight, bias)
    except (AttributeError, IndexError, TypeError, RuntimeError):
        _check(x, weight, bias)
        raise
    _check(x, weight, bias)
    # oneDNN falls to a loop, hundreds of times slower, on strides that are neither a matrix's nor its transpose's, and
    # reads a bias as if it had none.
    bias = None if bias is None else bias.contiguous()
    return _autograd.apply(_Linear, x.contiguous(), weight.contiguous(), bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _checks.tensor("x", x)
    _checks.tensor("weight", weight, ndim=2)
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., {weight.shape[1]}] for this weight, got {tuple(x.shape)}")
    if bias is not None:
        _checks.tensor("bias", bias)
        if bias.ndim != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias must be [{weight.shape[0]}] for this weight, got {tuple(bias.shape)}")
    _checks.same_device(x=x, weight=weight, bias=bias)
    if _checks.autocast(x.device.type) is None:
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype is not x.dtype:
                raise TypeError(f"x is {x.dtype} but {name} is {tensor.dtype}: convert one, or use autocast")


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition."""
    return F.linear(x, weight, bias)


def linear_library() -> tuple[str, str]:
    """("torch" or "onednn", why) for large float32 products on this CPU.

    MAEFAST_LINEAR=torch|onednn decides; otherwise a measurement of about 0.1 s at the first use, kept for later runs
    (so that a resumed run rounds as the first one did) under XDG_CACHE_HOME or ~/.cache.
    """
    global _choice
    if _choice is None:
        _choice = _decide()
    return _choice


# What `torch.compiler.assume_constant_result` sets; itself it imports dynamo, which takes as long as torch.
linear_library._dynamo_marked_constant = True


def _decide() -> tuple[str, str]:
    asked = os.environ.get("MAEFAST_LINEAR", "auto")
    if asked not in (*LIBRARIES, "auto"):
        raise ValueError(f"MAEFAST_LINEAR must be torch, onednn or auto, got {asked!r}")
    if not _has_onednn():
        if asked == "onednn":
            raise RuntimeError("MAEFAST_LINEAR=onednn, but this torch has no mkldnn::_linear_pointwise")
        return "torch", "this torch has no private oneDNN linear"
    if asked != "auto":
        return asked, "MAEFAST_LINEAR"
    path = _cache_file()
    try:
        kept = json.loads(path.read_text())
        if kept["library"] in LIBRARIES:
            return kept["library"], f"{kept['why']} (measured earlier on this machine)"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    ratio = _measure()
    name = "onednn" if ratio >= MARGIN else "torch"
    why = f"oneDNN ran a float32 product {ratio:.2f}x as fast as torch's default"
    _keep(path, {"library": name, "why": why})
    return name, why


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _cache_file() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cpu = "".join(c if c.isalnum() else "-" for c in _cpu_name())
    return root / "maefast" / f"linear-{cpu}-torch-{torch.__version__}-threads-{torch.get_num_threads()}.json"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _keep(path: Path, record: dict) -> None:
    """Write atomically; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(record, file)
        os.replace(file.name, path)
    except OSError:
        pass


@torch.no_grad()
def _measure(rows: int = 784, width: int = 768, rounds: int = 5) -> float:
    """Time of torch's product over oneDNN's, minima of interleaved runs."""
    x, weight = torch.full((rows, width), 0.5), torch.full((4 * width, width), 0.25)
    best = dict.fromkeys(LIBRARIES, float("inf"))
    for _ in range(rounds + 1):
        for name, run in (("torch", F.linear), ("onednn", _product)):
            start = time.perf_counter()
            run(x, weight)
            best[name] = min(best[name], time.perf_counter() - start)
    return best["torch"] / best["onednn"]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling():
        return _opaque_product(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


@torch.library.custom_op(f"{_registry.NAMESPACE}_onednn::linear", mutates_args=())
def _opaque_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`_product` as inductor should see it: its own lowering of the op fails on symbolic sizes."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


@_opaque_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# --- without autograd, for the transformer block ------------------------------------------------------------


class Products(NamedTuple):
    """The products of a linear layer on one library, without autograd and without looking at their arguments.

    Of several layers with the same input: rows of their weights one after another, or a tuple of them (`apart`)."""

    forward: Callable[..., Tensor]  # (x [R, K], weight [N, K], bias [N] or None) -> [R, N]
    input_gradient: Callable[[Tensor, Tensor], Tensor]  # (grad [R, N], weight) -> [R, K]
    # (grad, x, dtype of the weight's, of the bias's or None if it is not wanted) -> gradients of weight and bias
    weight_gradient: Callable[..., tuple[Tensor, Tensor | None]]


def products(device: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> Products:
    """Of the library that serves a layer of this size in `linear`."""
    large = device == "cpu" and dtype is torch.float32 and rows * inputs * outputs >= MIN_WORK
    return _ONEDNN if large and linear_library()[0] == "onednn" else _TORCH


def apart(device: str, dtype: torch.dtype, inputs: int, outputs: int) -> Products | None:
    """Of layers whose weights are not copied side by side, or None where the copy pays: a GPU fills better with one
    product, and oneDNN writes to no slice."""
    if device != "cpu" or dtype.itemsize < 4 or inputs * outputs < MIN_APART:
        return None
    return None if dtype is torch.float32 and linear_library()[0] == "onednn" else _APART


def _onednn_input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    return _product(grad, weight.t())


def _onednn_weight_gradient(
    grad: Tensor, x: Tensor, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    columns, total = _transpose_sum(grad, bias_dtype is not None)
    return _product(columns, x.t()), total


def _torch_weight_gradient(
    grad: Tensor, x: Tensor, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    total = None
    if bias_dtype is not None:
        # A sum in another dtype makes a copy of all rows on a CPU; on a GPU it rounds once.
        total = grad.sum(0) if bias_dtype is grad.dtype or not grad.is_cuda else grad.sum(0, dtype=bias_dtype)
    if dtype is grad.dtype:
        return torch.mm(grad.t(), x), total
    if grad.is_cuda and dtype is torch.float32:
        return torch.mm(grad.t(), x, out_dtype=dtype), total
    return torch.mm(grad.t(), x).to(dtype), total


def _forward_apart(x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    sizes = [weight.shape[0] for weight in weights]
    out = x.new_empty(x.shape[0], sum(sizes))
    biases = (None,) * len(sizes) if bias is None else bias.split(sizes)
    for part, weight, shift in zip(out.split(sizes, 1), weights, biases):
        if shift is None:
            torch.mm(x, weight.t(), out=part)
        else:
            torch.addmm(shift, x, weight.t(), out=part)
    return out


def _input_gradient_apart(grad: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    (part, *parts), (weight, *others) = grad.split([weight.shape[0] for weight in weights], 1), weights
    total = torch.mm(part, weight)
    for part, weight in zip(parts, others):
        total.addmm_(part, weight)
    return total


_TORCH = Products(F.linear, torch.mm, _torch_weight_gradient)
_APART = Products(_forward_apart, _input_gradient_apart, _torch_weight_gradient)
_ONEDNN = Products(_product, _onednn_input_gradient, _onednn_weight_gradient)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        if ctx is not None:
            ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @_autograd.once("linear")
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = _product(rows, weight.t()).view(x.shape) if need_x else None
        if not need_weight:
            return grad_x, None, rows.sum(0) if need_bias else None
        columns, grad_bias = _transpose_sum(rows, need_bias)
        return grad_x, _product(columns, x.reshape(-1, x.shape[-1]).t()), grad_bias


@_raw_op("transpose_sum(Tensor x, bool need_sum) -> (Tensor, Tensor)")
def _transpose_sum_fake(x, need_sum):
    return x.new_empty((x.shape[1], x.shape[0])), x.new_empty(x.shape[1:] if need_sum else (0,))


def _transpose_sum(rows: Tensor, need_sum: bool) -> tuple[Tensor, Tensor | None]:
    """Gradient rows as the product for the weight needs them (oneDNN's linear copies any other layout, slowly), and
    their sum for the bias, in one pass."""
    if "transpose_sum" not in _dispatch.CPU_OPS:
        return rows.t(), rows.sum(0) if need_sum else None
    columns, total = _registry.raw("transpose_sum", "cpu")(rows.contiguous(), need_sum)
    return columns, total if need_sum else None

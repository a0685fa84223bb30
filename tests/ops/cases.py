"""Every public op with a differentiable input, at a small size: what the tests of `test_frozen` and `test_autograd`
run. An op is one entry, and one more for each way of serving it that has a backward of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import maefast
from maefast import masking, ops
from maefast.ops import CellMask, TokenMask, _dispatch
from maefast.ops.linear import linear_reference


class Case(NamedTuple):
    """`call(backend, device, **inputs)` with `inputs` of these shapes, named as the op's parameters."""

    inputs: dict[str, tuple[int, ...]]
    call: Callable
    raw: str | None  # the raw op whose presence decides; None: torch alone serves it
    optional: tuple[str, ...] = ()  # inputs that may be None
    float64: bool = True  # whether the C++ kernels serve it


@functools.cache
def tokens(device: str, keep: int | tuple[int, ...] = (2, 4)) -> TokenMask:
    generator = torch.Generator().manual_seed(0)
    return masking.random(2, 6, keep=keep, generator=generator, backend="reference").to(device)


@functools.cache
def cells(device: str) -> CellMask:
    return CellMask(tokens(device), (2, 3))


def _add_norm(backend, device, x, weight, bias, delta=None):
    return ops.add_norm(x, delta, weight, bias, backend=backend)[delta is None :]  # x comes back as it is


def _linear(backend, device, x, weight, bias=None):
    return (linear_reference if backend == "reference" else ops.linear)(x, weight, bias)


def _self_attention(backend, device, q):
    return ops.attention(q, backend=backend)


def _cross_attention(backend, device, q, kv, key_bias=None):
    marked = torch.arange(6, device=device).expand(2, 6) % 2 == 0
    out, stats = ops.attention(q, kv, key_bias=key_bias, marked=marked, stats=True, backend=backend)
    return out, *stats


def _attention_with_positions(backend, device, q, bias):
    angle = torch.arange(80.0, device=device).view(5, 16)
    return ops.attention(q, bias=bias, rope=ops.Rope(angle.cos(), angle.sin(), True), backend=backend)


def _relative_bias(backend, device, table):
    return ops.relative_bias(table, torch.arange(20, device=device).view(4, 5) * 7 % 6)


def _block(
    backend, device, x, delta=None, q_bias=None, v_bias=None, bias=None, three=False, masked=False, **weights
):  # fmt: skip
    """A block whose parameters go by their names; q, k and v are one weight, or three. Products keep the variance: far
    from it, float32 itself loses the digits that are compared."""
    weights = {k: t / 6 if t is not None and t.ndim == 2 else t for k, t in weights.items()}
    qkv = [weights.pop(name) for name in ("q", "k", "v")]
    biases = (q_bias, None, v_bias)  # the gradient of a bias of keys is zero
    packed = ops.BlockWeights(
        qkv_weight=tuple(qkv) if three else torch.cat(qkv), qkv_bias=biases, **{k: weights.get(k) for k in BLOCK}
    )
    where = {"masked": tokens(device), "prefix": 1} if masked else {}
    if bias is not None:
        angle = torch.arange(112.0, device=device).view(7, 16)
        where = {"bias": bias, "rope": ops.Rope(angle.cos(), angle.sin(), False)}
    return ops.transformer_block(x, delta, packed, 2, **where, backend=backend)


def _patch_embed(backend, device, images, weight, bias=None, pos=None, prefix=None):
    return ops.patch_embed(images, weight, bias, tokens(device), pos=pos, prefix=prefix, backend=backend)


def _batch_norm(backend, device, x, weight=None, bias=None, residual=None, act="relu", training=True):
    buffers = torch.full((16,), 0.1, device=device), torch.full((16,), 2.0, device=device)
    return ops.batch_norm_act(x, weight, bias, *buffers, training, act=act, residual=residual, backend=backend)


def _conv(route: str, shape: tuple[int, ...], stride: int = 1, groups: int = 1) -> Case:
    def call(backend, device, x, weight, bias=None):
        asked = None if backend in (None, "reference") else route
        args = (stride, weight.shape[2] // 2, 1, groups)
        return ops.conv_cells(x, cells(device), weight, bias, *args, route=asked, backend=backend)

    raw = {"halo": "halo_cells", "taps": "gather_taps", "implicit": "implicit_conv", "dense": "pack_cells"}
    return Case({**CELLS, "weight": shape, "bias": shape[:1]}, call, raw.get(route), ("bias",))


def _conv_transpose(shape: tuple[int, ...], groups: int) -> Case:
    def call(backend, device, x, weight, bias=None):
        asked = None if backend in (None, "reference") else "halo"
        args = (2, 1, 0, groups)
        return ops.conv_transpose_cells(x, cells(device), weight, bias, *args, route=asked, backend=backend)

    return Case({**CELLS, "weight": shape, "bias": (shape[1] * groups,)}, call, "halo_cells", ("bias",))


def _on_cells(op: Callable, *args, **kwargs) -> Callable:
    return lambda backend, device, x, **inputs: op(x, cells(device), *args, **kwargs, **inputs, backend=backend)


BLOCK = [name for name in ops.BlockWeights._fields if not name.startswith("qkv")]
BLOCK_INPUTS = {
    "x": (2, 7, 32),
    "delta": (2, 7, 32),
    **dict.fromkeys(("q", "k", "v", "proj_weight"), (32, 32)),
    "fc1_weight": (40, 32),
    "fc2_weight": (32, 40),
    "fc1_bias": (40,),
    **dict.fromkeys(("q_bias", "v_bias", "proj_bias", "fc2_bias", "scale1", "scale2"), (32,)),
    **dict.fromkeys(("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"), (32,)),
}
BLOCK_WEIGHTS = set(BLOCK_INPUTS) - {"x", "delta"}  # the tensors of one argument, BlockWeights
BLOCK_OPTIONAL = ("delta", "q_bias", "v_bias", "proj_bias", "fc1_bias", "fc2_bias", "scale1", "scale2")
CELLS = {"x": (6, 4, 4, 16)}
AFFINE = {"weight": (16,), "bias": (16,)}
ROWS = {"x": (2, 5, 16), **AFFINE}
NORM = {**ROWS, "residual": (2, 5, 16)}

CASES: dict[str, Case] = {
    "add_norm": Case({**ROWS, "delta": (2, 5, 16)}, _add_norm, "add_norm", ("delta",)),
    "bias_gelu": Case(
        {"x": (2, 5, 16), "bias": (16,)},
        lambda backend, device, x, bias=None: ops.bias_gelu(x, bias, backend=backend),
        "bias_gelu",
        ("bias",),
    ),
    "linear": Case({"x": (2, 5, 8), "weight": (6, 8), "bias": (6,)}, _linear, "transpose_sum", ("bias",), False),
    "attention": Case({"q": (2, 5, 3, 2, 16)}, _self_attention, "attention", float64=False),
    "attention of two": Case(
        {"q": (2, 3, 2, 16), "kv": (2, 6, 2, 2, 16), "key_bias": (2, 6, 2)},
        _cross_attention,
        "attention",
        ("key_bias",),
        False,
    ),
    "attention with positions": Case(
        {"q": (2, 5, 3, 2, 16), "bias": (2, 2, 5, 5)}, _attention_with_positions, "attention", float64=False
    ),
    "relative_bias": Case({"table": (6, 3)}, _relative_bias, None),
    "transformer_block": Case(BLOCK_INPUTS, _block, "attention", BLOCK_OPTIONAL, False),
    "transformer_block, masked tokens": Case(
        BLOCK_INPUTS,
        functools.partial(_block, three=True, masked=True),
        "attention",
        BLOCK_OPTIONAL,
        False,
    ),
    "transformer_block, with positions": Case(
        {**BLOCK_INPUTS, "bias": (2, 7, 7)}, _block, "attention", BLOCK_OPTIONAL, False
    ),
    "patch_embed": Case(
        {"images": (2, 3, 8, 12), "weight": (8, 3, 4, 4), "bias": (8,), "pos": (6, 8), "prefix": (1, 8)},
        _patch_embed,
        "patch_rows",
        ("bias", "pos", "prefix"),
    ),
    "gather_tokens": Case(
        {"x": (2, 7, 8)},
        lambda backend, device, x: ops.gather_tokens(x, tokens(device), prefix=1, backend=backend),
        "gather_tokens",
    ),
    "restore_tokens": Case(
        {"x": (8, 8), "mask_token": (8,), "pos": (7, 8)},
        lambda backend, device, x, mask_token, pos=None: ops.restore_tokens(
            x, tokens(device), mask_token, pos=pos, prefix=1, backend=backend
        ),
        "restore_tokens",
        ("pos",),
    ),
    "chamfer": Case(
        {"a": (3, 6, 3), "b": (3, 9, 3)},
        lambda backend, device, a, b: ops.chamfer(a, b, reduction="none", backend=backend),
        "chamfer",
    ),
    "feature_loss": Case(
        {"pred": (2, 5, 16)},
        lambda backend, device, pred: ops.feature_loss(
            pred,
            torch.linspace(-1, 2, 160, device=device, dtype=pred.dtype).sin().reshape(2, 5, 16),
            norm="l2",
            backend=backend,
        ),
        "feature_loss",
    ),
    "patch_loss": Case(
        {"pred": (6, 48), "images": (2, 3, 8, 12)},
        lambda backend, device, pred, images: ops.patch_loss(
            pred, images, tokens(device), 4, norm="mae", backend=backend
        ),
        "patch_loss",
    ),
    "batch_norm_act": Case(NORM, _batch_norm, "norm_act", ("weight", "bias", "residual")),
    "batch_norm_act in eval": Case(
        NORM,
        functools.partial(_batch_norm, act="relu6", training=False),
        "norm_act",
        ("weight", "bias", "residual"),
    ),
    "grn": Case({**CELLS, **AFFINE}, _on_cells(ops.grn), "norm_act"),
    "group_norm_cells": Case({**CELLS, **AFFINE}, _on_cells(ops.group_norm_cells, 4), "norm_act", ("weight", "bias")),
    "instance_norm_cells": Case(
        {**CELLS, **AFFINE}, _on_cells(ops.instance_norm_cells), "norm_act", ("weight", "bias")
    ),
    "segment_sum": Case(CELLS, _on_cells(ops.segment_sum), "segment_stats"),
    "global_pool_cells": Case(CELLS, _on_cells(ops.global_pool_cells), "segment_stats"),
    "pack_cells": Case({"x": (2, 8, 4, 6)}, _on_cells(ops.pack_cells), "pack_cells"),
    "unpack_cells": Case({**CELLS, "fill": (16,)}, _on_cells(ops.unpack_cells), "unpack_cells", ("fill",)),
    "max_pool_cells": Case(CELLS, _on_cells(ops.max_pool_cells, 3, 2, 1), "max_pool_cells"),
    "avg_pool_cells": Case(CELLS, _on_cells(ops.avg_pool_cells, 3, 2, 1), "avg_pool_cells"),
    "depthwise_cells": Case(
        {"x": (6, 4, 4, 4), "weight": (4, 1, 3, 3), "bias": (4,)},
        _on_cells(ops.depthwise_cells),
        "depthwise",
        ("bias",),
    ),
    "conv_cells by rows": _conv("rows", (8, 16, 1, 1)),
    "conv_cells on the map": _conv("dense", (8, 16, 3, 3)),
    "conv_cells of frames": _conv("halo", (8, 16, 3, 3)),
    "conv_cells of frames, strided": _conv("halo", (8, 16, 3, 3), 2),
    "conv_cells of taps": _conv("taps", (8, 16, 3, 3)),
    "conv_cells of taps, strided": _conv("taps", (8, 16, 3, 3), 2),
    "conv_cells of taps, grouped": _conv("taps", (8, 8, 3, 3), 1, 2),
    "conv_cells, implicit": _conv("implicit", (8, 16, 3, 3)),
    "conv_transpose_cells": _conv_transpose((16, 4, 4, 4), 2),
}

# No gradient.
WITHOUT = {
    "BlockWeights",
    "CellMask",
    "Rope",
    "TokenMask",
    "adamw",
    "backend",
    "farthest_points",
    "knn",
    "linear_library",
}
WITHOUT |= {"resize", "token_mask"}
CONSTANT = {
    "running_mean",
    "running_var",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "marked",
    "cu_seqlens",
    "drop1",
    "drop2",
    "index",
    "target",
}  # tensors without one


def op_of(name: str) -> str:
    return name.replace(",", " ").split()[0]


def on_cpu() -> list:
    """The names of the cases whose C++ kernels are here, as parameters."""
    params = []
    for name, case in CASES.items():
        reason = None if case.raw is None else _dispatch.unavailable(case.raw, "cpu", "cpu")
        marks = [] if reason is None else [pytest.mark.skip(reason=reason)]
        if name != "conv_cells, implicit":  # Triton only
            params.append(pytest.param(name, marks=marks))
    return params


def make(case: Case, seed: int, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in case.inputs.items()}
    return {name: value for name, value in made.items() if name not in without}


def outputs(case: Case, backend: str, device: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    out = case.call(backend, device, **inputs)
    return [out] if isinstance(out, Tensor) else [t for t in out if t is not None]


def total(outs: list[Tensor], seed: int = 1) -> Tensor:
    """A random combination of all elements that require grad."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outs]
    return sum((t * w).sum() for t, w in zip(outs, weights) if t.requires_grad)


@pytest.fixture
def onednn_everywhere(monkeypatch):
    """`linear` by its own Function, whatever the size and the machine, where torch has oneDNN."""
    family = maefast.ops.linear.__globals__
    if family["_has_onednn"]():
        monkeypatch.setitem(family, "_choice", ("onednn", "test"))
        monkeypatch.setitem(family, "MIN_WORK", 0)

"""The index of maefast's raw ops: one schema and one fake for each, shared by every compiled backend.

Each schema is defined in two `torch.library` namespaces:

- ``maefast``: implemented in C++ for the keys CPU (``csrc/cpu``) and CUDA (``csrc/cuda``);
- ``maefast_triton``: implemented in Python by ``maefast.kernels.<family>`` for CUDA, and for CPU tensors under
  the Triton interpreter.

Raw ops are private: they trust their input. The public functions in ``maefast.ops`` check it, choose a backend
and wrap the raw op in an ``autograd.Function`` (outside the op, which costs a third of a registered autograd).

Shorthand of the comments: B samples of N tokens, T visible and M masked rows in all, P prefix tokens a sample,
D channels, K values a patch.
"""

from __future__ import annotations

import importlib

import torch

from maefast import _native

# family -> {op: schema}. The family names the file in every layer: ops/, csrc/cpu/, kernels/, csrc/cuda/.
FAMILIES: dict[str, dict[str, str]] = {
    "mask": {
        "token_mask": "(Tensor scores, Tensor cu_visible, SymInt total_visible, bool by_position)"
        " -> (Tensor, Tensor, Tensor)",
    },
    "embed": {
        "gather_tokens": "(Tensor x, Tensor index, Tensor cu, SymInt max_count, SymInt prefix, bool keep_prefix)"
        " -> Tensor",
        "gather_tokens_backward": "(Tensor grad, Tensor slot, Tensor cu, SymInt prefix, bool keep_prefix,"
        " bool masked) -> Tensor",
        "patch_rows": "(Tensor images, Tensor index, SymInt[] patch, ScalarType dtype) -> Tensor",
        "patch_rows_backward": "(Tensor grad, Tensor slot, SymInt[] image_shape, SymInt[] patch, ScalarType dtype)"
        " -> Tensor",
        "place_tokens": "(Tensor y, Tensor visible, Tensor cu_visible, SymInt num_tokens, Tensor? pos,"
        " Tensor? prefix_tokens) -> Tensor",
        "place_tokens_backward": "(Tensor grad, Tensor slot, Tensor cu_visible, SymInt prefix, bool need_pos,"
        " bool need_prefix, ScalarType y_dtype) -> (Tensor, Tensor, Tensor)",
    },
    # With cu_masked (visible first) some tokens are absent, and packed rows [T + M + B*P, D] stand for [B, P + N, D].
    "restore": {
        "restore_tokens": "(Tensor x, Tensor visible, Tensor masked, Tensor cu_visible, Tensor mask_token,"
        " Tensor? pos, SymInt prefix, bool visible_first, bool pos_on_masked, Tensor? cu_masked=None,"
        " SymInt num_tokens=0) -> Tensor",
        "restore_tokens_backward": "(Tensor grad, Tensor visible, Tensor masked, Tensor slot, Tensor cu_visible,"
        " SymInt pos_rows, SymInt prefix, bool visible_first, bool pos_on_masked, bool need_mask_token,"
        " ScalarType x_dtype, Tensor? cu_masked=None) -> (Tensor, Tensor, Tensor)",
    },
    "norm": {
        # shift [D] is added to delta: the bias of the linear layer that made it.
        "add_norm": "(Tensor x, Tensor? delta, Tensor weight, Tensor bias, float eps, ScalarType dtype,"
        " Tensor? shift=None) -> (Tensor, Tensor, Tensor, Tensor)",
        # grad_x, [weight, bias, shift], and where asked for (empty else): grad_x in delta's dtype, y once more.
        "add_norm_backward": "(Tensor grad_y, Tensor? grad_residual, Tensor residual, Tensor mean, Tensor rstd,"
        " Tensor weight, bool need_weight, Tensor? bias=None, ScalarType? delta_dtype=None, bool need_shift=False)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
    },
    "linear": {
        "transpose_sum": "(Tensor x, bool need_sum) -> (Tensor, Tensor)",
    },
    "gelu": {
        "bias_gelu": "(Tensor x, Tensor? bias, bool tanh) -> Tensor",
        # with need_out the GELU once more, else empty
        "bias_gelu_backward": "(Tensor grad, Tensor x, Tensor? bias, bool tanh, bool need_bias, bool need_out=False)"
        " -> (Tensor, Tensor, Tensor)",
    },
    # All in place. Each list has one tensor a parameter; max_exp_avg_sqs and shadows may be empty.
    "adamw": {
        "adamw": "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
        " Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] shadows, Tensor(g!)[] steps, Tensor? lr_tensor, float lr,"
        " float beta1, float beta2, float eps, float weight_decay, bool maximize, Tensor? grad_scale,"
        " Tensor? found_inf) -> ()",
    },
    "attention": {
        "attention": "(Tensor q, Tensor? kv, Tensor? cu_q, Tensor? cu_k, SymInt batch, SymInt max_q, SymInt max_k,"
        " float scale, bool causal, Tensor? key_bias, Tensor? marked, bool stats)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        "attention_backward": "(Tensor grad, Tensor? grad_lse, Tensor? grad_entropy, Tensor? grad_mass, Tensor q,"
        " Tensor? kv, Tensor out, Tensor lse, Tensor entropy, Tensor mass, Tensor? cu_q, Tensor? cu_k, SymInt batch,"
        " SymInt max_q, SymInt max_k, float scale, bool causal, Tensor? key_bias, Tensor? marked, bool need_bias)"
        " -> (Tensor, Tensor, Tensor)",
    },
    "loss": {
        "patch_loss": "(Tensor pred, Tensor images, Tensor index, SymInt[] patch, bool packed, bool channels_first,"
        " int norm, int kind, float beta) -> (Tensor, Tensor)",
        "patch_loss_backward": "(Tensor grad, Tensor pred, Tensor images, Tensor index, Tensor slot, Tensor stats,"
        " SymInt[] patch, bool packed, bool channels_first, int norm, int kind, float beta, bool need_images)"
        " -> (Tensor, Tensor)",
    },
    "cells": {
        "pack_cells": "(Tensor x, Tensor cells, SymInt[] grid, bool channels_last) -> Tensor",
        "unpack_cells": "(Tensor x, Tensor slot, SymInt[] grid, Tensor? fill, bool channels_last) -> Tensor",
        "fill_sum": "(Tensor grad, Tensor slot, SymInt[] grid) -> Tensor",
    },
    "pool": {
        "max_pool_cells": "(Tensor x, Tensor neighbours, SymInt[] kernel, SymInt[] stride, SymInt[] padding)"
        " -> (Tensor, Tensor)",
        "max_pool_cells_backward": "(Tensor grad, Tensor argmax, Tensor neighbours, SymInt[] kernel, SymInt[] stride,"
        " SymInt[] padding) -> Tensor",
        "avg_pool_cells": "(Tensor x, Tensor neighbours, SymInt[] kernel, SymInt[] stride, SymInt[] padding,"
        " bool count_include_pad) -> Tensor",
        "avg_pool_cells_backward": "(Tensor grad, Tensor neighbours, SymInt[] kernel, SymInt[] stride,"
        " SymInt[] padding, bool count_include_pad) -> Tensor",
    },
    "depthwise": {
        "depthwise": "(Tensor x, Tensor neighbours, Tensor weight, Tensor? bias, bool flip) -> Tensor",
        "depthwise_grad_weight": "(Tensor x, Tensor grad, Tensor neighbours, SymInt size) -> (Tensor, Tensor)",
    },
    # act: 0 none, 1 relu, 2 relu6. Segments of rows: [cu[b] * sites, cu[b + 1] * sites), or all rows without cu; mean,
    # scale, offset and slope are [segments, C].
    "cell_norm": {
        "segment_stats": "(Tensor x, Tensor? cu, SymInt sites) -> (Tensor, Tensor)",
        "norm_act": "(Tensor x, Tensor? residual, Tensor? cu, SymInt sites, Tensor mean, Tensor scale, Tensor bias,"
        " int act) -> Tensor",
        "norm_act_sums": "(Tensor grad, Tensor x, Tensor? gate, Tensor? cu, SymInt sites, Tensor mean, Tensor scale,"
        " Tensor bias, int act) -> (Tensor, Tensor)",
        "norm_act_backward": "(Tensor grad, Tensor x, Tensor? cu, SymInt sites, Tensor mean, Tensor scale,"
        " Tensor bias, Tensor? offset, Tensor? slope, int act) -> Tensor",
    },
    "sparse_conv": {
        "halo_cells": "(Tensor x, Tensor neighbours, SymInt[] halo) -> Tensor",
        "halo_cells_backward": "(Tensor grad, Tensor neighbours, SymInt[] halo) -> Tensor",
        "gather_taps": "(Tensor x, Tensor neighbours, SymInt[] kernel, SymInt[] stride, SymInt[] padding,"
        " SymInt[] dilation) -> Tensor",
        "gather_taps_backward": "(Tensor grad, Tensor neighbours, SymInt[] size, SymInt[] kernel, SymInt[] stride,"
        " SymInt[] padding, SymInt[] dilation) -> Tensor",
    },
    "implicit_conv": {
        "implicit_conv": "(Tensor x, Tensor neighbours, Tensor weight, Tensor? bias, SymInt[] kernel,"
        " SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> Tensor",
        "implicit_conv_grad_x": "(Tensor grad, Tensor neighbours, Tensor weight, SymInt[] kernel, SymInt[] stride,"
        " SymInt[] padding, SymInt[] dilation) -> Tensor",
        "implicit_conv_grad_weight": "(Tensor x, Tensor grad, Tensor neighbours, SymInt[] kernel, SymInt[] stride,"
        " SymInt[] padding, SymInt[] dilation) -> Tensor",
    },
}

CPU_ONLY = ("linear",)  # families that a GPU has no use for: no Triton kernels
TRITON_ONLY = ("implicit_conv",)  # families without C++ kernels: a CPU has a better way

SCHEMAS: dict[str, str] = {op: schema for ops in FAMILIES.values() for op, schema in ops.items()}
FAMILY_OF: dict[str, str] = {op: family for family, ops in FAMILIES.items() for op in ops}


# --- fakes: shapes and dtypes only -------------------------------------------------------------------------


def _token_mask(scores, cu_visible, total_visible, by_position):
    count = scores.shape[0] * scores.shape[1]
    new = lambda n: scores.new_empty((n,), dtype=torch.int32)  # noqa: E731
    return new(total_visible), new(count - total_visible), new(count)


def _gather_tokens(x, index, cu, max_count, prefix, keep_prefix):
    rows = index.shape[0] + (x.shape[0] * prefix if keep_prefix else 0)
    return x.new_empty((rows, x.shape[2]))


def _gather_tokens_backward(grad, slot, cu, prefix, keep_prefix, masked):
    batch = cu.shape[0] - 1
    return grad.new_empty((batch, prefix + slot.shape[0] // batch, grad.shape[1]))


def _volume(sizes):
    count = 1
    for size in sizes:
        count = count * size
    return count


def _patch_rows(images, index, patch, dtype):
    return images.new_empty((index.shape[0], images.shape[1] * _volume(patch)), dtype=dtype)


def _patch_rows_backward(grad, slot, image_shape, patch, dtype):
    return grad.new_empty(tuple(image_shape), dtype=dtype)


def _place_tokens(y, visible, cu_visible, num_tokens, pos, prefix_tokens):
    extra = 0 if prefix_tokens is None else prefix_tokens.shape[0] * (cu_visible.shape[0] - 1)
    dtype = (pos if pos is not None else prefix_tokens).dtype
    return y.new_empty((y.shape[0] + extra, y.shape[1]), dtype=dtype)


def _place_tokens_backward(grad, slot, cu_visible, prefix, need_pos, need_prefix, y_dtype):
    batch, width = cu_visible.shape[0] - 1, grad.shape[1]
    return (
        grad.new_empty((grad.shape[0] - batch * prefix, width), dtype=y_dtype),
        grad.new_empty((slot.shape[0] // batch, width) if need_pos else (0,)),
        grad.new_empty((prefix, width) if need_prefix else (0,)),
    )


def _restore_tokens(
    x, visible, masked, cu_visible, mask_token, pos, prefix, visible_first, pos_on_masked, cu_masked=None, num_tokens=0
):
    batch = cu_visible.shape[0] - 1
    if cu_masked is not None:
        return mask_token.new_empty((x.shape[0] + masked.shape[0], x.shape[1]))
    tokens = (visible.shape[0] + masked.shape[0]) // batch
    return mask_token.new_empty((batch, prefix + tokens, x.shape[1]))


def _restore_tokens_backward(
    grad,
    visible,
    masked,
    slot,
    cu_visible,
    pos_rows,
    prefix,
    visible_first,
    pos_on_masked,
    need_mask_token,
    x_dtype,
    cu_masked=None,
):
    batch, width = cu_visible.shape[0] - 1, grad.shape[-1]
    return (
        grad.new_empty((visible.shape[0] + batch * prefix, width), dtype=x_dtype),
        grad.new_empty((width,) if need_mask_token else (0,)),
        grad.new_empty((pos_rows, width) if not isinstance(pos_rows, int) or pos_rows else (0,)),
    )


def _add_norm(x, delta, weight, bias, eps, dtype, shift=None):
    statistic = lambda: x.new_empty(x.shape[:1], dtype=weight.dtype)  # noqa: E731
    return x.new_empty((0,) if delta is None else x.shape), x.new_empty(x.shape, dtype=dtype), statistic(), statistic()


def _add_norm_backward(
    grad_y, grad_residual, residual, mean, rstd, weight, need_weight, bias=None, delta_dtype=None, need_shift=False
):
    rows, width = residual.shape
    narrow = delta_dtype is not None and delta_dtype is not residual.dtype
    return (
        residual.new_empty(residual.shape),
        weight.new_empty((3 if need_shift else 2 if need_weight else 0, weight.shape[0])),
        residual.new_empty((rows if narrow else 0, width), dtype=delta_dtype if narrow else residual.dtype),
        grad_y.new_empty((0 if bias is None else rows, width)),
    )


def _transpose_sum(x, need_sum):
    return x.new_empty((x.shape[1], x.shape[0])), x.new_empty(x.shape[1:] if need_sum else (0,))


def _bias_gelu(x, bias, tanh):
    return x.new_empty(x.shape)


def _bias_gelu_backward(grad, x, bias, tanh, need_bias, need_out=False):
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[1:] if need_bias else (0,), dtype=wide),
        x.new_empty((x.shape[0] if need_out else 0, x.shape[1])),
    )


def _adamw(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    shadows,
    steps,
    lr_tensor,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    maximize,
    grad_scale,
    found_inf,
):
    return None


def _attention(q, kv, cu_q, cu_k, batch, max_q, max_k, scale, causal, key_bias, marked, stats):
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    rows, heads, width = q.shape[0], q.shape[-2], q.shape[-1]
    row = lambda wanted: q.new_empty((rows, heads) if wanted else (0,), dtype=wide)  # noqa: E731
    return q.new_empty((rows, heads, width)), row(True), row(stats), row(stats and marked is not None)


def _attention_backward(
    grad,
    grad_lse,
    grad_entropy,
    grad_mass,
    q,
    kv,
    out,
    lse,
    entropy,
    mass,
    cu_q,
    cu_k,
    batch,
    max_q,
    max_k,
    scale,
    causal,
    key_bias,
    marked,
    need_bias,
):
    return (
        q.new_empty(q.shape),
        q.new_empty((0,) if kv is None else kv.shape),
        q.new_empty(key_bias.shape if need_bias else (0,), dtype=torch.float32),
    )


def _patch_loss(pred, images, index, patch, packed, channels_first, norm, kind, beta):
    wide = torch.float64 if torch.float64 in (pred.dtype, images.dtype) else torch.float32
    groups = images.shape[1] if norm == 2 else 1
    return (
        pred.new_empty((index.shape[0],), dtype=wide),
        pred.new_empty((index.shape[0], groups, 2), dtype=wide),
    )


def _patch_loss_backward(
    grad, pred, images, index, slot, stats, patch, packed, channels_first, norm, kind, beta, need_images
):
    return (
        pred.new_empty(pred.shape),
        images.new_empty(images.shape if need_images else (0,)),
    )


def _pack_cells(x, cells, grid, channels_last):
    (height, width), channels = (x.shape[1:3], x.shape[3]) if channels_last else (x.shape[2:4], x.shape[1])
    return x.new_empty((cells.shape[0], height // grid[0], width // grid[1], channels))


def _unpack_cells(x, slot, grid, fill, channels_last):
    (batch, rows, columns), (h, w, channels) = grid, x.shape[1:]
    size = (rows * h, columns * w)
    return x.new_empty((batch, *size, channels) if channels_last else (batch, channels, *size))


def _fill_sum(grad, slot, grid):
    wide = torch.float64 if grad.dtype is torch.float64 else torch.float32
    return grad.new_empty(grad.shape[3:], dtype=wide)


def _max_pool_cells(x, neighbours, kernel, stride, padding):
    y = _avg_pool_cells(x, neighbours, kernel, stride, padding, True)
    return y, y.new_empty(y.shape, dtype=torch.uint8)


def _max_pool_cells_backward(grad, argmax, neighbours, kernel, stride, padding):
    return _avg_pool_cells_backward(grad, neighbours, kernel, stride, padding, True)


def _avg_pool_cells(x, neighbours, kernel, stride, padding, count_include_pad):
    cells, h, w, channels = x.shape
    return x.new_empty((cells, h // stride[0], w // stride[1], channels))


def _avg_pool_cells_backward(grad, neighbours, kernel, stride, padding, count_include_pad):
    cells, h, w, channels = grad.shape
    return grad.new_empty((cells, h * stride[0], w * stride[1], channels))


def _depthwise(x, neighbours, weight, bias, flip):
    return x.new_empty(x.shape)


def _depthwise_grad_weight(x, grad, neighbours, size):
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    return x.new_empty((size * size, x.shape[3]), dtype=wide), x.new_empty((x.shape[3],), dtype=wide)


def _segment_stats(x, cu, sites):
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    shape = (1 if cu is None else cu.shape[0] - 1, x.shape[1])
    return x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=wide)


def _norm_act(x, residual, cu, sites, mean, scale, bias, act):
    return x.new_empty(x.shape)


def _norm_act_sums(grad, x, gate, cu, sites, mean, scale, bias, act):
    return x.new_empty((0,) if gate is None else x.shape), mean.new_empty((2, *mean.shape))


def _norm_act_backward(grad, x, cu, sites, mean, scale, bias, offset, slope, act):
    return x.new_empty(x.shape)


def _halo_cells(x, neighbours, halo):
    top, left, bottom, right = halo
    cells, h, w, channels = x.shape
    return x.new_empty((cells, top + h + bottom, left + w + right, channels))


def _halo_cells_backward(grad, neighbours, halo):
    top, left, bottom, right = halo
    cells, h, w, channels = grad.shape
    return grad.new_empty((cells, h - top - bottom, w - left - right, channels))


def _gather_taps(x, neighbours, kernel, stride, padding, dilation):
    rows = neighbours.shape[0] * (x.shape[1] // stride[0]) * (x.shape[2] // stride[1])
    return x.new_empty((rows, _volume(kernel) * x.shape[3]))


def _gather_taps_backward(grad, neighbours, size, kernel, stride, padding, dilation):
    return grad.new_empty((neighbours.shape[0], *size))


def _implicit_conv(x, neighbours, weight, bias, kernel, stride, padding, dilation):
    cells, h, w, _ = x.shape
    return x.new_empty((cells, h // stride[0], w // stride[1], weight.shape[2]))


def _implicit_conv_grad_x(grad, neighbours, weight, kernel, stride, padding, dilation):
    cells, h, w, _ = grad.shape
    return grad.new_empty((cells, h * stride[0], w * stride[1], weight.shape[1]))


def _implicit_conv_grad_weight(x, grad, neighbours, kernel, stride, padding, dilation):
    return x.new_empty((_volume(kernel), x.shape[3], grad.shape[3]), dtype=torch.float32)


# --- registration ------------------------------------------------------------------------------------------


def _triton_impl(op: str):
    """An implementation that imports its kernels at the first call, so that maefast imports without Triton."""
    kernel = None

    def call(*args):
        nonlocal kernel
        if kernel is None:
            kernel = importlib.import_module(f"maefast.kernels.{FAMILY_OF[op]}").OPS[op]
        return kernel(*args)

    return call


_cpp = torch.library.Library("maefast", "DEF")
_triton = torch.library.Library("maefast_triton", "DEF")
for _op, _schema in SCHEMAS.items():
    for _lib in (_cpp, _triton):
        _lib.define(_op + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides))
        torch.library.register_fake(f"{_lib.ns}::{_op}", globals()[f"_{_op}"], lib=_lib)
    for _key in () if FAMILY_OF[_op] in CPU_ONLY else ("CPU", "CUDA"):
        _triton.impl(_op, _triton_impl(_op), _key)
_native.load()  # the C++ implementations attach to the schemas above

_CPP_OPS = {op: getattr(torch.ops.maefast, op).default for op in SCHEMAS}
_TRITON_OPS = {op: getattr(torch.ops.maefast_triton, op).default for op in SCHEMAS}


def raw(op: str, backend: str):
    """The raw op that serves `op` on `backend` ("cpu", "cuda" or "triton")."""
    return _TRITON_OPS[op] if backend == "triton" else _CPP_OPS[op]


def has_kernel(op: str, key: str) -> bool:
    """Whether C++ registered an implementation of `op` for the dispatch key "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"maefast::{op}", key)


__all__ = ["CPU_ONLY", "FAMILIES", "FAMILY_OF", "SCHEMAS", "TRITON_ONLY", "has_kernel", "raw"]

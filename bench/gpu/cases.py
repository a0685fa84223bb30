"""What `smoke` runs: every Triton and CUDA C++ kernel at small sizes that reach the branches it is compiled with, what
most users need first. The small cases of all public ops are those of tests/ops/cases.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from maefast import masking, ops
from maefast.ops import TokenMask, _attention_table, _dispatch, _registry
from tests.ops import cases as small

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)  # what most users train in, first


class Case(NamedTuple):
    """`call(backend, device, **inputs)`, inputs of these shapes; raw: the raw ops that it runs, backward included."""

    name: str
    raw: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    call: Callable[..., object]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    backends: tuple[str, ...] = ("triton", "cuda")
    positive: bool = False  # inputs of 0 to 1, as scores are


class Run(NamedTuple):
    """A case on one backend in one dtype."""

    id: str
    case: Case
    backend: str
    dtype: torch.dtype


class Size(NamedTuple):
    """Sizes of a device's smoke run, or of a rehearsal in Triton's interpreter."""

    width: int
    narrow: int
    hidden: int
    image: int
    patch: int
    batch: int
    rows: int
    lengths: tuple[int, ...]


REAL = Size(768, 512, 3072, 64, 16, 4, 77, (50, 197, 17, 65, 257))
TOY = Size(48, 32, 64, 16, 8, 2, 5, (5, 17))


def inputs(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand if case.positive else torch.randn
    return {name: draw(shape, generator=generator) for name, shape in case.shapes.items()}


@functools.cache
def plan(batch: int, tokens: int, ragged: bool, device: str, absent: bool = False) -> TokenMask:
    keep = [1 + (3 * i) % tokens for i in range(batch)] if ragged else tokens // 4
    hide = tokens // 2 if absent else None
    generator = torch.Generator().manual_seed(0)
    return masking.random(batch, tokens, keep=keep, hide=hide, generator=generator, backend="reference").to(device)


def backward(*names: str) -> tuple[str, ...]:
    """Raw ops with their gradients."""
    return tuple(op for name in names for op in (name, f"{name}_backward") if op in _registry.SCHEMAS)


# --- token ops -----------------------------------------------------------------------------------------------


def token_cases(size: Size) -> Iterator[Case]:
    b, side, p = size.batch, size.image // size.patch, size.patch
    tokens, values, width = side * side, 3 * p * p, size.width
    lengths = (tokens, 196, 1568) if size is REAL else (tokens, 20)
    for count in lengths:
        for order in ("score", "position"):
            yield Case(
                f"token_mask-{count}-{order}",
                ("token_mask",),
                {"scores": (b, count)},
                functools.partial(_mask, order=order),
                positive=True,
            )
    embed = {"images": (b, 3, size.image, size.image), "weight": (width, 3, p, p), "bias": (width,)}
    tables = {"pos": (tokens, width), "prefix": (1, width)}
    raw = backward("patch_rows", "place_tokens")
    for ragged in (False, True):
        shape = functools.partial(plan, b, tokens, ragged)
        text = "-ragged" if ragged else ""
        yield Case(f"patch_embed{text}", raw, {**embed, **tables}, functools.partial(_embed, shape))
        for wide in (width, 70):
            for which, prefix in (("visible", 1), ("masked", 0)):
                yield Case(
                    f"gather_tokens-{which}-{wide}{text}",
                    backward("gather_tokens"),
                    {"x": (b, prefix + tokens, wide)},
                    functools.partial(_gather, shape, which, prefix),
                )
        for order, pos_on, prefix in (("visible_first", "all", 1), ("position", "masked", 0), ("position", "all", 1)):
            rows = shape("cpu").total_visible + b * prefix
            places = tokens + (prefix if pos_on == "all" else 0)
            yield Case(
                f"restore_tokens-{order}-{pos_on}{text}",
                backward("restore_tokens"),
                {"x": (rows, size.narrow), "mask_token": (size.narrow,), "pos": (places, size.narrow)},
                functools.partial(_restore, shape, order, pos_on, prefix),
            )
    some = functools.partial(plan, b, tokens, False, absent=True)
    rows = some("cpu").total_visible + b
    yield Case(
        "restore_tokens-absent",
        backward("restore_tokens"),
        {"x": (rows, size.narrow), "mask_token": (size.narrow,), "pos": (tokens + 1, size.narrow)},
        functools.partial(_restore, some, "visible_first", "all", 1),
    )
    yield Case(
        "gather_tokens-absent",
        backward("gather_tokens"),
        {"x": (b, tokens, width)},
        functools.partial(_gather, some, "masked", 0),
    )
    for n, m in ((32, 32), (5, 33)):
        yield Case(f"chamfer-{n}x{m}", backward("chamfer"), {"a": (b, n, 3), "b": (b, m, 3)}, _chamfer)
    for norm, kind in (("none", "mse"), ("layernorm", "smooth_l1"), ("l2", "l1"), ("none", "cosine")):
        call = functools.partial(_feature_loss, norm, kind)
        yield Case(f"feature_loss-{norm}-{kind}", backward("feature_loss"), {"pred": (size.rows, width)}, call)
    cloud = {"points": (b, 1024 if size is REAL else 40, 3)}
    # In 16 bits many distances are equal, but not in float64.
    yield Case("groups of points", ("farthest_points", "knn"), cloud, _groups, (torch.float32,))
    uniform = functools.partial(plan, b, tokens, False)
    masked = tokens - tokens // 4
    for norm, kind, rows, layout in (
        ("mae", "mse", "masked", "ppc"),
        ("none", "mse", "masked", "ppc"),
        ("videomae", "mse", "masked", "cpp"),
        ("layernorm", "smooth_l1", "all", "ppc"),
        ("none", "smooth_l1", "all", "cpp"),
    ):
        yield Case(
            f"patch_loss-{norm}-{kind}-{rows}-{layout}",
            backward("patch_loss"),
            {"pred": (b * (masked if rows == "masked" else tokens), values), "images": (b, 3, size.image, size.image)},
            functools.partial(_loss, uniform, p, tokens, norm=norm, loss=kind, rows=rows, layout=layout),
        )
    video = (b, 3, 4, size.image, size.image)
    clip = functools.partial(plan, b, 2 * tokens, False)
    yield Case(
        "patch_embed-video",
        raw,
        {"images": video, "weight": (width, 3, 2, p, p), "pos": (2 * tokens, width)},
        functools.partial(_embed, clip),
    )
    yield Case(
        "patch_loss-video",
        backward("patch_loss"),
        {"pred": (b * (2 * tokens - tokens // 2), 2 * values), "images": video},
        functools.partial(_loss, clip, (2, p, p), 2 * tokens, norm="videomae"),
    )


def _mask(backend, device, scores, order):
    found = ops.token_mask(scores.detach(), scores.shape[1] // 4, order=order, backend=backend)
    return found.visible, found.masked, found.slot


def _embed(shape, backend, device, images, weight, bias=None, pos=None, prefix=None):
    return ops.patch_embed(images, weight, bias, shape(device), pos=pos, prefix=prefix, backend=backend)


def _gather(shape, which, prefix, backend, device, x):
    keep = which == "visible"
    return ops.gather_tokens(x, shape(device), which, prefix=prefix, keep_prefix=keep, backend=backend)


def _restore(shape, order, pos_on, prefix, backend, device, x, mask_token, pos):
    options = {"pos": pos, "pos_on": pos_on, "prefix": prefix, "order": order, "backend": backend}
    return ops.restore_tokens(x, shape(device), mask_token, **options)


def _chamfer(backend, device, a, b):
    return ops.chamfer(a, b, reduction="none", backend=backend)


def _feature_loss(norm, kind, backend, device, pred):
    target = torch.linspace(0, 99, pred.numel(), device=device, dtype=torch.float64).sin().reshape(pred.shape)
    options = {"norm": norm, "loss": kind, "reduction": "none", "backend": backend}
    return ops.feature_loss(pred, target.bfloat16().to(pred), **options)


def _groups(backend, device, points):
    """Squared distances to the nearest of each group, and the numbers of its points."""
    low = points.to(torch.float32) if backend != "reference" else points
    centers = ops.farthest_points(low, 8, backend=backend)
    centers = low.gather(1, centers[..., None].expand(-1, -1, 3))
    index, distance = ops.knn(centers, low, 8, backend=backend)
    return distance + index


def _loss(shape, patch, tokens, backend, device, pred, images, rows="masked", **options):
    mask = shape(device)
    if rows == "all":
        pred = pred.unflatten(0, (mask.batch, tokens))
    return ops.patch_loss(pred, images, mask, patch, rows=rows, backend=backend, **options)


# --- the transformer -----------------------------------------------------------------------------------------


def transformer_cases(size: Size) -> Iterator[Case]:
    for wide in dict.fromkeys((size.width, size.narrow, 70)):
        affine = {"weight": (wide,), "bias": (wide,)}
        rows = {"x": (2, size.rows, wide)}
        yield Case(f"add_norm-{wide}-delta", backward("add_norm"), {**rows, "delta": rows["x"], **affine}, _norm)
        yield Case(f"add_norm-{wide}", backward("add_norm"), {**rows, **affine}, _norm)
    # As under autocast: float32 weights, a 16-bit delta, and a 16-bit result beside the float32 stream.
    shapes = {
        **dict.fromkeys(("x", "delta"), (2, size.rows, size.width)),
        "weight": (size.width,),
        "bias": (size.width,),
    }
    yield Case("add_norm-wide stream", backward("add_norm"), shapes, _wide_norm)
    for wide in (size.hidden, 70):
        for approximate in ("none", "tanh"):
            call = functools.partial(_gelu, approximate)
            x = {"x": (2, size.rows, wide)}
            yield Case(f"bias_gelu-{wide}-{approximate}", backward("bias_gelu"), {**x, "bias": (wide,)}, call)
    yield Case("bias_gelu-no bias", backward("bias_gelu"), {"x": (2, size.rows, 70)}, functools.partial(_gelu, "none"))
    # The branches that only the block takes. In 16 bits its products round, too: the trainings judge that.
    d, f = (256, 1024) if size is REAL else (32, 64)
    rows = {"x": (2, size.rows, d), "delta": (2, size.rows, d)}
    norms = dict.fromkeys(("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"), (d,))
    linears = {"qkv": (3 * d, d), "proj": (d, d), "fc1": (f, d), "fc2": (d, f)}
    weights = {f"{name}_weight": shape for name, shape in linears.items()}
    weights |= {f"{name}_bias": shape[:1] for name, shape in linears.items()}
    raw = backward("add_norm", "bias_gelu", "attention")
    yield Case(f"transformer_block-{d}", raw, {**rows, **norms, **weights}, _block, (torch.float32,))


def _block(backend, device, x, delta, **weights):
    weights = {name: w / w.shape[1] ** 0.5 if w.ndim == 2 else w for name, w in weights.items()}
    return ops.transformer_block(x, delta, ops.BlockWeights(**weights), x.shape[-1] // 16, backend=backend)


def _norm(backend, device, x, weight, bias, delta=None):
    return ops.add_norm(x, delta, weight, bias, backend=backend)[delta is None :]  # x comes back as it is


def _wide_norm(backend, device, x, weight, bias, delta):
    if backend == "reference":
        return ops.add_norm(x, delta, weight, bias, backend=backend)
    wide = (t.float() for t in (x, weight, bias))
    stream, weight, bias = wide
    stream, y = ops.add_norm(stream, delta, weight, bias, dtype=delta.dtype, backend=backend)
    return stream.to(x.dtype), y


def _gelu(approximate, backend, device, x, bias=None):
    return ops.bias_gelu(x, bias, approximate, backend=backend)


def attention_cases(size: Size) -> Iterator[Case]:
    """At the heads of `speed` and a batch of 16, so that what is compiled here is not compiled again there."""
    raw = backward("attention")
    batch = 16 if size is REAL else 2
    triton, cuda = {"backends": ("triton",)}, {"backends": ("cuda",), "dtypes": HALF}
    longest = _attention_table.CUDA_LONGEST
    # CUDA C++ first: its tests are what evidence waits for.
    for length in (n for n in (50, 17, 64, 65, 197, 256) if n <= longest):
        for width in (64, 32, 24, 128):
            shape = {"q": (batch, length, 3, 3, width)}
            yield Case(f"attention-{length}x{width}", raw, shape, _self_attention, **cuda)
    for length in (n for n in (50, 197) if n <= longest):
        for width in (64, 24):
            shape = {"q": (batch, length, 3, 3, width)}
            for name, options in (("causal", {"causal": True}), ("ragged", {"ragged": True})):
                call = functools.partial(_self_attention, **options)
                yield Case(f"attention-{name}-{length}x{width}", raw, shape, call, **cuda)
            shape = {"q": (batch, 10, 3, width), "kv": (batch, length, 2, 3, width)}
            yield Case(f"attention-cross-{length}x{width}", raw, shape, _cross_attention, **cuda)
    for length in size.lengths:
        for heads, width in ((12, 64), (16, 32)) if size is REAL else ((1, 16),):
            dtypes = DTYPES if length in (50, 197, *TOY.lengths) else DTYPES[:1]
            shape = {"q": (batch, length, 3, heads, width)}
            yield Case(f"attention-{length}x{width}", raw, shape, _self_attention, dtypes, **triton)
    length, width = size.lengths[0], 80 if size is REAL else 24
    shape = {"q": (batch, length, 3, 2, width)}
    for name, options in (("causal", {"causal": True}), ("ragged", {"ragged": True})):
        yield Case(f"attention-{name}", raw, shape, functools.partial(_self_attention, **options), **triton)
    shape = {"q": (batch, 4, 2, width), "kv": (batch, length, 2, 2, width), "key_bias": (batch, length, 2)}
    yield Case("attention-statistics", raw, shape, functools.partial(_cross_attention, stats=True), **triton)


def _self_attention(backend, device, q, causal=False, ragged=False):
    if not ragged:
        return ops.attention(q, causal=causal, backend=backend)
    batch, length = q.shape[:2]
    lengths = torch.tensor([length, 0, *([length // 2] * (batch - 2))], dtype=torch.int32)
    cu = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)])
    rows = q.flatten(0, 1)[: int(cu[-1])]
    return ops.attention(rows, cu_seqlens_q=cu.to(device), max_seqlen_q=length, backend=backend)


def _cross_attention(backend, device, q, kv, key_bias=None, stats=False):
    if not stats:
        return ops.attention(q, kv, backend=backend)
    marked = torch.arange(kv.shape[1], device=device).expand(kv.shape[:2]) % 2 == 0
    out, found = ops.attention(q, kv, key_bias=key_bias, marked=marked, stats=True, backend=backend)
    return out, *found


def optimizer_cases(size: Size) -> Iterator[Case]:
    for width in (size.width, 70):
        names = ("param", "grad", "exp_avg", "exp_avg_sq")
        yield Case(f"adamw-{width}", ("adamw",), dict.fromkeys(names, (size.rows, width)), _adamw, positive=True)


def _adamw(backend, device, param, grad, exp_avg, exp_avg_sq):
    lists = [[t.detach().clone()] for t in (param, grad, exp_avg, exp_avg_sq)]
    ops.adamw(*lists, [torch.tensor(3.0, device=device)], lr=1e-2, weight_decay=0.05, backend=backend)
    return [tensor for (tensor,) in (lists[0], *lists[2:])]


# --- masked convnets, and every other public op ----------------------------------------------------------------

# op -> the raw ops that its case in tests/ops/cases.py runs.
RAW = {
    "batch_norm_act": ("segment_stats", "norm_act", "norm_act_sums", "norm_act_backward"),
    "grn": ("segment_stats", "norm_act", "norm_act_sums", "norm_act_backward"),
    "group_norm_cells": ("segment_stats", "norm_act", "norm_act_sums", "norm_act_backward"),
    "instance_norm_cells": ("segment_stats", "norm_act", "norm_act_sums", "norm_act_backward"),
    "segment_sum": ("segment_stats",),
    "global_pool_cells": ("segment_stats",),
    "pack_cells": ("pack_cells", "unpack_cells"),
    "unpack_cells": ("unpack_cells", "pack_cells", "fill_sum"),
    "max_pool_cells": backward("max_pool_cells"),
    "avg_pool_cells": backward("avg_pool_cells"),
    "depthwise_cells": ("depthwise", "depthwise_grad_weight"),
    "conv_cells of frames": backward("halo_cells"),
    "conv_cells of taps": backward("gather_taps"),
    "conv_cells, implicit": tuple(_registry.FAMILIES["implicit_conv"]),
    "conv_cells by rows": (),
    "conv_cells on the map": ("pack_cells", "unpack_cells"),
}
SEEN = ("adamw", "add_norm", "bias_gelu", "attention", "patch_embed", "gather_tokens", "restore_tokens", "patch_loss")


def cell_cases(size: Size) -> Iterator[Case]:
    """The small cases; those of ops that have cases above are not repeated. An op that is new is run as it stands."""
    for name, case in small.CASES.items():
        if small.op_of(name) in (*SEEN, "linear"):
            continue
        raw = next((RAW[key] for key in (name, name.split(", ")[0], small.op_of(name)) if key in RAW), None)
        raw = backward(case.raw) if raw is None and case.raw else raw or ()
        if raw:
            # The products of a block round in 16 bits, too: the trainings judge that.
            dtypes = (torch.float32,) if small.op_of(name) == "transformer_block" else DTYPES
            yield Case(name, raw, case.inputs, case.call, dtypes)
    if size is not REAL:
        return
    for kernel, side, channels in ((7, 8, 96), (7, 1, 768), (5, 4, 192), (3, 2, 70)):
        shapes = {"x": (6, side, side, channels), "weight": (channels, 1, kernel, kernel), "bias": (channels,)}
        call = functools.partial(_on_cells, ops.depthwise_cells)
        yield Case(f"depthwise_cells-{kernel}x{kernel}-{side}x{channels}", RAW["depthwise_cells"], shapes, call)
    for act in ("none", "relu6"):
        affine = {"weight": (96,), "bias": (96,)}
        shapes = {"x": (6, 8, 8, 96), **affine, "residual": (6, 8, 8, 96)}
        yield Case(f"batch_norm_act-{act}-96", RAW["batch_norm_act"], shapes, functools.partial(_batch_norm, act))
    for kernel, stride, pad in ((2, 2, 0), (3, 2, 1)):
        for op, raw in ((ops.max_pool_cells, "max_pool_cells"), (ops.avg_pool_cells, "avg_pool_cells")):
            call = functools.partial(_on_cells, op, args=(kernel, stride, pad))
            yield Case(f"{raw}-{kernel}x{kernel}-64", backward(raw), {"x": (6, 8, 8, 64)}, call)


def _on_cells(op, backend, device, x, args=(), **tensors):
    return op(x, small.cells(device), *args, **tensors, backend=backend)


def _batch_norm(act, backend, device, x, weight, bias, residual):
    options = {"training": True, "act": act, "residual": residual, "backend": backend}
    return ops.batch_norm_act(x, weight, bias, **options)


# What most users need; the rest comes after the trainings of transformers.
COMMON = (token_cases, transformer_cases, attention_cases, optimizer_cases)


# --- all together ----------------------------------------------------------------------------------------------


def runs(size: Size, backends: tuple[str, ...]) -> list[Run]:
    """Every case on those of `backends` that have its kernels, in each dtype; implicit_conv last.

    Of a group, all cases in the first dtype come before any in the next.
    """
    late = lambda case: "implicit" in case.name  # noqa: E731
    found = []
    for group in (*COMMON, cell_cases):
        every = list(group(size))
        for dtype in DTYPES:
            for case in (c for c in every if dtype in c.dtypes):
                for backend in (b for b in backends if b in case.backends and serves(b, case)):
                    found.append(Run(f"{backend}/{case.name}/{str(dtype)[6:]}", case, backend, dtype))
    return sorted(found, key=lambda run: late(run.case))


def serves(backend: str, case: Case) -> bool:
    if backend == "triton":
        return all(_registry.FAMILY_OF[op] not in _registry.CPU_ONLY for op in case.raw)
    return all(op in _dispatch.CUDA_OPS for op in case.raw)

"""What `compile_all` compiles: the launchers of each family and their arguments, as meta tensors.

A family's cases are a function `<family>_cases(full)` in `CASES` that yields (label, launcher, arguments).
"""

from __future__ import annotations

import math

import torch

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(count: int) -> torch.Tensor:
    return meta(count, dtype=torch.int32)


def mask_cases(full: bool):
    from maefast.kernels.mask import token_mask

    sizes = {"f32": (196, 8192), "bf16": (196, 1568)}
    if full:
        sizes = dict.fromkeys(DTYPES, (50, 196, 784, 1568, 4096, 8192))
        yield "f32 N=16384 score (large)", token_mask, (meta(2, 16384), ints(3), 8192, False)
    for name, lengths in sizes.items():
        for tokens in lengths:
            for by_position in (False, True):
                order = "position" if by_position else "score"
                args = meta(8, tokens, dtype=DTYPES[name]), ints(9), 2 * tokens, by_position
                yield f"{name} N={tokens} {order}", token_mask, args


def embed_cases(full: bool):
    from maefast.kernels import embed

    shapes = [(256, 196, 768, 1), (32, 100, 70, 3)]  # the usual width, and one that no vector access fits
    shapes += [(64, 196, 192, 0), (256, 256, 1280, 1)] if full else []
    for name, dtype in (DTYPES if full else {"bf16": torch.bfloat16}).items():
        for batch, tokens, width, prefix in shapes:
            rows, kept, cu = batch * tokens, batch * (tokens // 4), ints(batch + 1)
            label = f"{name} N={tokens} D={width} P={prefix}"
            x = meta(batch, prefix + tokens, width, dtype=dtype)
            packed = meta(kept + batch * prefix, width, dtype=dtype)
            yield label, embed.gather_tokens, (x, ints(kept), cu, tokens // 4, prefix, True)
            yield label, embed.gather_tokens_backward, (packed, ints(rows), cu, prefix, True, False)
            y, wide = meta(kept, width, dtype=dtype), meta(kept + batch * prefix, width)
            pos, lead = meta(tokens, width), meta(prefix, width) if prefix else None
            yield f"{label} -> f32", embed.place_tokens, (y, ints(kept), cu, tokens, pos, lead)
            yield label, embed.place_tokens_backward, (wide, ints(rows), cu, prefix, True, prefix > 0, dtype)
            if full:
                args = wide, ints(rows), cu, prefix, False, False, dtype
                yield f"{label} no sums", embed.place_tokens_backward, args
        images = [((256, 3, 1, 224, 224), (1, 16, 16)), ((128, 3, 1, 224, 224), (1, 14, 14))]
        if full:
            images += [
                ((32, 3, 16, 224, 224), (2, 16, 16)),
                ((64, 1, 1, 1024, 128), (1, 16, 16)),
                ((64, 3, 1, 64, 64), (1, 8, 8)),
            ]
        for shape, patch in images:
            tokens = math.prod(shape[2:]) // math.prod(patch)
            kept = shape[0] * (tokens // 4)
            label = f"f32 -> {name} C={shape[1]} p={patch}"
            yield label, embed.patch_rows, (meta(*shape), ints(kept), patch, dtype)
            grad = meta(kept, shape[1] * math.prod(patch), dtype=dtype)
            yield label, embed.patch_rows_backward, (grad, ints(shape[0] * tokens), shape, patch, torch.float32)


def restore_cases(full: bool):
    from maefast.kernels import restore

    shapes = [(256, 196, 512, 1), *([(64, 1568, 384, 0), (32, 100, 70, 3)] if full else [])]
    for name, dtype in (DTYPES if full else {"f32": torch.float32, "bf16": torch.bfloat16}).items():
        for batch, tokens, width, prefix in shapes:
            kept, cu, token = batch * (tokens // 4), ints(batch + 1), meta(width, dtype=dtype)
            lists = ints(kept), ints(batch * tokens - kept)
            x, pos = meta(kept + batch * prefix, width, dtype=dtype), meta(prefix + tokens, width, dtype=dtype)
            grad = meta(batch, prefix + tokens, width, dtype=dtype)
            sums = [(prefix + tokens, False, True), (0, False, True)]
            sums += [(tokens, True, True), (0, False, False)] if full else []
            for first in (False, True):
                label = f"{name} N={tokens} D={width} P={prefix}{' visible first' if first else ''}"
                yield label, restore.restore_tokens, (x, *lists, cu, token, pos, prefix, first, False)
                plan = (*lists, ints(batch * tokens), cu)
                for rows, on_masked, need in sums:
                    text = f"{label} pos rows {rows}{' masked' if on_masked else ''}{', mask token' if need else ''}"
                    args = (grad, *plan, rows, prefix, first, on_masked, need, dtype)
                    yield text, restore.restore_tokens_backward, args
            some = ints(kept // 2)
            label = f"{name} N={tokens} D={width} P={prefix} absent"
            args = (x, ints(kept), some, cu, token, pos, prefix, True, False, cu, tokens)
            yield label, restore.restore_tokens, args
            grad = meta(kept + kept // 2 + batch * prefix, width, dtype=dtype)
            args = (
                grad,
                ints(kept),
                some,
                ints(batch * tokens),
                cu,
                prefix + tokens,
                prefix,
                True,
                False,
                True,
                dtype,
                cu,
            )
            yield label, restore.restore_tokens_backward, args


def loss_cases(full: bool):
    from maefast.kernels import loss

    shapes = [
        ("16x16x3", (256, 3, 1, 224, 224), (1, 16, 16), (0, 1, 2, 3) if full else (1,)),
        ("2x16x16x3", (32, 3, 16, 224, 224), (2, 16, 16), (1, 2) if full else (2,)),
    ]
    if full:
        shapes += [
            ("14x14x3", (128, 3, 1, 224, 224), (1, 14, 14), (1,)),
            ("8x8x3", (64, 3, 1, 64, 64), (1, 8, 8), (1,)),
            ("4x4x1", (64, 1, 1, 32, 32), (1, 4, 4), (1,)),
            ("32x32x3", (64, 3, 1, 224, 224), (1, 32, 32), (1, 2)),
            ("4x32x32x2", (2, 2, 4, 224, 224), (4, 32, 32), (1,)),
            ("4x64x64x2 (large)", (1, 2, 4, 256, 256), (4, 64, 64), (1,)),
        ]
    layouts = ((True, False, 0), (False, True, 1)) if full else ((True, False, 0),)
    for label, shape, patch, norms in shapes:
        tokens, values = math.prod(shape[2:]) // math.prod(patch), shape[1] * math.prod(patch)
        count = shape[0] * (tokens - tokens // 4)
        images = meta(*shape)
        for name, dtype in (DTYPES if full else {"bf16": torch.bfloat16}).items():
            for norm in norms:
                for packed, first, kind in layouts:
                    pred = meta(count if packed else shape[0] * tokens, values, dtype=dtype)
                    args = (patch, packed, first, norm, kind, 1.0)
                    text = f"{name} {label} norm {norm} {'cpp' if first else 'ppc'}"
                    yield text, loss.patch_loss, (pred, images, ints(count), *args)
                    stats = meta(count, shape[1] if norm == 2 else 1, 2)
                    lists = ints(count), ints(shape[0] * tokens)
                    back = (meta(count), pred, images, *lists, stats, *args)
                    for images_too in (False, True):
                        more = text + (" grad images" if images_too else "")
                        yield more, loss.patch_loss_backward, (*back, images_too)


def norm_cases(full: bool):
    from maefast.kernels import norm

    f32 = torch.float32
    streams = [(f32, torch.bfloat16), (f32, f32), *([(torch.bfloat16,) * 2, (torch.float16,) * 2] if full else [])]
    for width in (192, 512, 768, 1024, 1280) if full else (768,):
        x_rows, table = 12800, meta(width)
        for stream, low in streams:
            x, y = meta(x_rows, width, dtype=stream), meta(x_rows, width, dtype=low)
            label = f"D={width} {stream} {low}".replace("torch.", "")
            for delta in (None, y):
                text = f"{label}{' delta' if delta is not None else ''}"
                yield text, norm.add_norm, (x, delta, table, table, 1e-6, low)
                row = meta(x_rows)
                passed = None if delta is None else x
                yield text, norm.add_norm_backward, (y, passed, x, row, row, table, True)
            # As in a transformer block: the bias of the linear layer before, and the norm once more.
            yield f"{label} shift", norm.add_norm, (x, y, table, table, 1e-6, low, table)
            yield f"{label} shift", norm.add_norm_backward, (y, x, x, row, row, table, True, table, low, True)


def gelu_cases(full: bool):
    from maefast.kernels import gelu

    for name, dtype in (DTYPES if full else {"bf16": torch.bfloat16}).items():
        for width in (768, 2048, 3072) if full else (3072,):
            x, bias = meta(12800, width, dtype=dtype), meta(width)
            for tanh in (False, True):
                text = f"{name} D={width}{' tanh' if tanh else ''}"
                yield text, gelu.bias_gelu, (x, bias, tanh)
                for again in (False, True):
                    yield text, gelu.bias_gelu_backward, (x, x, bias, tanh, True, again)


def points_cases(full: bool):
    from maefast.kernels import points

    for size, count, k in ((1024, 64, 32), (8192, 512, 32), (100, 7, 3)) if full else ((1024, 64, 32),):
        cloud, queries = meta(128, size, 3), meta(128, count, 3)
        yield f"N={size}", points.farthest_points, (cloud, count, 0)
        yield f"N={size} k={k}", points.knn, (queries, cloud, k)


def chamfer_cases(full: bool):
    from maefast.kernels import chamfer

    for n, m in ((32, 32), (64, 128), (5, 9)) if full else ((32, 32),):
        a, b = meta(4864, n, 3), meta(4864, m, 3)
        yield f"{n} x {m}", chamfer.chamfer, (a, b)
        at = (meta(4864, count, dtype=torch.int32) for count in (n, m))
        yield f"{n} x {m}", chamfer.chamfer_backward, (meta(4864, n), meta(4864, m), a, b, *at)


def feature_loss_cases(full: bool):
    from maefast.kernels import feature_loss as kernels

    for name, dtype in (DTYPES if full else {"bf16": torch.bfloat16}).items():
        for width in (512, 768, 1024, 100) if full else (768,):
            pred, target = meta(3200, width, dtype=dtype), meta(12608, width, dtype=dtype)
            for norm, kind in ((0, 0), (1, 2), (2, 1), (0, 3)):
                text = f"{name} D={width} norm {norm} kind {kind}"
                yield text, kernels.feature_loss, (pred, target, ints(3200), norm, kind, 1.0, 1e-6)
                args = meta(3200), pred, target, ints(3200), meta(3200, 4), norm, kind, 1.0
                yield text, kernels.feature_loss_backward, args


def attention_cases(full: bool):
    from maefast.kernels.attention import attention, attention_backward

    lengths = (10, 26, 50, 98, 160, 197, 257)
    shapes = [(s, d) for d in (32, 64) for s in lengths] + [(50, 80), (98, 48), (197, 128), (1568, 64)]
    kinds = {"f32": ("", "stats"), "f16": ("",), "bf16": ("", "causal", "stats")}
    if not full:
        shapes, kinds = [(10, 64), (50, 64), (98, 64), (197, 32), (257, 64)], {"bf16": ("", "stats")}
    for name, extras in kinds.items():
        for length, width in shapes:
            for extra in extras if full or length in (50, 257) else extras[:1]:
                batch, heads, dtype = 256, 12, DTYPES[name]
                rows, cross, more = batch * length, extra == "stats", extra == "stats"
                q = meta(rows, *(() if cross else (3,)), heads, width, dtype=dtype)
                kv = meta(rows, 2, heads, width, dtype=dtype) if cross else None
                cu = (ints(batch + 1) if extra else None, ints(batch + 1) if cross else None)
                sizes = (batch, length, length, width**-0.5, extra == "causal")
                bias, marked = (meta(rows, heads), meta(rows, dtype=torch.bool)) if more else (None, None)
                label = f"{name} S={length} D={width} " + {"": "", "causal": "packed causal"}.get(
                    extra, "packed cross bias stats"
                )
                yield label, attention, (q, kv, *cu, *sizes, bias, marked, more)
                out, row = meta(rows, heads, width, dtype=dtype), meta(rows, heads)
                saved = (row, row, row) if more else (row, meta(0), meta(0))
                grads = (out, row, row, row) if more else (out, None, None, None)
                yield label, attention_backward, (*grads, q, kv, out, *saved, *cu, *sizes, bias, marked, more)
        for length, width in shapes if full else ():
            qkv, out, row = meta(8 * length, 3, 4, width, dtype=dtype), meta(8 * length, 4, width, dtype=dtype), meta(1)
            sizes, empty = (8, length, length, width**-0.5, False, None, None, False), (meta(0), meta(0))
            for interleaved in (False, True):
                places = meta(2, 4, length, length), meta(length, width), meta(length, width), interleaved
                label = f"{name} S={length} D={width} bias rope"
                yield label, attention, (qkv, None, None, None, *sizes, *places)
                saved = qkv, None, out, row, *empty, None, None
                yield label, attention_backward, (out, None, None, None, *saved, *sizes, *places, True)


def cells_cases(full: bool):
    from maefast.kernels import cells

    grid = [7, 7]
    levels = [(8, 256), (2, 1024), (1, 2048)] if full else [(8, 256)]
    for name, dtype in (DTYPES if full else {"f32": torch.float32, "bf16": torch.bfloat16}).items():
        for h, channels in levels:
            label, side = f"{name} {h}x{h}x{channels}", 7 * h
            full_map, packed = meta(128, side, side, channels, dtype=dtype), meta(2560, h, h, channels, dtype=dtype)
            slot, fill = ints(128 * 49), meta(channels, dtype=dtype)
            yield label, cells.pack_cells, (full_map, ints(2560), grid, True)
            for value in (None, fill) if full else (fill,):
                yield label, cells.unpack_cells, (packed, slot, [128, *grid], value, True)
            yield label, cells.fill_sum, (full_map, slot, [128, *grid])
        for h, channels in [(32, 3), *([(8, 256)] if full else [])]:
            label = f"{name} {h}x{h}x{channels} planes"
            image = meta(128, channels, 7 * h, 7 * h, dtype=dtype)
            yield label, cells.pack_cells, (image, ints(2560), grid, False)
            packed = meta(2560, h, h, channels, dtype=dtype)
            yield label, cells.unpack_cells, (packed, ints(128 * 49), [128, *grid], None, False)
    yield "wide", cells.unpack_cells, (meta(1, 1, 1, 16), ints(2**31), [2**16, 2**8, 2**7], None, True)
    yield "wide", cells.pack_cells, (meta(2**16, 2**8, 2**7, 16), ints(2**31), [2**8, 2**7], True)


def pool_cases(full: bool):
    from maefast.kernels import pool

    windows = {"3x3 s2": ([3, 3], [2, 2], [1, 1]), "2x2 s2": ([2, 2], [2, 2], [0, 0])}
    if full:
        windows["5x5 s1"] = [5, 5], [1, 1], [2, 2]
    for name, dtype in (DTYPES if full else {"f32": torch.float32, "bf16": torch.bfloat16}).items():
        for text, window in windows.items():
            for channels in (64, 256, 70) if full else (64,):
                label, (s, _) = f"{name} {text} C={channels}", window[1]
                x, table = meta(2560, 16, 16, channels, dtype=dtype), meta(2560, 9, dtype=torch.int32)
                grad = meta(2560, 16 // s, 16 // s, channels, dtype=dtype)
                yield label, pool.max_pool_cells, (x, table, *window)
                yield label, pool.max_pool_cells_backward, (grad, grad.byte(), table, *window)
                for include_pad in (True, False):
                    yield label, pool.avg_pool_cells, (x, table, *window, include_pad)
                    yield label, pool.avg_pool_cells_backward, (grad, table, *window, include_pad)


def sparse_conv_cases(full: bool):
    from maefast.kernels import sparse_conv as conv

    same, half = ((3, 3), (1, 1), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1), (1, 1))
    stem = ((7, 7), (2, 2), (3, 3), (1, 1))
    shapes = [(32, 3, stem, 3), (8, 64, same, 3), (2, 256, half, 3)]
    shapes += [(1, 512, same, 3), (4, 70, same, 3)] if full else []
    for name, dtype in (DTYPES if full else {"f32": torch.float32, "bf16": torch.bfloat16}).items():
        for side, width, window, reach in shapes:
            cells, out, taps = 2560, side // window[1][0], window[0][0] ** 2
            table = meta(cells, reach * reach, dtype=torch.int32)
            label = f"{name} cell {side} C={width} k={window[0][0]}"
            x = meta(cells, side, side, width, dtype=dtype)
            rows = meta(cells * out * out, taps * width, dtype=dtype)
            frame = meta(cells, side + 2, side + 2, width, dtype=dtype)
            yield label, conv.halo_cells, (x, table, (1, 1, 1, 1))
            yield label, conv.halo_cells_backward, (frame, table, (1, 1, 1, 1))
            yield label, conv.gather_taps, (x, table, *window)
            yield label, conv.gather_taps_backward, (rows, table, x.shape[1:], *window)


def implicit_conv_cases(full: bool):
    from maefast.kernels import implicit_conv as conv

    one, same, half = (((k, k), (s, s), (k // 2, k // 2), (1, 1)) for k, s in ((1, 1), (3, 1), (3, 2)))
    stem, spread = ((7, 7), (2, 2), (3, 3), (1, 1)), ((3, 3), (2, 2), (2, 2), (2, 2))
    shapes = [(32, 3, 64, stem, 3), (8, 64, 64, same, 3), (1, 512, 512, same, 3), (4, 256, 128, half, 3)]
    shapes += [(2, 70, 24, spread, 3), (4, 256, 64, one, 1), (4, 129, 200, same, 3)] if full else []
    for name, dtype in (DTYPES if full else {"f32": torch.float32, "bf16": torch.bfloat16}).items():
        for side, ci, co, window, reach in shapes:
            cells, out = 2560, side // window[1][0]
            label = f"{name} cell {side} {ci} -> {co} k={window[0][0]} s={window[1][0]}"
            table = meta(cells, reach * reach, dtype=torch.int32)
            x, grad = meta(cells, side, side, ci, dtype=dtype), meta(cells, out, out, co, dtype=dtype)
            weight = meta(window[0][0] ** 2, ci, co, dtype=dtype)
            for bias in (None, meta(co, dtype=dtype)) if full else (meta(co, dtype=dtype),):
                yield label, conv.implicit_conv, (x, table, weight, bias, *window)
            yield label, conv.implicit_conv_grad_x, (grad, table, weight, *window)
            yield label, conv.implicit_conv_grad_weight, (x, grad, table, *window)
    wide = meta(2**31 // 64 + 1, 8, 8, 16, dtype=torch.bfloat16)
    table, weight = meta(wide.shape[0], 9, dtype=torch.int32), meta(9, 16, 16, dtype=torch.bfloat16)
    yield "wide", conv.implicit_conv, (wide, table, weight, None, *same)
    yield "wide", conv.implicit_conv_grad_x, (wide, table, weight, *same)
    yield "wide", conv.implicit_conv_grad_weight, (wide, wide, table, *same)


def cell_norm_cases(full: bool):
    from maefast.kernels import cell_norm

    shapes = [(16 * 112 * 112, 96, None), (16 * 20 * 4, 768, 4), *([(16 * 224 * 224, 24, None)] if full else [])]
    shapes += [(16 * 20 * 64, 256, 64), (999, 70, 1)] if full else []
    for name, dtype in (DTYPES if full else {"bf16": torch.bfloat16}).items():
        for rows, width, sites in shapes:
            cu, segments = (None, 1) if sites is None else (ints(17), 16)
            sites = sites or 1
            x, table, bias = meta(rows, width, dtype=dtype), meta(segments, width), meta(width)
            label = f"{name} C={width}{'' if cu is None else ' segments'}"
            yield label, cell_norm.segment_stats, (x, cu, sites)
            for act in (0, 1, 2):
                tables = cu, sites, table, table, bias
                for other in (None, x):
                    text = f"{label} act {act}{'' if other is None else ' residual'}"
                    yield text, cell_norm.norm_act, (x, other, *tables, act)
                    if other is None or act:
                        yield text, cell_norm.norm_act_sums, (x, x, other, *tables, act)
                for moved in (None, table):
                    text = f"{label} act {act}{'' if moved is None else ' moving'}"
                    yield text, cell_norm.norm_act_backward, (x, x, *tables, moved, moved, act)


def adamw_cases(full: bool):
    from maefast.kernels.adamw import adamw

    f32, bf16 = torch.float32, torch.bfloat16
    kinds = [(f32, f32, bf16, False), (f32, bf16, bf16, False), (bf16, bf16, None, False)]
    kinds += [(torch.float16, f32, None, True), (f32, f32, None, True), (f32, f32, bf16, True)] if full else []
    for dtype, grad, shadow, amsgrad in kinds:
        for count in (768, 771, 2**31 + 16) if full else (768, 771):
            for scaled in (False, True):
                text = "".join([", amsgrad" * amsgrad, ", shadow" * (shadow is not None), ", scaled" * scaled])
                one = meta(1) if scaled else None
                made = [[meta(count, dtype=d) for _ in range(20)] for d in (dtype, grad, dtype, dtype, dtype, shadow)]
                made[4:] = made[4] if amsgrad else [], made[5] if shadow else [], [meta() for _ in range(20)]
                scalars = one, 0.1, 0.9, 0.95, 1e-8, 0.05, scaled, one, one
                yield f"{str(dtype)[6:]} grad {str(grad)[6:]} [{count}]{text}", adamw, (*made, *scalars)


def depthwise_cases(full: bool):
    from maefast.kernels import depthwise

    levels = [(8, 96), (4, 192), (2, 384), (1, 768)] if full else [(8, 96), (1, 768)]
    for name, dtype in (DTYPES if full else {"f32": torch.float32, "bf16": torch.bfloat16}).items():
        for size in (3, 5, 7) if full else (7,):
            for h, channels in levels:
                side = 2 * (-(-(size // 2) // h)) + 1
                label = f"{name} {size}x{size} {h}x{h}x{channels}"
                x, table = meta(2432, h, h, channels, dtype=dtype), meta(2432, side * side, dtype=torch.int32)
                taps = meta(size * size, channels)
                yield label, depthwise.depthwise, (x, table, taps, meta(channels), False)
                yield f"{label} flip", depthwise.depthwise, (x, table, taps, None, True)
                yield label, depthwise.depthwise_grad_weight, (x, x, table, size)


def wide_cases(full: bool):
    """Sizes at which row or segment numbers, or offsets in one image, pass 2^31."""
    from maefast.kernels import embed, loss, restore

    batch, tokens, width = 2**21, 1023, 16
    cu, lists = ints(batch + 1), (ints(batch), ints(batch * 1022))
    packed, token = meta(4 * batch, width), meta(width)
    yield "wide", embed.gather_tokens_backward, (packed, ints(batch * tokens), cu, 3, True, False)
    yield "wide", restore.restore_tokens, (packed, *lists, cu, token, None, 3, False, False)
    video, patch = (8, 3, 1024, 1024, 1024), (2, 16, 16)
    tokens = 512 * 64 * 64
    grad, slot = meta(8 * tokens, 1536), ints(8 * tokens)
    yield "wide", embed.patch_rows_backward, (meta(8, 1536), slot, (8, 16, 1024, 1024, 1024), (2, 16, 2), torch.float32)
    yield "wide", embed.patch_rows, (meta(8, 16, 1024, 1024, 1024), ints(2**29), (2, 16, 2), torch.float32)
    args = patch, True, False, 1, 0, 1.0
    yield "wide", loss.patch_loss, (grad, meta(*video), slot, *args)
    stats = meta(8 * tokens, 1, 2)
    for images_too in (False, True):
        yield "wide", loss.patch_loss_backward, (slot.float(), grad, meta(*video), slot, slot, stats, *args, images_too)
    yield "wide", embed.place_tokens_backward, (packed, ints(batch * tokens), cu, 3, True, True, torch.float32)


CASES = (
    mask_cases,
    embed_cases,
    restore_cases,
    loss_cases,
    norm_cases,
    gelu_cases,
    points_cases,
    chamfer_cases,
    feature_loss_cases,
    adamw_cases,
    attention_cases,
    cell_norm_cases,
    cells_cases,
    pool_cases,
    sparse_conv_cases,
    implicit_conv_cases,
    depthwise_cases,
    wide_cases,
)

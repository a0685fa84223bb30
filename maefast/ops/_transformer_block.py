"""The one autograd node of `transformer_block`: its forward and its backward, made of the raw ops of other families.

Everything is rows [R, D] in here. Shorthand of the names: r residual stream, y its norm, a output of the attention, h
pre-activation of the GELU, g its output; `low` the dtype of matrix products, `wide` that of norms and sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maefast.ops import _autograd
from maefast.ops._library_attention import LibraryAttention
from maefast.ops._shadow import shadow_of
from maefast.ops._transformer_block_form import Form
from maefast.ops.linear import Products
from maefast.ops.mask import TokenMask

_unsafe_view = torch.ops.aten._unsafe_view.default._op
WEIGHTS = 18  # norm1 2, qkv 3 weights (or one and two None) and 3 biases, proj 2, norm2 2, fc1 2, fc2 2, scales 2


# --- which rows are wanted ----------------------------------------------------------------------------------


def _take(form: Form, rows: Tensor, masked: TokenMask | None) -> Tensor:
    """The wanted rows of [B * S, D]."""
    tokens = rows.view(form.batch, form.length, form.width)
    if masked is None:
        return tokens[:, form.length - form.count :].reshape(-1, form.width).contiguous()
    return form.gather(tokens, masked.masked, masked.cu_masked, masked.max_masked, form.prefix, False)


def _put(form: Form, rows: Tensor, masked: TokenMask | None) -> Tensor:
    """The wanted rows at their places among zeros, [B * S, D]."""
    if masked is not None:
        out = form.gather_backward(rows, masked.slot, masked.cu_masked, form.prefix, False, True)
    else:
        out = rows.new_zeros(form.batch, form.length, form.width)
        out[:, form.length - form.count :] = rows.view(form.batch, form.count, form.width)
    return out.view(-1, form.width)


def _add(form: Form, out: Tensor, rows: Tensor, masked: TokenMask | None) -> Tensor:
    """The wanted rows added at their places."""
    if masked is not None:
        return out.add_(_put(form, rows, masked))
    out.view(form.batch, form.length, form.width)[:, form.length - form.count :] += rows.view(
        form.batch, form.count, form.width
    )
    return out


# --- weights ------------------------------------------------------------------------------------------------


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """In `dtype`, contiguous as the kernels want it."""
    if t is None:
        return None
    return (t if t.dtype is dtype else t.to(dtype)).contiguous()


def _ready(weight: Tensor | None, low: torch.dtype) -> Tensor | None:
    """The copy in `low` that its optimizer keeps, where there is one; else the weight as it is."""
    copy = None if weight is None or weight.dtype is low else shadow_of(weight, low)
    return weight if copy is None else copy


def _joined(parts: tuple[Tensor | None, ...], width: int, dtype: torch.dtype) -> Tensor | None:
    """Three weights or biases side by side in `dtype`; one as it is. A bias that is missing among others is zero."""
    first, *others = parts
    if others[0] is None and others[1] is None and (first is None or first.shape[0] == 3 * width):
        return _to(_ready(first, dtype), dtype)
    parts = tuple(_ready(t, dtype) for t in parts)
    if all(t is not None and t.dtype is dtype for t in parts):
        return torch.cat(parts)
    like = next(t for t in parts if t is not None)
    out = like.new_empty((3 * width, *like.shape[1:]), dtype=dtype)
    for part, t in zip(out.split(width), parts):
        part.zero_() if t is None else part.copy_(t)  # casts
    return out


PRODUCTS = (2, 8, 12, 14)  # of the weights: qkv, proj, fc1, fc2


def _lower(form: Form, w: tuple[Tensor | None, ...], casts: tuple[Tensor | None, ...] = (None,) * 4) -> list:
    """The weights of the four products in the dtype that they run in, qkv's side by side or (form.apart) a tuple of
    three; `casts`: those that are there already."""
    low = form.low
    found = [_to(_ready(w[at], low), low) if cast is None else cast for at, cast in zip(PRODUCTS[1:], casts[1:])]
    if form.apart:
        return [tuple(t.contiguous() for t in w[2:5]), *found]
    return [_joined(w[2:5], form.width, low) if casts[0] is None else casts[0], *found]


def _cast(lowered: list, w: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Of `_lower`'s, what the backward is spared to cast again. Three that were put side by side are not kept."""
    return [None if isinstance(t, tuple) or t.dtype is w[at].dtype else t for t, at in zip(lowered, PRODUCTS)]


def _q_kv(form: Form, weight):
    """The weights of the queries, and of keys and values, from those of qkv."""
    at = 1 if form.apart else form.width
    return weight[:at], weight[at:]


# --- a branch's end: layer scale and stochastic depth -------------------------------------------------------


def scaled(out: Tensor, scale: Tensor | None, drop: Tensor | None) -> Tensor:
    """out [R, D] times `scale` [D] and the factor of its sample (or row)."""
    if scale is not None:
        out = out * scale
    return out if drop is None else _drop(out, drop)


def _drop(rows: Tensor, drop: Tensor) -> Tensor:
    if not drop.shape[0]:  # no samples, whose length nobody could tell
        return rows
    return (rows.reshape(drop.shape[0], -1, rows.shape[-1]) * drop.to(rows.dtype).view(-1, 1, 1)).view(rows.shape)


class _Branch(NamedTuple):
    """Gradients of a branch's last linear layer and its scale. `grad`: of what the layer returned."""

    grad: Tensor
    before: Tensor  # the same without the scale, from which the layer's own gradients are made


def _back_through(grad: Tensor, scale: Tensor | None, drop: Tensor | None, low: torch.dtype) -> _Branch:
    if drop is not None:
        grad = _drop(grad, drop)
    if scale is None:
        grad = _to(grad, low)
        return _Branch(grad, grad)
    return _Branch(_to(grad * scale, low), _to(grad, low))


def _last_layer(layer: Products, before, x, weight, bias, scale, wide, need):
    """Gradients of (weight, bias, scale) of scale * (x weight^T + bias); `need` says which are asked for.

    The scale's needs no copy of the layer's output: sum_r before * out = <weight, before^T x> + bias * sum_r before.
    """
    need_weight, need_bias, need_scale = need
    if not any(need):
        return None, None, None
    bias_dtype = bias.dtype if need_bias else None
    if not (need_weight or need_scale):
        total = before.sum(0)
        return None, total if scale is None else total * scale, None
    if scale is None:
        return *layer.weight_gradient(before, x, weight.dtype, bias_dtype), None
    product_, total = layer.weight_gradient(before, x, wide, wide)
    factor = scale.to(wide)
    grad_scale = None
    if need_scale:
        grad_scale = (weight.to(wide) * product_).sum(1)
        grad_scale = (grad_scale if bias is None else grad_scale + bias.to(wide) * total).to(scale.dtype)
    return (
        product_.mul_(factor[:, None]).to(weight.dtype) if need_weight else None,
        (total * factor).to(bias.dtype) if need_bias else None,
        grad_scale,
    )


# --- forward ------------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """What the forward leaves for the backward; None where it is computed again."""

    r0: Tensor
    mean1: Tensor
    rstd1: Tensor
    y1: Tensor | None
    q: Tensor  # qkv in one, unless only some queries are wanted
    kv: Tensor | None
    a: Tensor
    lse: Tensor | None
    entropy: Tensor | None  # empty, as the raw op returned it
    mass: Tensor | None
    r1: Tensor
    mean2: Tensor
    rstd2: Tensor
    y2: Tensor | None
    h: Tensor
    g: Tensor | None


def _forward(form: Form, r0, delta, w, lowered, drop1, drop2, starts, places, masked, saving):
    """(r1, delta of the output, _Kept, LibraryAttention or None). starts: (cu_q, cu_k, max_q, max_k). places: (bias,
    cos, sin, interleaved) of the attention, or ()."""
    low, width, heads = form.low, form.width, form.heads
    qkv_weight, proj_weight, fc1_weight, fc2_weight = lowered
    residual, y1, mean1, rstd1 = form.norm(r0, delta, _to(w[0], form.wide), _to(w[1], form.wide), form.eps1, low)
    if delta is not None:
        r0 = residual
    bias = _joined(w[5:8], width, low)
    if form.some:
        q_bias, kv_bias = (None, None) if bias is None else bias.split([width, 2 * width])
        q_weight, kv_weight = _q_kv(form, qkv_weight)
        q = form.q.forward(_take(form, y1, masked), q_weight, q_bias).view(-1, *heads)
        kv = form.kv.forward(y1, kv_weight, kv_bias).view(-1, 2, *heads)
    else:
        q, kv = form.qkv.forward(y1, qkv_weight, bias).view(-1, 3, *heads), None
    cu_q, cu_k, max_q, max_k = starts
    graph = lse = entropy = mass = None
    if form.library is None:
        a, lse, entropy, mass = form.attend(
            q, kv, cu_q, cu_k, form.batch, max_q, max_k, form.scale, False, None, None, False, *places
        )
        a = a.view(-1, width)
    else:
        graph = LibraryAttention(form.library, form.batch, form.scale)
        a = (graph.forward if saving else graph.alone)(q, kv, *starts).reshape(-1, width)
    r = _take(form, r0, masked) if form.some else r0
    if form.shifts:
        p, shift = form.proj.forward(a, proj_weight, None), _to(w[9], form.wide)
    else:
        p, shift = scaled(form.proj.forward(a, proj_weight, _to(w[9], low)), w[16], drop1), None
    r1, y2, mean2, rstd2 = form.norm(r, p, _to(w[10], form.wide), _to(w[11], form.wide), form.eps2, low, shift)
    h = form.fc1.forward(y2, fc1_weight, None)
    g = form.gelu(h, _to(w[13], form.wide), form.tanh)
    out = scaled(form.fc2.forward(g, fc2_weight, _to(w[15], low)), w[17], drop2)
    whole = form.keep != "lean"
    kept = _Kept(
        r0, mean1, rstd1, y1 if whole else None, q, kv, a, lse, entropy, mass,
        r1, mean2, rstd2, y2 if whole else None, h, g if whole else None,
    )  # fmt: skip
    return r1, out, kept, graph


# --- backward -----------------------------------------------------------------------------------------------


def _through_mlp(form: Form, k: _Kept, grads, grad_r1, grad_out, w, lowered, drop2, need):
    """From the gradients of what came out (the stream's may be None) to (that of the stream behind the attention, the
    same in the dtype of the attention branch, whether it was summed for the bias of proj). Fills in `grads`."""
    low, wide, (*_, fc1_weight, fc2_weight) = form.low, form.wide, lowered
    branch = _back_through(grad_out, w[17], drop2, low)
    grad = form.fc2.input_gradient(branch.grad, fc2_weight)
    again = k.g is None and (need[14] or need[17])
    grad, grad_bias, g = form.gelu_backward(grad, k.h, _to(w[13], wide), form.tanh, need[13], again)
    if need[13]:
        grads[13] = grad_bias
    ends = need[14], need[15], need[17]
    g = k.g if k.g is not None else g
    grads[14], grads[15], grads[17] = _last_layer(form.fc2, branch.before, g, w[14], w[15], w[17], wide, ends)
    del g, branch

    grad_y = form.fc1.input_gradient(grad, fc1_weight)
    shift = need[9] and form.shifts
    again = k.y2 is None and need[12]
    grad_r, tables, grad_p, y = form.norm_backward(
        grad_y, grad_r1, k.r1, k.mean2, k.rstd2, _to(w[10], wide), need[10] or need[11],
        _to(w[11], wide) if again else None, form.branch, shift,
    )  # fmt: skip
    tables = tables.unbind(0)
    for at in (10, 11):
        if need[at]:
            grads[at] = tables[at - 10]
    if shift:
        grads[9] = tables[2]
    if need[12]:
        grads[12], _ = form.fc1.weight_gradient(grad, k.y2 if k.y2 is not None else y, w[12].dtype, None)
    return grad_r, grad_r if form.branch is grad_r.dtype else grad_p, shift


def _gradients(
    form: Form, k: _Kept, graph, graph_kept, grad_r1, grad_out, w, lowered, drop1, drop2, starts, places, masked, needs
):
    """(grad of r0, grad of delta or None, of the bias or None, grads of the weights). needs: (x, delta's dtype or None,
    bias, each weight). One of the incoming gradients may be None."""
    low, wide = form.low, form.wide
    need_x, delta_dtype, need_bias, need = needs
    qkv_weight, proj_weight, *_ = lowered
    grads: list[Tensor | None] = [None] * WEIGHTS
    if grad_out is not None:
        args = grads, grad_r1, grad_out, w, lowered, drop2, need
        grad_r, grad_p, shift = _through_mlp(form, k, *args)
    else:
        grad_r, grad_p, shift = grad_r1, _to(grad_r1, form.branch), False

    branch = _back_through(grad_p, w[16], drop1, low)
    ends = need[8], need[9] and not shift, need[16]
    grads[8], grad_bias, grads[16] = _last_layer(form.proj, branch.before, k.a, w[8], w[9], w[16], wide, ends)
    grads[9] = grads[9] if shift else grad_bias
    if not (need_x or delta_dtype is not None or need_bias or any(need[:8])):
        return None, None, None, grads
    grad_a = form.proj.input_gradient(branch.grad, proj_weight)
    del branch, grad_p
    attention_bias = None
    if graph is None:
        cu_q, cu_k, max_q, max_k = starts
        grad_a = grad_a.view(-1, *form.heads)
        a = k.a.view(grad_a.shape)
        options = form.batch, max_q, max_k, form.scale, False, None, None, False, *places
        if need_bias:
            options = *options, True
        grad_q, grad_kv, _, attention_bias = form.attend_backward(
            grad_a, None, None, None, k.q, k.kv, a, k.lse, k.entropy, k.mass, cu_q, cu_k, *options
        )
    else:
        grad_q, grad_kv = graph.backward(grad_a, graph_kept)
    grad_q = grad_q.view(grad_q.shape[0], -1)
    grad_kv = None if k.kv is None else grad_kv.view(grad_kv.shape[0], -1)
    del grad_a

    again = k.y1 is None and any(need[2:5])
    if form.some:
        q_weight, kv_weight = _q_kv(form, qkv_weight)
        grad_y = form.kv.input_gradient(grad_kv, kv_weight)
        grad_y = _add(form, grad_y, form.q.input_gradient(grad_q, q_weight), masked)
        grad_r = _put(form, grad_r, masked)
    else:
        grad_y = form.qkv.input_gradient(grad_q, qkv_weight)
    grad_x, tables, grad_delta, y = form.norm_backward(
        grad_y, grad_r, k.r0, k.mean1, k.rstd1, _to(w[0], wide), need[0] or need[1],
        _to(w[1], wide) if again else None, delta_dtype,
    )  # fmt: skip
    del grad_y, grad_r
    if delta_dtype is grad_x.dtype:
        grad_delta = grad_x
    tables = tables.unbind(0)
    for at in (0, 1):
        if need[at]:
            grads[at] = tables[at]
    y = k.y1 if k.y1 is not None else y
    _qkv_gradients(form, grads, grad_q, grad_kv, y, w, need, masked)
    return grad_x, grad_delta, attention_bias if need_bias else None, grads


def _qkv_gradients(form: Form, grads, grad_q, grad_kv, y, w, need, masked) -> None:
    """Of the projections of queries, keys and values."""
    if not any(need[2:8]):
        return
    width, need_weight = form.width, any(need[2:5])
    bias_dtype = next((t.dtype for t, n in zip(w[5:8], need[5:8]) if n), None)
    parts = [(form.qkv, grad_q, y)]
    if grad_kv is not None:
        parts = [(form.q, grad_q, _take(form, y, masked) if need_weight else None), (form.kv, grad_kv, y)]
    found = []
    for layer, grad, x in parts:
        found.append(layer.weight_gradient(grad, x, w[2].dtype, bias_dtype) if need_weight else (None, grad.sum(0)))
    weight, total = (t[0] if len(t) == 1 or t[0] is None else torch.cat(t) for t in zip(*found))
    for at, gradient in ((2, weight), (5, total)):
        joint = w[at] is not None and w[at].shape[0] == 3 * width
        for i, part in enumerate([gradient] if gradient is None or joint else gradient.split(width)):
            if need[at + i]:
                grads[at + i] = part


class TransformerBlock(torch.autograd.Function):
    """x, delta [B, S, D] or [T, D] -> r1, delta. bias, cos, sin, interleaved, cu_q, cu_k, max_q, max_k: of the
    attention. w: see WEIGHTS."""

    @staticmethod
    def forward(
        ctx, form, x, delta, bias, cos, sin, interleaved, drop1, drop2, cu_q, cu_k, max_q, max_k, masked, *w
    ):  # fmt: skip
        starts = cu_q, cu_k, max_q, max_k
        places = () if bias is None and cos is None else (bias, cos, sin, interleaved)
        lowered = _lower(form, w)
        added = None if delta is None else delta.view(-1, form.width)
        rows, saving = x.view(-1, form.width), ctx is not None and form.keep != "nothing"
        r1, out, kept, graph = _forward(form, rows, added, w, lowered, drop1, drop2, starts, places, masked, saving)
        if x.ndim == 3 and masked is None:
            # Not views, which nobody could write into; see `norm._AddNorm`.
            shape = (x.shape[0], form.count or form.length, form.width)
            r1, out = _unsafe_view(r1, shape), _unsafe_view(out, shape)
        if ctx is not None:
            # x too, whatever is kept: it shows who asks for a second derivative (see `_autograd.once`), and in a stack
            # of blocks it is what the block before keeps.
            common = (x, bias, cos, sin, drop1, drop2, cu_q, cu_k, *w)
            if form.keep == "nothing":
                ctx.save_for_backward(*common, kept.r0)
                graph = None
            else:
                more = () if graph is None else graph.taken()
                ctx.save_for_backward(*common, *kept._replace(r1=r1), *_cast(lowered, w), *more)
            ctx.form, ctx.graph, ctx.masked, ctx.longest = form, graph, masked, (max_q, max_k)
            ctx.interleaved = interleaved
            ctx.shape, ctx.delta_dtype = x.shape, None if delta is None else delta.dtype
            ctx.set_materialize_grads(False)
            need = ctx.needs_input_grad
            if not (any(need[1:4]) or any(need[-WEIGHTS : -WEIGHTS + 10]) or need[-2]):
                ctx.mark_non_differentiable(r1)  # only the MLP is trainable
        return r1, out

    @staticmethod
    @_autograd.once("transformer_block")
    def backward(ctx, grad_r1, grad_out):
        kind = (grad_out if grad_r1 is None else grad_r1).device.type
        if torch.is_autocast_enabled(kind):  # the dtypes are those of the forward, whatever the caller is in now
            with torch.autocast(kind, enabled=False):
                return _backward(ctx, grad_r1, grad_out)
        return _backward(ctx, grad_r1, grad_out)


def _backward(ctx, grad_r1: Tensor, grad_out: Tensor):
    form, masked, graph = ctx.form, ctx.masked, ctx.graph
    _, bias, cos, sin, drop1, drop2, cu_q, cu_k, *rest = ctx.saved_tensors
    w, rest = rest[:WEIGHTS], rest[WEIGHTS:]
    starts = cu_q, cu_k, *ctx.longest
    places = () if bias is None and cos is None else (bias, cos, sin, ctx.interleaved)
    if form.keep == "nothing":
        lowered = _lower(form, w)
        _, _, kept, graph = _forward(form, rest[0], None, w, lowered, drop1, drop2, starts, places, masked, True)
        more = () if graph is None else graph.taken()
    else:
        fields = len(_Kept._fields)
        kept = _Kept(*rest[:fields])
        kept = kept._replace(r1=kept.r1.view(-1, form.width))
        lowered, more = _lower(form, w, rest[fields : fields + 4]), rest[fields + 4 :]
    _, need_x, need_delta, need_bias, *_ = ctx.needs_input_grad
    needs = need_x, ctx.delta_dtype if need_delta else None, need_bias, ctx.needs_input_grad[-WEIGHTS:]
    flat = [t if t is None else t.contiguous().view(-1, form.width) for t in (grad_r1, grad_out)]
    grad_x, grad_delta, grad_bias, grads = _gradients(
        form, kept, graph, more, *flat, w, lowered, drop1, drop2, starts, places, masked, needs
    )
    grad_x = grad_x.view(ctx.shape) if need_x else None
    grad_delta = grad_delta.view(ctx.shape) if need_delta else None
    return None, grad_x, grad_delta, grad_bias, *(None,) * 10, *grads

"""What calls of `transformer_block` have in common, and their checks: once for each kind of call, not for each call."""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from maefast.ops import _attention_table, _checks, _dispatch, _registry
from maefast.ops.embed import check_plan
from maefast.ops.linear import Products, apart, products
from maefast.ops.mask import TokenMask

KEEP = ("lean", "all", "nothing")
# Fields of BlockWeights; weight and bias of qkv count three times.
NAMES = ("norm1_weight", "norm1_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
NAMES += ("norm2_weight", "norm2_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "scale1", "scale2")


class Backends(NamedTuple):
    norm: str
    gelu: str
    attention: str  # or a library
    gather: str | None  # where only the masked tokens are wanted


class Form:
    """What all calls of one kind (shapes, dtypes, options, backend) share."""

    def __init__(
        self, *, x, stream, low, wide, branch, heads, hidden, eps, scale, tanh, shifts, count, masked, prefix, keep,
        sequences, backends, three,
    ) -> None:  # fmt: skip
        self.batch, self.width = sequences or len(x), x.shape[-1]
        self.length = x.shape[1] if x.ndim == 3 else None
        self.stream, self.low, self.wide = stream, low, wide
        self.heads, self.scale, self.tanh = (heads, self.width // heads), scale, tanh
        self.eps1, self.eps2 = eps
        self.count, self.prefix, self.keep, self.some = count, prefix, keep, count is not None or masked is not None

        def raw(op: str, name: str):
            return _registry.raw(op, name)._op  # of its overhead, what Python adds

        self.norm, self.norm_backward = raw("add_norm", backends.norm), raw("add_norm_backward", backends.norm)
        self.gelu, self.gelu_backward = raw("bias_gelu", backends.gelu), raw("bias_gelu_backward", backends.gelu)
        self.library = _attention_table.LIBRARIES.get(backends.attention)
        if self.library is None:
            self.attend = raw("attention", backends.attention)
            self.attend_backward = raw("attention_backward", backends.attention)
        if backends.gather is not None:
            self.gather = raw("gather_tokens", backends.gather)
            self.gather_backward = raw("gather_tokens_backward", backends.gather)

        def layer(rows: int, inputs: int, outputs: int) -> Products:
            return products(x.device.type, low, rows, inputs, outputs)

        rows, d = x.numel() // self.width, self.width
        wanted = masked.total_masked if masked is not None else len(x) * count if count is not None else rows
        # The products of q, k and v; `apart`: of three weights as they are, not side by side.
        parts = apart(x.device.type, low, d, 3 * d) if three else None
        self.apart = parts is not None
        if self.apart:
            self.qkv = self.q = self.kv = parts
        else:
            self.qkv, self.q, self.kv = layer(rows, d, 3 * d), layer(wanted, d, d), layer(rows, d, 2 * d)
        self.proj, self.fc1, self.fc2 = layer(wanted, d, d), layer(wanted, d, hidden), layer(wanted, hidden, d)

        # Of what the attention branch adds to the stream; the bias of proj is added with the residual where it can be.
        self.branch, self.shifts = branch, shifts


def goes_with(dtype: torch.dtype, stream: torch.dtype) -> bool:
    """Whether the kernels take such numbers beside the stream as they are."""
    return dtype is stream or (stream is torch.float32 and dtype.itemsize == 2)


_FORMS: dict[tuple, Form | None] = {}
_PLAN = attrgetter("batch", "num_tokens", "device", "total_masked", "max_masked")
_KIND = attrgetter("shape", "dtype", "device", "layout")
_MOST_FORMS = 4096  # ragged calls are of another kind at each step


def form_of(x, delta, flat, options, drop1, drop2, cu_seqlens, masked) -> Form | None:
    """The form of such calls, or None where the ops run one by one.

    Raises:
        TypeError, ValueError: the call does not fit.
    """
    if torch.compiler.is_compiling():  # traces the ops that the node is made of; nothing is kept of traced sizes
        _checked(x, delta, flat, *options, drop1, drop2, cu_seqlens, masked)
        return None
    try:
        kind = x.device.type
        key = (
            *[t if t is None else _KIND(t) for t in (x, delta, drop1, drop2, cu_seqlens, *flat)],
            *options,
            None if masked is None else _PLAN(masked),
            _checks.autocast(kind),
            _dispatch.forced(),
            torch.are_deterministic_algorithms_enabled() and _attention_table.repeatable(x, delta, *flat),
        )
        return _FORMS[key]
    except (AttributeError, TypeError):  # something that is no tensor, or no number: the checks say which
        key = None
    except KeyError:
        pass
    form = _checked(x, delta, flat, *options, drop1, drop2, cu_seqlens, masked)
    if key is not None:
        if len(_FORMS) >= _MOST_FORMS:
            _FORMS.clear()
        _FORMS[key] = form
    return form


def _checked(
    x, delta, w, num_heads, eps, scale, approximate, max_seqlen, count, prefix, keep, placed, backend, drop1, drop2, cu,
    masked,
) -> Form | None:  # fmt: skip
    _checks.tensor("x", x, ndim=(2, 3))
    packed, width = x.ndim == 2, x.shape[-1]
    if delta is not None:
        _checks.tensor("delta", delta)
        if delta.shape != x.shape:
            raise ValueError(f"delta must have the shape of x, {tuple(x.shape)}, got {tuple(delta.shape)}")
    _check_numbers(width, num_heads, eps, scale, approximate, keep)
    if packed != (cu is not None):
        raise ValueError("packed input needs cu_seqlens")  # the other way round is refused before
    _check_wanted(x, count, masked, prefix)
    _check_weights(w, width)
    for name, drop in (("drop1", drop1), ("drop2", drop2)):
        if drop is not None:
            _checks.tensor(name, drop, ndim=1)
            if masked is not None or len(drop) != len(x):
                what = "does not go with `masked`" if masked is not None else f"must hold {len(x)} factors"
                raise ValueError(f"{name} {what}, got shape {tuple(drop.shape)}")
    names = [name for name in NAMES for _ in range(3 if name.startswith("qkv") else 1)]
    _checks.same_device(x=x, delta=delta, drop1=drop1, drop2=drop2)
    for name, t in zip(names, w):
        _checks.same_device(x=x, **{f"weights.{name}": t})

    kind, stream = x.device.type, _checks.promote(x, delta)
    wide = torch.float64 if stream is torch.float64 else torch.float32
    autocast = None if stream is torch.float64 else _checks.autocast(kind)
    low = autocast or stream
    for name, t in zip(names, w):
        if autocast is None and t is not None and name[:3] in ("qkv", "pro", "fc1", "fc2") and t.dtype is not stream:
            raise TypeError(f"weights.{name} is {t.dtype} but the tokens are {stream}")
    if not x.numel() or (masked is not None and not masked.total_masked):
        return None
    branch = [low if t is None else torch.promote_types(low, t.dtype) for t in w[-2:]]
    if not all(goes_with(dtype, stream) for dtype in (low, *branch)):
        return None
    longest = max_seqlen if packed else x.shape[1]
    call = _attention_table.Call(
        device=kind,
        dtype=low,
        head_dim=width // num_heads,
        max_q=masked.max_masked if masked is not None else count or longest,
        max_k=longest,
        packed=packed or masked is not None,
        cross=masked is not None or count is not None,
        causal=False,
        extras=placed,
        scaled=scale is not None and scale != (width // num_heads) ** -0.5,
        repeatable=_attention_table.repeatable(x, delta, *w),
    )
    backends = Backends(
        norm=_dispatch.choose("add_norm", kind, stream, backend),
        gelu=_dispatch.choose("bias_gelu", kind, low, backend),
        attention=_attention_table.choose(call, backend),
        gather=None if masked is None else _dispatch.choose("gather_tokens", kind, low, backend),
    )
    if "reference" in backends:
        return None
    return Form(
        x=x,
        stream=stream,
        low=low,
        wide=wide,
        heads=num_heads,
        hidden=w[12].shape[0],
        eps=eps,
        scale=(width // num_heads) ** -0.5 if scale is None else float(scale),
        tanh=approximate == "tanh",
        count=count,
        masked=masked,
        prefix=prefix,
        keep=keep,
        sequences=cu.shape[0] - 1 if packed else None,
        backends=backends,
        three=all(t is not None and t.dtype is low for t in w[2:5]),
        branch=branch[0],
        shifts=w[16] is None and drop1 is None,
    )


def _check_numbers(width, num_heads, eps, scale, approximate, keep) -> None:
    _checks.integer("num_heads", num_heads, 1)
    if width < 1 or width % num_heads:
        raise ValueError(f"num_heads must divide the width of x, {width}, got {num_heads}")
    if len(eps) != 2:
        raise ValueError(f"eps must be a number or a pair of numbers, got {eps!r}")
    for value in eps:
        _checks.positive("eps", value)
    if scale is not None:
        _checks.number("scale", scale)
    _checks.one_of("approximate", approximate, ("none", "tanh"))
    _checks.one_of("keep", keep, KEEP)


def _check_wanted(x: Tensor, count, masked, prefix) -> None:
    _checks.integer("prefix", prefix)
    if count is not None:
        if masked is not None:
            raise ValueError("give count or masked, not both")
        _checks.integer("count", count)
        if x.ndim != 3 or not 1 <= count <= x.shape[1]:
            raise ValueError(f"count must lie in [1, {x.shape[-2]}] (the number of tokens), got {count}")
    if masked is not None:
        if not isinstance(masked, TokenMask):
            raise TypeError(f"masked must be a maefast.ops.TokenMask, got {type(masked).__name__}")
        check_plan(masked, x=x)
        if x.ndim != 3 or tuple(x.shape[:2]) != (masked.batch, prefix + masked.num_tokens):
            want = f"[{masked.batch}, {prefix} prefix + {masked.num_tokens}, D]"
            raise ValueError(f"x must be {want} for the plan `masked`, got {tuple(x.shape)}")


def _check_weights(w: tuple, width: int) -> None:
    """Shapes of the flattened weights."""

    def check(name: str, t: object, *shape: int) -> None:
        name = f"weights.{name}"
        _checks.tensor(name, t)
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(t.shape)}")

    fc1 = w[12]
    _checks.tensor("weights.fc1_weight", fc1, ndim=2)
    hidden = fc1.shape[0]
    joint = w[3] is None and w[4] is None
    for at in range(2, 5):
        if not joint or at == 2:
            check("qkv_weight", w[at], 3 * width if joint else width, width)
    for t in w[5:8]:
        if t is not None:
            _checks.tensor("weights.qkv_bias", t, ndim=1)
            check("qkv_bias", t, 3 * width if w[6] is None and w[7] is None and t.shape[0] != width else width)
    for at, name, *shape in (
        (0, "norm1_weight", width),
        (1, "norm1_bias", width),
        (8, "proj_weight", width, width),
        (10, "norm2_weight", width),
        (11, "norm2_bias", width),
        (12, "fc1_weight", hidden, width),
        (14, "fc2_weight", width, hidden),
    ):
        check(name, w[at], *shape)
    for at, name, size in (
        (9, "proj_bias", width),
        (13, "fc1_bias", hidden),
        (15, "fc2_bias", width),
        (16, "scale1", width),
        (17, "scale2", width),
    ):
        if w[at] is not None:
            check(name, w[at], size)

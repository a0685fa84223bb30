"""How a convolution over packed cells is computed: one table, from measurements (`dispatch_data.json`), printed
by `maefast doctor`.

A rule applies to cells (of the output) from its size on; the first that applies wins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from maefast.ops import _dispatch, _dispatch_data

Pair = tuple[int, int]

ROUTES = ("rows", "depthwise", "halo", "taps", "dense", "implicit")
# The routes with kernels of ours, and the op that decides.
RAW = {"halo": "halo_cells", "taps": "gather_taps", "implicit": "implicit_conv"}
MAX_RADIUS = 7  # of a neighbour table, csrc/cpu/sparse_conv_kernel.h


class Window(NamedTuple):
    """Where a convolution reads: (rows, columns) each."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def span(self) -> Pair:
        """Sites from the first tap to the last one."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation))

    @property
    def halo(self) -> tuple[int, int, int, int]:
        """(top, left, bottom, right) sites around a cell that its own outputs read."""
        after = (max(0, n - p - s) for n, p, s in zip(self.span, self.padding, self.stride))
        return *self.padding, *after

    def radius(self, cell: Pair) -> int:
        """How many cells away the halo reaches."""
        return max(-(-n // size) for n, size in zip(self.halo, cell * 2))

    def __str__(self) -> str:
        one = lambda pair: str(pair[0]) if pair[0] == pair[1] else str(pair)  # noqa: E731
        names = ", ".join(f"{name} {one(pair)}" for name, pair in zip(self._fields[1:], self[1:]))
        return f"a {self.kernel[0]}x{self.kernel[1]} convolution of {names}"


class Call(NamedTuple):
    """What the choice depends on."""

    device: str
    dtype: torch.dtype
    cell: Pair  # sites of an input cell
    window: Window
    groups: int
    channels: int
    out_channels: int
    depthwise: bool  # depthwise_cells serves it

    @property
    def inside(self) -> bool:
        """No tap leaves its own cell."""
        return not any(self.window.halo)

    @property
    def out_cell(self) -> int:
        """The shorter side of an output cell."""
        return min(size // s for size, s in zip(self.cell, self.window.stride))


TABLE = _dispatch_data.DATA.conv


def unavailable(route: str, call: Call) -> str | None:
    """Why `route` cannot serve the call whatever the backend, or None."""
    if route == "rows" and not call.inside:
        return f"{call.window} reads {call.window.halo} sites (top, left, bottom, right) beyond its cell"
    if route == "depthwise" and not call.depthwise:
        return "depthwise_cells takes a 3x3, 5x5 or 7x7 kernel for each channel, undilated, padding k // 2"
    if route == "implicit" and call.groups > 1:
        return f"implicit_conv has no groups, and the weight has {call.groups}"
    if route in RAW:
        if call.window.radius(call.cell) > MAX_RADIUS:
            return f"{call.window} reads more than {MAX_RADIUS} cells away"
        if call.window.kernel[0] * call.window.kernel[1] > (2 * MAX_RADIUS + 1) ** 2:
            return f"{call.window} has more than {(2 * MAX_RADIUS + 1) ** 2} taps"
    return None


def choose(call: Call, backend: str | None, asked: str | None) -> tuple[str, str]:
    """(backend, route) of a call; `backend` and `asked` are the caller's own arguments."""
    forced = _dispatch.check_name(backend, "backend") or _dispatch.forced()
    if asked is not None:
        if (reason := unavailable(asked, call)) is not None:
            raise ValueError(f"route {asked!r} was asked for, but conv_cells cannot use it: {reason}")
        if asked not in RAW:
            return "reference", asked
        name = _dispatch.choose(RAW[asked], call.device, call.dtype, backend)
        if name == "reference":
            reason = "the reference backend has no kernels for it"
            if forced is None and asked == "implicit":
                reason = _dispatch.unavailable(RAW[asked], "triton", call.device, call.dtype)
            raise RuntimeError(f"route {asked!r} was asked for, but conv_cells cannot use it: {reason}")
        return name, asked
    if forced == "reference":
        return "reference", "reference"
    if call.depthwise:
        return "reference", "depthwise"
    if call.inside:
        return "reference", "rows"
    for rule in TABLE:
        fits = rule.device == call.device and rule.grouped == (call.groups > 1) and call.out_cell >= rule.smallest
        if fits and unavailable(rule.route, call) is None:
            if rule.route not in RAW:
                break
            name = _dispatch.choose(RAW[rule.route], call.device, call.dtype, backend)
            if name != "reference":
                return name, rule.route
    return "reference", "dense"


def why(device: str) -> list[tuple[str, str]]:
    """(route, reason) of the rules for "cpu" or "cuda", in order, for `maefast doctor`."""
    if (name := _dispatch.forced()) is not None:
        return [(name, "forced")]
    rows = [("rows", "no tap leaves its cell (1x1, kernel = stride): one matrix product")]
    rows.append(("depthwise", "a kernel for each channel: depthwise_cells, at stride 1"))
    for rule in TABLE:
        known = rule.route not in RAW or _dispatch.choose(RAW[rule.route], device) != "reference"
        if rule.device != device or not known:
            continue
        size = f"from {rule.smallest} x {rule.smallest}" if rule.smallest > 1 else "smaller"
        rows.append((rule.route, f"{'grouped, ' if rule.grouped else ''}cells {size}: {rule.why}"))
    rows.append(("dense", "everything else, on the whole map"))
    chosen = any(rule.route == "implicit" for rule in TABLE if rule.device == device)
    if not chosen and _dispatch.choose(RAW["implicit"], device) == "triton":
        rows.append(("implicit", "never chosen, only route='implicit': taps read inside a Triton kernel; not measured"))
    return rows

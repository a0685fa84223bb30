"""How a convolution over packed cells is computed: one table, from measurements (`dispatch_data.json`), printed
by `maefast doctor`.

A rule applies to cells (of the output) from its size on; the first that applies wins.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from maefast.ops import _dispatch, _dispatch_data

Sides = tuple[int, ...]  # one of each side of a map: (rows, columns), or (planes, rows, columns)

ROUTES = ("rows", "depthwise", "halo", "taps", "dense", "implicit")
# The routes with kernels of ours, and the op that decides.
RAW = {"halo": "halo_cells", "taps": "gather_taps", "implicit": "implicit_conv"}
MAX_RADIUS = {2: 7, 3: 3}  # of a neighbour table, by the sides of the map: csrc/cpu/sparse_conv_kernel.h


class Window(NamedTuple):
    """Where a convolution reads: (rows, columns) each, or (planes, rows, columns). No properties here and in `Call`:
    torch 2.10 does not compile those of a NamedTuple."""

    kernel: Sides
    stride: Sides
    padding: Sides
    dilation: Sides

    def span(self) -> Sides:
        """Sites from the first tap to the last one."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation))

    def halo(self) -> Sides:
        """(top, left, bottom, right) sites around a cell that its own outputs read; in volumes (front, top, left,
        back, bottom, right)."""
        after = (max(0, n - p - s) for n, p, s in zip(self.span(), self.padding, self.stride))
        return *self.padding, *after

    def radius(self, cell: Sides) -> int:
        """How many cells away the halo reaches."""
        return max(-(-n // size) for n, size in zip(self.halo(), cell * 2))

    def __str__(self) -> str:
        one = lambda sides: str(sides[0]) if len(set(sides)) == 1 else str(sides)  # noqa: E731
        names = ", ".join(f"{name} {one(sides)}" for name, sides in zip(self._fields[1:], self[1:]))
        return f"a {'x'.join(map(str, self.kernel))} convolution of {names}"


class Reach(NamedTuple):
    """Of one side: the taps that read a map, and the zeros around it that they read, too (less than none: cut off)."""

    first: int
    count: int
    before: int
    after: int


def reaching(n: int, outputs: int, k: int, stride: int, padding: int, dilation: int) -> Reach:
    """For a map of n sites; one tap that reads zeros alone where none reads the map."""
    last_output = (outputs - 1) * stride
    first, last = max(0, -(-(padding - last_output) // dilation)), min(k - 1, (n - 1 + padding) // dilation)
    before = padding - first * dilation
    if first > last:
        first = last = min(first, k - 1)
        before = -n
    return Reach(first, last - first + 1, before, last_output + (last - first) * dilation + 1 - n - before)


class Call(NamedTuple):
    """What the choice depends on."""

    device: str
    dtype: torch.dtype
    cell: Sides  # of an input cell, in sites
    window: Window
    groups: int
    channels: int
    out_channels: int
    depthwise: bool  # depthwise_cells serves it

    def inside(self) -> bool:
        """No tap leaves its own cell."""
        return not any(self.window.halo())

    def solid(self) -> bool:
        """Whether maps have depth."""
        return len(self.cell) == 3

    def out_cell(self) -> int:
        """The shorter side of an output cell."""
        return min(size // s for size, s in zip(self.cell, self.window.stride))


TABLE = _dispatch_data.DATA.conv


def unavailable(route: str, call: Call) -> str | None:
    """Why `route` cannot serve the call whatever the backend, or None."""
    if route == "rows" and not call.inside():
        where = "front, top, left, back, bottom, right" if call.solid() else "top, left, bottom, right"
        return f"{call.window} reads {call.window.halo()} sites ({where}) beyond its cell"
    if route == "depthwise" and not call.depthwise:
        return "depthwise_cells takes a 3x3, 5x5 or 7x7 kernel for each channel, undilated, padding k // 2"
    if route == "implicit" and call.solid():
        return "implicit_conv takes maps of two sides"
    if route == "implicit" and call.groups > 1:
        return f"implicit_conv has no groups, and the weight has {call.groups}"
    if route in RAW:
        most = MAX_RADIUS[len(call.cell)]
        if call.window.radius(call.cell) > most:
            return f"{call.window} reads more than {most} cells away"
        if math.prod(call.window.kernel) > (2 * most + 1) ** len(call.cell):
            return f"{call.window} has more than {(2 * most + 1) ** len(call.cell)} taps"
    return None


def choose(call: Call, backend: str | None, asked: str | None) -> tuple[str, str]:
    """(backend, route) of a call; `backend` and `asked` are the caller's own arguments."""
    forced = _dispatch.check_name(backend, "backend") or _dispatch.forced()
    if asked is not None:
        if (reason := unavailable(asked, call)) is not None:
            raise ValueError(f"route {asked!r} was asked for, but conv_cells cannot use it: {reason}")
        if asked not in RAW:
            return "reference", asked
        name = _dispatch.choose(RAW[asked], call.device, call.dtype, backend, solid=call.solid())
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
    if call.inside():
        return "reference", "rows"
    for rule in TABLE:
        fits = rule.device == call.device and rule.sides == len(call.cell) and call.out_cell() >= rule.smallest
        fits = fits and rule.grouped == (call.groups > 1) and rule.strided in (None, max(call.window.stride) > 1)
        if fits and unavailable(rule.route, call) is None:
            if rule.route not in RAW:
                break
            name = _dispatch.choose(RAW[rule.route], call.device, call.dtype, backend, solid=call.solid())
            if name != "reference":
                return name, rule.route
    return "reference", "dense"


def why(device: str) -> list[tuple[str, str]]:
    """(route, reason) of the rules for "cpu" or "cuda", in order, for `maefast doctor`."""
    if (name := _dispatch.forced()) is not None:
        return [(name, "forced")]
    rows = [("rows", "no tap leaves its cell (1x1, kernel = stride): one matrix product")]
    rows.append(("depthwise", "a kernel for each channel of a flat map: depthwise_cells, at stride 1"))
    for rule in TABLE:
        solid = rule.sides == 3
        known = rule.route not in RAW or _dispatch.choose(RAW[rule.route], device, solid=solid) != "reference"
        if rule.device != device or not known:
            continue
        size = "from " + " x ".join([str(rule.smallest)] * rule.sides) if rule.smallest > 1 else "smaller"
        kind = "grouped, " * rule.grouped + "volumes, " * solid + ("no stride, " if rule.strided is False else "")
        rows.append((rule.route, f"{kind}cells {size}: {rule.why}"))
    rows.append(("dense", "everything else, on the whole map"))
    chosen = any(rule.route == "implicit" for rule in TABLE if rule.device == device)
    if not chosen and _dispatch.choose(RAW["implicit"], device) == "triton":
        rows.append(("implicit", "never chosen, only route='implicit': taps read inside a Triton kernel; not measured"))
    return rows

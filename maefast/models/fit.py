"""Fitting weights to a model: another grid, another patch, other channels, an encoder alone.

What does not fit as it is, is changed as said here, and each change is told in one line:

    fixed (sin-cos) tables    stay the model's own, whatever the file has
    learned tables            interpolated (bicubic) to the model's grid
    patch embedding           other patches: FlexiViT's pseudo-inverse; other channels: summed or repeated
    pixel predictions         start fresh where they predict other pixels
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from maefast.models.convert import encoder_prefix, encoder_state
from maefast.models.convnames import UNUSED
from maefast.models.resize import change_channels, resize_patches, resize_positions, sincos_grid

Grid = tuple[int, int]
_TABLES = ("pos_embed", "decoder_pos_embed")
_FIRST = ("patch_embed.proj.weight", "conv1.weight", "downsample_layers.0.0.weight")
_LAST = ("decoder_pred.", "pred.", "dense_decoder.proj.")


def fit_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor], part: str = "all") -> dict[str, Tensor]:
    """`state` (see `read_state_dict`) completed by what it does not bring to a model with the state dict `own`.

    Args:
        part: "all": only the buffers of SparK that nothing reads come from `own`. "encoder": the encoder from `state`,
            bare or inside a whole model, everything else from `own`.
    """
    out = dict(state)
    if part == "encoder":
        prefix = encoder_prefix(own)
        out = {prefix + key: value for key, value in encoder_state(state).items()}
        encoder = {prefix + key for key in encoder_state(own)}
        out.update({key: value for key, value in own.items() if key not in encoder})
    out.update({key: own[key] for key in UNUSED if key in own})
    return out


def file_grid(state: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> tuple[Grid | None, bool]:
    """(grid, whether it is certain) of a ViT's position tables.

    Certain is what the file's configuration says and what a sin-cos table shows; a square number of patches is taken
    for a square. None: not to be told.
    """
    if config and "img_size" in config and "patch_size" in config:
        sizes = [(v, v) if isinstance(v, int) else tuple(v) for v in (config["img_size"], config["patch_size"])]
        return tuple(size // patch for size, patch in zip(*sizes)), True
    for name in _TABLES:
        if name in state and (grid := sincos_grid(state[name])):
            return grid, True
    count = state["pos_embed"].shape[1] - 1
    side = math.isqrt(count)
    return ((side, side), False) if side * side == count else (None, False)


def fit_to_model(
    state: Mapping[str, Tensor],
    model: nn.Module,
    part: str = "all",
    *,
    config: Mapping[str, Any] | None = None,
    exact: bool = False,
) -> tuple[dict[str, Tensor], list[str]]:
    """`fit_state` for `model`, with tables, patches and channels made to fit it; and a line about each change.

    Args:
        config: the arguments that the file gives for its own model, if it does.
        exact: change nothing: what does not fit is left as it is, for the caller to refuse.

    Raises:
        ValueError: learned positions whose layout the file does not tell, for a model of another number of patches;
        another number of heads, which the shapes do not show.
    """
    own = model.state_dict()
    out, lines = fit_state(state, own, part), _differences(config or {}, getattr(model, "config", None) or {}, part)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in _TABLES:
        if set(out) <= set(own) and name in out and out[name] is not own[name]:  # else the caller names what is unknown
            grid = tuple(model.grid_size)
            fixed = name not in trained and sincos_grid(own[name]) == grid
            out[name], line = _table(out[name], own[name], grid, fixed, file_grid(state, config), exact)
            lines += [f"{name}: {line}"] if line else []
    if exact:
        return out, lines
    prefix = encoder_prefix(own)
    for name in (prefix + first for first in _FIRST):
        if name in out and name in own and out[name].shape != own[name].shape:
            out[name] = _first(name, out[name], own[name], lines)
    for name in [name for name in out if name.startswith(_LAST) and name in own]:
        if out[name].shape[0] != own[name].shape[0] and out[name].shape[1:] == own[name].shape[1:]:
            was, now = out[name].shape[0], own[name].shape[0]
            out[name] = own[name]
            if name.endswith("weight"):
                lines.append(f"{name.removesuffix('.weight')} starts fresh: it predicts {now} values, the file's {was}")
    return out, lines


def _differences(file: Mapping[str, Any], model: Mapping[str, Any], part: str) -> list[str]:
    """Lines about what differs between two configurations, and shows in no shape."""
    lines = []
    for key in ("num_heads", "decoder_num_heads", "norm_eps", "norm_pix_loss"):
        if file.get(key) == model.get(key) or None in (file.get(key), model.get(key)):
            continue
        if key.endswith("num_heads") and (part == "all" or key == "num_heads"):
            raise ValueError(f"{key} is {file[key]} in the file and {model[key]} in the model")
        if key == "norm_eps" or (key == "norm_pix_loss" and part == "all"):
            lines.append(f"{key} is {model[key]} in the model, and was {file[key]} in the file's")
    return lines


def _table(
    table: Tensor, own: Tensor, grid: Grid, fixed: bool, layout: tuple[Grid | None, bool], exact: bool
) -> tuple[Tensor, str | None]:
    """The position table that a model with the table `own` of `grid` gets, and what to tell about it."""
    found, certain = layout
    sincos, same = sincos_grid(table), table.shape == own.shape
    if fixed and sincos:
        line = f"the model's own table of {_by(grid)} patches stays; the file's is of {_by(sincos)}"
        return own, line if sincos != grid else None
    if same and found == grid:
        return table, "the file's is not sin-cos; it is taken as it is, and stays fixed" if fixed else None
    if fixed:
        return own, "the model's own stays; the file's is not sin-cos: a model with positions='learned' would take it"
    if exact or table.shape[2] != own.shape[2]:
        return table, "taken as it is, though it may be of another layout" if same else None
    if found is None:
        raise ValueError(
            f"nothing tells how the {table.shape[1] - 1} patches of its learned positions lie (they are no square): "
            "give a file with its configuration, or take only what fits exactly"
        )
    guess = "" if certain else " (taken for a square)"
    line = f"learned table interpolated from {_by(found)}{guess} to {_by(grid)} patches, bicubic"
    return resize_positions(table, found, grid), line


def _first(name: str, weight: Tensor, own: Tensor, lines: list[str]) -> Tensor:
    if weight.ndim != 4 or weight.shape[0] != own.shape[0]:
        return weight
    if weight.shape[1] != own.shape[1]:
        how = "summed" if own.shape[1] == 1 else "repeated, and scaled by their number"
        lines.append(f"{name}: {weight.shape[1]} channels to {own.shape[1]}, {how}")
        weight = change_channels(weight, own.shape[1])
    if weight.shape[2:] != own.shape[2:] and name == "patch_embed.proj.weight":
        old, new = tuple(weight.shape[2:]), tuple(own.shape[2:])
        lines.append(f"{name}: patches of {_by(old)} to {_by(new)} pixels, by the pseudo-inverse (FlexiViT)")
        weight = resize_patches(weight, new)
    return weight


def _by(size: Grid) -> str:
    return f"{size[0]} x {size[1]}"

"""Fitting weights to a model: another grid, another patch, other channels, an encoder alone.

What does not fit as it is, is changed as said here, and each change is told in one line:

    fixed (sin-cos) tables    stay the model's own where the file's is sin-cos too, of whatever grid
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
from maefast.models.resize import Grid, change_channels, resize_patches, resize_positions, sincos_grid

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

    Certain is what a sin-cos table shows and what the file's configuration says, if it fits the number of patches; a
    square number of patches is taken for a square. None: not to be told.
    """
    for name in _TABLES:
        if name in state and (grid := sincos_grid(state[name])):
            return grid, True
    count = state["pos_embed"].shape[1] - 1
    if config and config.get("img_size") and config.get("patch_size"):
        sizes = [(v, v) if isinstance(v, int) else tuple(v) for v in (config["img_size"], config["patch_size"])]
        grid = tuple(size // patch for size, patch in zip(*sizes))
        if math.prod(grid) == count:
            return grid, True
    side = math.isqrt(max(0, count))
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
        exact: change nothing. What does not fit by its shape is left as it is, for the caller to refuse.

    Raises:
        ValueError: learned positions whose layout the file does not tell, for a model of another number of patches;
        another number of heads, which the shapes do not show; with `exact`, tables of another grid; integers.
    """
    own = model.state_dict()
    out, lines = fit_state(state, own, part), _differences(config or {}, _facts(model), part)
    for name, value in out.items():
        if name in own and own[name].is_floating_point() and not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype} in the file: weights are floating-point numbers")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in _TABLES:
        if set(out) <= set(own) and name in out and out[name] is not own[name]:  # else the caller names what is unknown
            if out[name].ndim != 3 or out[name].shape[::2] != own[name].shape[::2]:
                continue  # another width: refused by its shape
            grid = tuple(model.grid_size)
            fixed = name not in trained and sincos_grid(own[name]) == grid
            try:
                out[name], line = _table(out[name], own[name], grid, fixed, file_grid(state, config), exact)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
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


def _facts(model: nn.Module) -> dict[str, Any]:
    """What a model computes and no shape shows."""
    if config := getattr(model, "config", None):
        return dict(config)
    blocks, norm = getattr(model, "blocks", None), getattr(model, "norm", None)  # an encoder alone
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None
    return {"num_heads": heads, "norm_eps": getattr(norm, "eps", None)}


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
    if exact and certain and found != grid:
        raise ValueError(f"of {_by(found)} patches in the file, and of {_by(grid)} in the model")
    if fixed and sincos:
        line = f"the model's own table of {_by(grid)} patches stays; the file's is of {_by(sincos)}"
        return own, line if sincos != grid else None
    if same and (found == grid or not certain):
        unknown = "" if certain else " (the file does not tell how its patches lie)"
        if fixed:
            return table, f"the file's is not sin-cos; it is taken as it is{unknown}, and stays fixed"
        return table, None if certain else f"learned positions are taken as they are{unknown}"
    if exact:
        return table, None  # refused by its shape
    if fixed:
        return own, "the model's own stays; the file's is not sin-cos: a model with positions='learned' would take it"
    if found is None:
        raise ValueError(
            f"nothing tells how the {table.shape[1] - 1} patches of these learned positions lie (they are no square): "
            "give a file with its configuration"
        )
    guess = "" if certain else " (taken for a square)"
    line = f"learned table interpolated from {_by(found)}{guess} to {_by(grid)} patches, bicubic"
    return resize_positions(table, found, grid), line


def _first(name: str, weight: Tensor, own: Tensor, lines: list[str]) -> Tensor:
    if weight.ndim != 4 or weight.shape[0] != own.shape[0]:
        return weight
    old, new = weight.shape[1], own.shape[1]
    if old != new:
        how = "summed" if new < old else "repeated, each divided by how often"
        lines.append(f"{name}: {old} channels to {new}, {how}")
        weight = change_channels(weight, new)
    if weight.shape[2:] != own.shape[2:] and name == "patch_embed.proj.weight":
        sizes = _by(weight.shape[2:]), _by(own.shape[2:])
        lines.append(f"{name}: patches of {sizes[0]} to {sizes[1]} pixels, by the pseudo-inverse (FlexiViT)")
        weight = resize_patches(weight, tuple(own.shape[2:]))
    return weight


def _by(size: Grid) -> str:
    return f"{size[0]} x {size[1]}"

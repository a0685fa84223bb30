"""Learning rates that fall from the head to the input by a factor a layer (Clark et al., 2020; BEiT)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_NO_DECAY = ("cls_token", "pos_embed")


def layers_by_start(network: nn.Module, starts: Mapping[str, int]) -> dict[str, int]:
    """The layer of each parameter, that of the first beginning that its name has; 0 without one."""
    names = (name for name, _ in network.named_parameters())
    return {name: next((at for start, at in starts.items() if name.startswith(start)), 0) for name in names}


def decayed_groups(
    network: nn.Module, layers: Mapping[str, int], last: int, weight_decay: float, layer_decay: float
) -> list[dict]:
    """AdamW's groups: the rate of layer i of the last n is multiplied by layer_decay ** (n - i), as "lr_scale".

    Vectors, biases, scales (`gamma`, `beta`), the class token and positions have no weight decay.

    Args:
        network: of whose parameters those that are trained count. layers: the layer of each by its name. last: the
            number of the last layer, the head. weight_decay: of matrices. layer_decay: in (0, 1]; 1: one rate for all.
    """
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        small = parameter.ndim <= 1 or name.endswith((".bias", ".gamma", ".beta"))
        decays = not (small or name.rsplit(".", 1)[-1] in _NO_DECAY)
        layer = layers[name]
        rule = {"weight_decay": weight_decay if decays else 0.0, "lr_scale": layer_decay ** (last - layer)}
        groups.setdefault((layer, decays), {"params": [], **rule})["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]

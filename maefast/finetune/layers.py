"""The layers of classifiers, whose learning rates fall towards the input, and the values that papers fine-tune with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from maefast.models import MaskedAutoencoder, MaskedAutoencoderViT
from maefast.models.convnext import ConvNeXt
from maefast.models.resnet import ResNet
from maefast.nn.layer_decay import decayed_groups, layers_by_start

_GROUPED = 9  # blocks of a third stage that are layers of their own; of longer ones three are one


@dataclass(frozen=True)
class Published:
    """How one size was fine-tuned on ImageNet-1k. `warmup` is a share of the run. `source`: where it says so."""

    epochs: float
    blr: float
    layer_decay: float
    weight_decay: float
    drop_path: float
    warmup: float
    mixup: float
    cutmix: float
    smoothing: float
    ema_decay: float
    source: str


_MAE, _V2, _SPARK = "facebookresearch/mae", "facebookresearch/ConvNeXt-V2", "keyu-tian/SparK"
_VIT = {
    768: Published(100, 5e-4, 0.65, 0.05, 0.1, 0.05, 0.8, 1.0, 0.1, 0.0, f"{_MAE}, ViT-B"),
    1024: Published(50, 1e-3, 0.75, 0.05, 0.2, 0.1, 0.8, 1.0, 0.1, 0.0, f"{_MAE}, ViT-L"),
    1280: Published(50, 1e-3, 0.75, 0.05, 0.3, 0.1, 0.8, 1.0, 0.1, 0.0, f"{_MAE}, ViT-H"),
}
_CONVNEXT_V2 = {
    40: Published(600, 2e-4, 0.9, 0.3, 0.1, 0.0, 0.0, 0.0, 0.2, 0.9999, f"{_V2}, atto"),
    96: Published(300, 8e-4, 0.9, 0.05, 0.2, 40 / 300, 0.8, 1.0, 0.1, 0.9999, f"{_V2}, tiny"),
    128: Published(100, 6.25e-4, 0.6, 0.05, 0.1, 0.2, 0.8, 1.0, 0.1, 0.9999, f"{_V2}, base"),
}
_SPARK_VALUES = {
    "small": Published(400, 2e-4, 0.7, 0.01, 0.3, 0.05, 0.8, 0.0, 0.1, 0.9999, f"{_SPARK}, ConvNeXt-S"),
    "base": Published(400, 1e-4, 0.7, 0.01, 0.4, 0.05, 0.8, 0.0, 0.1, 0.9999, f"{_SPARK}, ConvNeXt-B"),
    "large": Published(200, 1e-4, 0.7, 0.02, 0.5, 0.05, 0.8, 0.0, 0.1, 0.9999, f"{_SPARK}, ConvNeXt-L"),
    # Published with LAMB and a rate of 2e-3; here AdamW takes the rate of ConvNeXt-S.
    "resnet50": Published(300, 2e-4, 0.7, 0.02, 0.05, 5 / 300, 0.1, 0.0, 0.1, 0.9999, f"{_SPARK}, ResNet-50"),
    "resnet101": Published(300, 2e-4, 0.8, 0.02, 0.2, 5 / 300, 0.1, 0.0, 0.1, 0.9999, f"{_SPARK}, ResNet-101"),
}


def published(model: MaskedAutoencoder) -> Published:
    """The values of the published size that is the nearest below (or else the smallest)."""
    config = model.config
    if isinstance(model, MaskedAutoencoderViT):
        return _nearest(_VIT, config["embed_dim"])
    if "widths" in config:
        return _nearest(_CONVNEXT_V2, config["widths"][0])
    return _SPARK_VALUES.get(config["encoder"].removeprefix("convnext_"), _SPARK_VALUES["small"])


def _nearest(values: dict[int, Published], width: int) -> Published:
    return values[max((known for known in values if known <= width), default=min(values))]


def layers_of(network: nn.Module) -> tuple[dict[str, int], int]:
    """(the layer of each parameter by its name, the number of the last layer, which is the head).

    ViT: patches, class token and positions are layer 0, each block one more (MAE). ConvNeXt: each block is a layer,
    and what lies before a stage goes with its first one; with a third stage of more than 9 blocks all of it is 12
    layers (ConvNeXt V2's "single" and "group"). ResNet: the stem is layer 0, each block one more.
    """
    names = [name for name, _ in network.named_parameters()]
    if isinstance(network, ConvNeXt):
        depths = [len(stage) for stage in network.stages]
        if depths[2] > _GROUPED:
            return {name: _grouped(name) for name in names}, 13
        return {name: _single(name, depths) for name in names}, sum(depths) + 1
    if isinstance(network, ResNet):
        blocks = [f"layer{i + 1}.{j}." for i in range(network.num_stages)
                  for j in range(len(getattr(network, f"layer{i + 1}")))]  # fmt: skip
        rest, last = {"fc.": len(blocks) + 1}, len(blocks) + 1
    else:
        blocks = [f"blocks.{i}." for i in range(len(network.blocks))]
        rest, last = {"fc_norm.": len(blocks) + 1, "head.": len(blocks) + 1}, len(blocks) + 1
    starts = {**{block: place for place, block in enumerate(blocks, 1)}, **rest}
    return layers_by_start(network, starts), last


def _single(name: str, depths: list[int]) -> int:
    part, *numbers = name.split(".")
    if part == "downsample_layers":
        return sum(depths[: int(numbers[0])]) + 1
    if part == "stages":
        return sum(depths[: int(numbers[0])]) + int(numbers[1]) + 1
    return sum(depths) + 1


def _grouped(name: str) -> int:
    part, *numbers = name.split(".")
    if part not in ("downsample_layers", "stages"):
        return 13
    stage = int(numbers[0])
    if stage == 3:
        return 12
    if part == "downsample_layers":
        return 0 if stage == 0 else stage + 1
    return min(12, 3 + int(numbers[1]) // 3) if stage == 2 else stage + 1


def parameter_groups(network: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """See `decayed_groups`."""
    layers, last = layers_of(network)
    return decayed_groups(network, layers, last, weight_decay, layer_decay)

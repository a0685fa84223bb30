"""Adapters around linear layers and patch convolutions, put in before and after: LoRA, as peft puts it in."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import maefast
from tests.integrations import test_hf_videomae, test_hf_vitmae, test_jepa, test_mae, test_timm_vit, test_videomae
from tests.integrations.common import gradient_error, relative, tensors


class Adapter(nn.Module):
    """base_layer(x) + up(down(x)); of a convolution too. Like peft's, it shows the weight of the layer, and no more."""

    def __init__(self, base: nn.Linear | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.base_layer = base
        if isinstance(base, nn.Linear):
            self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)
        else:
            kind = type(base)
            self.down = kind(base.in_channels, 2, base.kernel_size, base.stride)
            self.up = kind(2, base.out_channels, 1)
        self.to(base.weight)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def adapt(model: nn.Module) -> int:
    """All linear layers and convolutions; how many."""
    torch.manual_seed(5)
    parts = [(name, part) for name, part in model.named_modules() if type(part) in (nn.Linear, nn.Conv2d, nn.Conv3d)]
    for name, part in parts:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Adapter(part))
    return len(parts)


FAMILIES = {
    "mae": test_mae.TestMAE,
    "hf_vitmae": test_hf_vitmae.TestViTMAE,
    "hf_videomae": test_hf_videomae.TestVideoMAE,
    "videomae": test_videomae.TestV1,
    "ijepa": test_jepa.TestImages,
    "vjepa": test_jepa.TestVideos,
    "timm": test_timm_vit.TestPatchDropout,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", FAMILIES)
def test_adapters(name, when):
    family = FAMILIES[name]()
    model = family.build(torch.float64)
    fast = copy.deepcopy(model)
    if when == "after":
        maefast.accelerate(fast)
    assert adapt(model) == adapt(fast) > 4
    if when == "before":
        maefast.accelerate(fast)
        report = maefast.report(fast)
        assert set(family.families) <= set(report.families)  # recognised all the same
        assert any("blocks" in note.path or "layer" in note.path for note in report.replaced)
        kept = [note.text for note in report.kept]
        assert any("Adapter" in text or "patch embedding" in text for text in kept) or name == "timm", report
        assert "the attention is watched or adapted" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outs = [family.call(net, torch.float64) for net in (model, fast)]
    for want, got in zip(*map(tensors, outs), strict=True):
        assert relative(got, want) < 1e-10
    for out in outs:
        family.loss(out).backward()
    assert gradient_error(fast, model) < 1e-9


def test_peft():
    """The real one, where it is installed."""
    peft = pytest.importorskip("peft")
    family = test_mae.TestMAE()
    model = family.build(torch.float64)
    fast = maefast.accelerate(copy.deepcopy(model))
    config = peft.LoraConfig(target_modules=["qkv", "proj"])
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    fast = peft.get_peft_model(fast, config)
    again = maefast.accelerate(copy.deepcopy(model))
    for net in (model, fast, again):
        family.loss(family.call(net, torch.float64)).backward()
    assert gradient_error(fast, model) < 1e-9
    assert gradient_error(again, model) < 1e-9

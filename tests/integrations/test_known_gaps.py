"""Cases in which an accelerated model is known not to follow its own code; docs/drop-in.md names them. Each is strict:
mending one asks for its removal here and there."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from torch import nn

import maefast
from maefast.bench.peers.public.mae import PatchEmbed
from maefast.bench.peers.public.timm_vit import Block
from maefast.integrations import _worth
from tests.integrations import blocks, test_hf_vitmae
from tests.integrations.common import agree, both
from tests.integrations.test_guards import build, pair, same

gap = pytest.mark.xfail(strict=True, raises=(AssertionError, ValueError))


@pytest.fixture(autouse=True)
def always():
    with _worth.always():
        yield


class Gain(PatchEmbed):
    def forward(self, x):
        return super().forward(x) * self.gain


class Thin(Gain):
    def forward(self, x):
        return super().forward(x)


@gap
def test_what_a_method_behind_super_reads():
    model = build()
    model.patch_embed.__class__ = Thin
    model.patch_embed.gain = 1.0
    fast = maefast.accelerate(copy.deepcopy(model))
    model.patch_embed.gain = fast.patch_embed.gain = 2.0
    same(model, fast)


@gap
def test_a_method_put_into_the_object_before_it_is_compiled():
    torch._dynamo.reset()
    model, fast = pair()
    for net in (model, fast):
        net.patchify = MethodType(lambda self, x: 1.0 - type(self).patchify(self, x), net)
    same(model, torch.compile(fast, backend="aot_eager"))


@gap
def test_a_mask_that_a_hook_on_the_encoder_changes():
    models = test_hf_vitmae.pair()

    def half(module, given, out):
        out.mask = out.mask * (torch.arange(16) < 8)
        return out

    for model in models:
        model.vit.register_forward_hook(half)
    want, got = both(models, test_hf_vitmae.images())
    agree(want.loss, got.loss)


class TokenLayerScale(nn.Module):
    """No factor of a channel, whatever its name says."""

    def forward(self, x):
        return x * x.mean(-1, keepdim=True).sigmoid()


@gap
def test_a_part_with_the_name_of_a_layer_scale_put_in_later():
    block = blocks.build(Block(blocks.DIM))
    fast = blocks.accelerated(block)
    for net in (block, fast):
        net.ls1 = TokenLayerScale()
    blocks.compare(block, fast)


@gap
def test_a_layer_scale_of_one_number():
    from tests.integrations.test_hf_layouts import inputs
    from tests.integrations.test_hf_layouts import pair as pair_of
    from tests.integrations.test_hf_layouts import same as same_of

    model, fast = pair_of("Beit")
    for net in (model, fast):
        net.layers[0].lambda_1 = nn.Parameter(torch.tensor(0.5).double())
    same_of(model, fast, inputs("Beit"))

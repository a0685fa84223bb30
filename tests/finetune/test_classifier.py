"""Classifiers against the same in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import models
from maefast.finetune.classifier import HEAD_STD, classifier_of, head_of, timm_state
from tests.train.common import FCMAE, TINY, toy_spark


def tiny(kind: str) -> nn.Module:
    """In float64, with weights that no initialisation gives."""
    torch.manual_seed(0)
    if kind == "mae":
        made = models.create("mae", **{**TINY, "depth": 3}, img_size=16, patch_size=4)
    elif kind == "fcmae":
        made = models.create("fcmae", **FCMAE, img_size=64)
    else:
        made = models.create(kind, img_size=32, decoder_width=32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.double()


def plain_vit(x: Tensor, state: dict[str, Tensor], heads: int) -> Tensor:
    """As MAE's fine-tuning code computes it with a global pool, without drop path."""
    patches = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    for i in range(3):
        name = f"blocks.{i}"
        qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x)).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + linear(f"{name}.attn.proj", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))))
    return linear("head", norm("fc_norm", x[:, 1:].mean(1)))


def test_a_vit_is_the_plain_one_with_its_gradients():
    network = classifier_of(tiny("mae"), 5).double()
    head_of(network).weight.data.normal_()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    state = {key: value.detach().clone().requires_grad_() for key, value in network.state_dict().items()}
    one, two = network(images), plain_vit(images, state, 2)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    one.square().sum().backward()
    two.square().sum().backward()
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert found.keys() == state.keys()  # positions learn too, and nothing of the decoder is left
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, state[name].grad, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("kind", ["fcmae", "spark_convnext_tiny", "spark_resnet50"])
def test_a_convnet_pools_the_features_of_its_encoder(kind):
    model = tiny(kind).eval()
    network = classifier_of(model, 4).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)[..., : model.img_size[0], : model.img_size[1]]
    with torch.no_grad():
        maps = model.encode(images)
        pooled = (maps if isinstance(maps, Tensor) else maps[-1]).mean((2, 3))
        if kind != "spark_resnet50":
            pooled = F.layer_norm(pooled, pooled.shape[-1:], network.norm.weight, network.norm.bias, 1e-6)
        head_of(network).weight.normal_()
        torch.testing.assert_close(network(images), head_of(network)(pooled), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["mae", "fcmae", "spark_resnet50"])
def test_the_head_starts_near_zero(kind):
    head = head_of(classifier_of(tiny(kind), 200))
    assert not head.bias.any()
    assert head.weight.std().item() == pytest.approx(HEAD_STD * 0.88, rel=0.1)  # cut at two of its standard deviations
    assert head.weight.abs().max() <= 2 * HEAD_STD


def test_names_of_timm():
    names = timm_state(classifier_of(tiny("mae"), 5)).keys()
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "fc_norm.weight", "head.weight"} <= names
    assert not {name for name in names if name.startswith(("norm.", "decoder", "mask_token"))}
    assert {"head.norm.weight", "head.fc.bias", "stem.0.weight"} <= timm_state(classifier_of(tiny("fcmae"), 5)).keys()
    assert {"fc.weight", "layer1.0.conv1.weight"} <= timm_state(classifier_of(tiny("spark_resnet50"), 5)).keys()


@pytest.mark.parametrize("kind", ["mae", "fcmae"])
def test_drop_path(kind):
    """Rates rise linearly; over many draws the mean of what is dropped and scaled is what is there."""
    network = classifier_of(tiny(kind), 5, drop_path=0.5).double()
    if kind == "mae":
        assert [block.drop_path for block in network.blocks] == [0.0, 0.25, 0.5]
        block, x = network.blocks[2], torch.randn(1, 4, 16, dtype=torch.float64)
    else:
        rates = [getattr(stage[0].drop_path, "rate", 0.0) for stage in network.stages]
        assert rates == pytest.approx([0.0, 0.5 / 3, 1 / 3, 0.5])
        block, x = network.stages[3][0], torch.randn(1, 16, 3, 3, dtype=torch.float64)
    torch.manual_seed(1)
    with torch.no_grad():
        many = x.repeat(4000, *[1] * (x.ndim - 1))
        out = block.train()(many)
        same = (out == many).flatten(1).all(1).double().mean().item()
        whole = block.eval()(x)
    assert same == pytest.approx(0.25 if kind == "mae" else 0.5, abs=0.03)  # two branches, or one
    if kind == "fcmae":
        torch.testing.assert_close(out.mean(0), whole[0], rtol=0, atol=0.05 * (whole - x).abs().max().item())


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="mae_\\*, spark_\\* and fcmae_\\* models become classifiers, not a SparK"):
        classifier_of(toy_spark("toy"), 3)

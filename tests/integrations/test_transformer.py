"""Transformer blocks by themselves: every layout, every kind of input."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import maefast
from maefast.bench.peers.public.timm_vit import Block
from tests.integrations.blocks import DIM, accelerated, build, compare, is_fast, is_fused, pretend, tokens
from tests.integrations.common import gradient_error, relative

# --- layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"init_values": 1e-5}, True),
        ({"init_values": 0.1, "inplace": True}, True),
        ({"drop_path": 0.5}, True),
        ({"qkv_bias": False}, True),
        ({"drop": 0.3}, True),
        ({"act": nn.ReLU}, True),
        ({"qk_norm": True}, False),
        ({"gated": True}, False),
        ({"attn_drop": 0.3}, False),
    ],
    ids=str,
)
def test_timm(options, fused):
    block = build(Block(DIM, **options))
    fast = accelerated(block)
    assert is_fast(fast)
    assert is_fused(fast) is fused
    compare(block, fast)


class PlainAttention(nn.Module):
    """VideoMAE's (biases of queries and values) and JEPA's (returns the weights too)."""

    def __init__(self, pair: bool, biases: bool) -> None:
        super().__init__()
        self.num_heads, self.scale, self.pair = 2, 0.3, pair
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=not biases)
        self.q_bias = nn.Parameter(torch.zeros(DIM)) if biases else None
        self.v_bias = nn.Parameter(torch.zeros(DIM)) if biases else None
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(DIM, DIM), nn.Dropout(0.0)

    def weigh(self, x):
        bias = self.qkv.bias
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.attn_drop((q @ k.mT * self.scale).softmax(-1)), v


class VideoAttention(PlainAttention):
    def __init__(self):
        super().__init__(False, True)

    def forward(self, x):
        weights, v = self.weigh(x)
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class PairAttention(PlainAttention):
    def __init__(self):
        super().__init__(True, False)

    def forward(self, x, mask=None):
        weights, v = self.weigh(x)
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2))), weights


class VideoBlock(Block):
    def __init__(self):
        super().__init__(DIM)
        del self.ls1, self.ls2, self.drop_path1, self.drop_path2
        self.attn, self.drop_path = VideoAttention(), nn.Identity()
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.ones(DIM))


def video_forward(self, x):
    x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
    return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


def pair_forward(self, x, return_attention=False, mask=None):
    y, weights = self.attn(self.norm1(x), mask=mask)
    if return_attention:
        return weights
    x = x + y
    return x + self.mlp(self.norm2(x))


def test_videomae():
    block = pretend("Video", video_forward, like=VideoBlock())
    fast = maefast.accelerate(copy.deepcopy(block))
    assert is_fused(fast)
    compare(block, fast)


def test_jepa():
    block = pretend("Pair", pair_forward, PairAttention())
    fast = maefast.accelerate(copy.deepcopy(block))
    assert is_fused(fast)
    compare(block, fast)
    x = tokens()
    compare(block, fast, x, mask=torch.zeros(2, 3))  # its attention never looks at it
    for args in ((True,), (False, torch.zeros(2, 3))):
        assert relative(fast(x, *args), block(x, *args)) < 1e-12
    assert fast(x, return_attention=True).shape == (2, 2, 7, 7)


def hugging_face(name: str, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        **options,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{name}Model")(config)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ViT", {}, True),
        ("ViT", {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.1}, True),
        ("ViT", {"hidden_act": "quick_gelu", "qkv_bias": False}, True),
        ("DeiT", {}, True),
        ("Dinov2", {}, True),
        ("Dinov2", {"drop_path_rate": 0.3, "use_swiglu_ffn": True}, True),
        ("Dinov2WithRegisters", {}, True),
        ("Beit", {"use_relative_position_bias": True, "drop_path_rate": 0.2}, True),
        ("Beit", {}, True),
    ],
    ids=str,
)
def test_hugging_face(name, options, expected):
    """Layers served (True), kept (False) or either (None), and right in any case."""
    model = build(hugging_face(name, **options))
    fast = accelerated(model)
    served = any(is_fast(m) for m in fast.modules())
    assert expected is None or served is expected
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):
        model.train(training)
        fast.train(training)
        torch.manual_seed(1)
        want = model(x)
        torch.manual_seed(1)
        got = fast(x)
        assert relative(got.last_hidden_state, want.last_hidden_state) < 1e-11
        for net, out in ((model, want), (fast, got)):
            net.zero_grad()
            out.last_hidden_state.pow(3).sum().backward()
        assert gradient_error(fast, model) < 1e-10
    want, got = model(x, output_hidden_states=True), fast(x, output_hidden_states=True)
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert relative(a, b) < 1e-11


def test_registered_attention_is_called():
    """Of transformers, by a name in the configuration, before acceleration or after."""
    interface = pytest.importorskip("transformers").AttentionInterface

    def mine(module, query, key, value, attention_mask=None, **kwargs):
        return value.transpose(1, 2) * 2, None

    interface.register("of_this_test", mine)
    model = build(hugging_face("ViT"))
    fast = accelerated(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = fast(x).last_hidden_state
    for net in (model, fast):
        net.config._attn_implementation = "of_this_test"
    assert relative(fast(x).last_hidden_state, model(x).last_hidden_state) < 1e-11
    assert relative(fast(x).last_hidden_state, before) > 1e-3


# --- inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 17, 65])
def test_any_number_of_tokens(count):
    block = build(Block(DIM))
    compare(block, accelerated(block), tokens(count))


@pytest.mark.parametrize("shape", [(2, 0, DIM), (0, 5, DIM), (5, DIM), (2, 3, 4, DIM)])
def test_unusual_shapes(shape):
    """What the block answers or refuses, it still answers or refuses."""
    block = build(Block(DIM))
    fast = accelerated(block)
    x = torch.randn(shape, dtype=torch.float64)
    try:
        want = block(x)
    except Exception as error:
        with pytest.raises(type(error)):
            fast(x)
    else:
        assert torch.equal(fast(x), want)


def test_other_dtypes():
    block = build(Block(DIM), torch.float32)
    fast = accelerated(block)
    compare(block, fast, tokens(dtype=torch.float32), tolerance=1e-5)
    for x in (tokens(dtype=torch.float64), tokens(dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError):
            block(x)
        with pytest.raises(RuntimeError):
            fast(x)
    exact = block(tokens(dtype=torch.float32).bfloat16().float())
    model, half = build(Block(DIM), torch.bfloat16), accelerated(build(Block(DIM), torch.bfloat16))
    x = tokens(dtype=torch.bfloat16)
    exact = block(x.float())
    assert half(x).dtype is torch.bfloat16
    assert relative(half(x), exact) < 1.5 * relative(model(x), exact) + 2e-3


def test_names_of_arguments():
    block = build(Block(DIM))
    fast = accelerated(block)
    x, mask = tokens(), torch.randn(7, 7, dtype=torch.float64)
    assert relative(fast(x=x), block(x=x)) < 1e-12
    for kwargs in ({"attn_mask": mask}, {"is_causal": True}, {"attn_mask": None, "is_causal": False}):
        assert relative(fast(x, **kwargs), block(x, **kwargs)) < 1e-12
    with pytest.raises(TypeError):
        fast(x, nothing_like_it=1)
    with pytest.raises(TypeError):
        fast()

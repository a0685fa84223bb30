"""Blocks that would be slower accelerated run as they were, and the report says so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import maefast
from maefast.bench import worth
from maefast.bench.peers.public.mae import MaskedAutoencoderViT
from maefast.bench.peers.public.timm_vit import Block
from maefast.integrations import _worth
from tests.integrations.common import relative
from tests.integrations.test_mae import SIZES, images

SMALL, LARGE = "ran as it was once because below", "ran fast once"


@pytest.mark.parametrize(
    ("tokens", "kind", "gradients", "says"),
    [
        (17, "float32", True, SMALL),
        (600, "float32", True, LARGE),
        (600, "float32", False, LARGE),
        (17, "bfloat16", False, SMALL),
        (1200, "bfloat16", True, LARGE),
        (1200, "float64", True, "ran as it was once because float64 is quicker as it was on a CPU"),
    ],
)
def test_sizes(tokens, kind, gradients, says):
    torch.manual_seed(0)
    block = Block(96).to(torch.float64 if kind == "float64" else torch.float32)
    fast = maefast.accelerate(copy.deepcopy(block))
    x = torch.randn(1, tokens, 96, dtype=block.norm1.weight.dtype)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
        assert relative(fast(x), block(x)) < 2e-2
    (note,) = maefast.report(fast).replaced
    assert note.runs.startswith(says)


def test_blocks_of_a_family():
    """The rest of the model goes on, with the same numbers."""
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**SIZES)
    fast = maefast.accelerate(copy.deepcopy(model))
    found = []
    for net in (model, fast):
        torch.manual_seed(1)
        found.append(net(images())[0])
    assert relative(found[1], found[0]) < 1e-5
    text = str(maefast.report(fast))
    assert "blocks.0-1          ran as it was once because below" in text
    assert "forward             ran as it was once because below" in text
    assert "forward_loss        ran as it was once" in text


def test_16_bits_without_a_fused_attention():
    block = Block(192, attn_drop=0.1)
    fast = maefast.accelerate(copy.deepcopy(block))
    x = torch.randn(4, 256, 192)
    for dtype, says in ((torch.bfloat16, "without a fused attention it is quicker as it was"), (torch.float32, "fast")):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            fast(x)
        (note,) = maefast.report(fast).replaced
        assert says in note.runs


def test_devices_that_were_not_measured_have_no_limits(monkeypatch):
    monkeypatch.setattr(_worth, "LEAST", {})
    assert _worth.why_not(torch.zeros(1, 1, 8)) is None


def test_compiled():
    """Python's time does not count there."""
    torch._dynamo.reset()
    block = Block(48)
    fast = maefast.accelerate(copy.deepcopy(block))
    x = torch.randn(1, 17, 48)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert relative(compiled(x), block(x)) < 1e-5


def test_nothing_is_kept_without_gradients():
    """Neither autograd nodes nor saved tensors."""
    fast = maefast.accelerate(nn.Sequential(Block(96), Block(96)))
    saved = []
    with _worth.always(), torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        out = fast(torch.randn(1, 17, 96))
    assert out.grad_fn is None
    assert not saved


def test_the_table_comes_from_pairs():
    rows = [
        {"dtype": "float32", "training": True, "width": w, "tokens": t, "ratio": r}
        for w, t, r in ((10, 10, 0.5), (10, 100, 1.2), (100, 10, 1.3), (100, 1, 0.8), (100, 100, 2.0))
    ]
    assert worth.least(rows) == {"float32, training": (1, 1000)}
    assert worth.least([{**row, "ratio": 0.5} for row in rows]) == {"float32, training": None}


def test_a_pair_is_measured():
    assert worth.ratio(48, 17, "float32", False, "cpu", rounds=1) > 0

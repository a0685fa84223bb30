"""Reports say what is, and what has run; `accelerate` leaves no trace while it looks."""

from __future__ import annotations

import copy
import importlib
import warnings
from types import MethodType

import pytest
import torch
from torch import nn

import maefast
from maefast.bench.peers.public.mae import MaskedAutoencoderViT
from maefast.bench.peers.public.timm_vit import Attention, Block
from maefast.integrations import FAMILIES, _layers
from maefast.integrations._report import Report
from tests.integrations import test_crossmae, test_lightly, test_mae_st, test_spark, test_timm_vit, test_videomae
from tests.integrations.blocks import DIM, accelerated, build, compare, pretend, tokens
from tests.integrations.test_mae import SIZES, images
from tests.integrations.test_transformer_changes import Gated


def text(block: nn.Module) -> str:
    """What the report says of an accelerated block."""
    (note,) = maefast.report(block).replaced
    return note.text


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (nn.GELU, "fused attention, residual + norm, bias + GELU"),
        (nn.ReLU, "fused attention, residual + norm, ReLU as it was"),
        (QuickGELU, "fused attention, residual + norm, QuickGELU as it was"),
    ],
)
def test_activations(act, says):
    block = build(Block(DIM, act=act))
    fast = accelerated(block)
    assert text(fast) == says
    compare(block, fast)


def test_another_mlp():
    block = Block(DIM)
    block.mlp = Gated()
    fast = accelerated(build(block))
    assert text(fast) == (
        "fused attention, residual + norm, MLP as it was (43% of the block's products with weights), because maefast "
        "does not know mlp, a Gated"
    )


def test_an_attention_that_runs_as_it_was():
    fast = accelerated(build(Block(DIM, qk_norm=True)))
    assert text(fast) == (
        "attention as it was (50% of the block's products with weights), because the attention normalises queries, "
        "keys or its output (attn.q_norm is a LayerNorm, attn.k_norm is a LayerNorm); residual + norm, bias + GELU"
    )


@pytest.mark.parametrize("training", [True, False])
def test_dropout_that_is_on_in_training(training):
    fast = accelerated(build(Block(DIM, attn_drop=0.5)).train(training))
    assert text(fast).startswith("fused attention, residual + norm, bias + GELU (in training: attention as it was")


class Rates(Attention):
    """Holds the rate in the place of the dropout."""

    def __init__(self, *args):
        super().__init__(*args)
        del self.attn_drop
        self.attn_drop = 0.0

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        rate = self.attn_drop if self.training else 0.0
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=rate, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


def test_a_dropout_that_is_a_rate():
    block = Block(DIM)
    block.attn = Rates(DIM, 2)
    block = build(block)
    fast = accelerated(block)
    assert text(fast) == "fused attention, residual + norm, bias + GELU"
    compare(block, fast)
    for net in (block, fast):
        net.attn.attn_drop = 0.5
    compare(block, fast)


def with_bias(self, x, rel_pos_bias=None):
    y = self.attn(self.norm1(x))
    x = x + (y if rel_pos_bias is None else y + rel_pos_bias)
    return x + self.mlp(self.norm2(x))


def test_calls_are_counted():
    """A block that is always called with another argument never runs fast, and the report says so."""
    block = pretend("Biased", with_bias)
    fast = accelerated(block)
    assert "calls since then" not in str(maefast.report(fast))
    x = tokens()
    for _ in range(3):
        fast(x, rel_pos_bias=torch.ones(DIM, dtype=x.dtype))
    (note,) = maefast.report(fast).replaced
    assert note.runs == "ran as it was 3 times because it was called with rel_pos_bias (since call 1)"
    fast(x)
    handle = fast.attn.register_forward_hook(lambda *args: None)
    fast(x)
    handle.remove()
    (note,) = maefast.report(fast).replaced
    assert note.runs.startswith("ran fast once, as it was 3 times")
    assert "as it was once because a module inside has a hook" in note.runs
    assert "calls since then" in str(maefast.report(fast))


def picky(self, x, mask_ratio):
    raise RuntimeError("only photographs, please")


def test_a_probe_that_fails_is_not_the_models_fault(monkeypatch):
    monkeypatch.setattr(MaskedAutoencoderViT, "forward_encoder", picky)
    model = maefast.accelerate(MaskedAutoencoderViT(**SIZES))
    report = maefast.report(model)
    (note,) = [note for note in report.kept if note.method == "forward_encoder"]
    assert note.text == "its own code raised a RuntimeError on an input that maefast made up, so nothing was compared"
    assert note.gain == "mask in one kernel, visible patches only embedded"
    assert f"{note.text}; missed: {note.gain}" in str(report)
    assert "Traceback" not in str(report)
    assert "photographs" not in str(report)
    assert "Traceback" in report.verbose()
    assert "in picky" in report.verbose()


def hungry(self, x, mask_ratio, input_dimensions):
    return x


def test_arguments_that_nobody_knows(monkeypatch):
    """In the model's own names, without the text of an exception."""
    monkeypatch.setattr(MaskedAutoencoderViT, "forward_encoder", hungry)
    report = maefast.report(maefast.accelerate(MaskedAutoencoderViT(**SIZES)))
    (note,) = [note for note in report.kept if note.method == "forward_encoder"]
    assert note.text == (
        "its code takes arguments that maefast does not know (input_dimensions), so nothing was compared"
    )


@pytest.mark.parametrize(
    ("options", "change", "says"),
    [
        ({"attn_drop": 0.5}, None, "dropout inside the attention is on (attn.attn_drop has a rate of 0.5)"),
        ({}, lambda b: setattr(b.attn, "qkv", Wrapped(b.attn.qkv)), "watched or adapted (attn.qkv is a Wrapped)"),
        ({}, lambda b: setattr(b, "attn", Odd(DIM, 2)), "(attn is an Odd: Odd.forward overrides that of Attention)"),
        ({}, lambda b: b.attn.qkv.register_forward_hook(print), "watched or adapted (attn.qkv has hooks)"),
        (
            {},
            lambda b: b.mlp.register_forward_hook(print),
            "MLP as it was (50% of the block's products with weights), ",
        ),
    ],
)
def test_the_part_that_is_to_blame(options, change, says):
    block = Block(DIM, **options)
    if change is not None:
        change(block)
    fast = accelerated(build(block))
    assert says in text(fast)
    assert "(50% of the block's products with weights), because" in text(fast)


class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


class Odd(Attention):
    temperature = 1.0

    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x * self.temperature)


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(DIM, DIM) for _ in "qkvo")


class Near(nn.Module):
    """A block that is none of ours."""

    def __init__(self, attn: nn.Module, norm: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm(DIM), attn, norm(DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (Near(nn.Linear(DIM, DIM), nn.RMSNorm), "its norm1 is a RMSNorm, and maefast knows LayerNorm"),
        (Near(nn.MultiheadAttention(DIM, 2)), "its attn, a MultiheadAttention, has none of the projections"),
        (Near(Projections()), "no layout that maefast knows has norm1 and norm2 with a Linear"),
    ],
)
def test_blocks_that_are_nearly_known(block, says):
    with pytest.warns(UserWarning, match="nothing to accelerate") as warned:
        model = maefast.accelerate(nn.Sequential(nn.Conv2d(3, 8, 1), block, copy.deepcopy(block)))
    (note,) = maefast.report(model).kept
    assert note.where == "1"
    assert note.text.startswith(f"Near looks like a transformer block, but {says}")
    assert says in str(warned[0].message)
    assert "missed: fused attention" in str(maefast.report(model))


def test_an_unknown_model_gets_one_sentence():
    with pytest.warns(UserWarning, match="nothing to accelerate") as warned:
        model = maefast.accelerate(nn.Sequential(nn.Linear(2, 2)))
    assert str(warned[0].message) == (
        "maefast.accelerate: nothing to accelerate here, because Sequential holds no transformer blocks that maefast "
        "knows and is none of its families; maefast.report(model) says more"
    )
    assert ", ".join(family.NAME for family in FAMILIES) in str(maefast.report(model))


def test_printed_where_it_is_asked_for(capsys):
    """The report of `maefast.report`, and the same object is returned."""
    model = MaskedAutoencoderViT(**SIZES)
    assert maefast.accelerate(model) is model
    assert capsys.readouterr().out == ""
    assert maefast.accelerate(model, report=True) is model
    assert capsys.readouterr().out == f"{maefast.report(model)}\n"


def test_one_sentence_for_many_blocks():
    blocks = nn.Sequential(*(pretend("Alike", lambda self, x: x + self.mlp(self.norm2(x)) + self.twice) for _ in "123"))
    for block in blocks:
        block.twice = 2
        block.norm3 = nn.Identity()
    with pytest.warns(UserWarning, match="nothing to accelerate") as warned:
        maefast.accelerate(blocks)
    assert str(warned[0].message).count("its forward uses") == 1
    assert "0-2: its forward uses" in str(warned[0].message)


def test_hooks_and_counters_see_nothing():
    """Neither on modules nor on every module of the process, nor on parameters."""
    model = MaskedAutoencoderViT(**SIZES)
    calls = []
    handles = [nn.modules.module.register_module_forward_hook(lambda *args: calls.append("everywhere"))]
    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(lambda *args, name=name: calls.append(name)))
        handles.append(module.register_forward_pre_hook(lambda *args, name=name: calls.append(name)))
        handles.append(module.register_full_backward_hook(lambda *args, name=name: calls.append(name)))
    for p in model.parameters():
        if p.requires_grad:
            handles.append(p.register_hook(calls.append))
    try:
        maefast.accelerate(model)
        assert not calls
        assert all(module._forward_hooks and module._backward_hooks for module in model.modules())
    finally:
        for handle in handles:
            handle.remove()


def test_attributes_are_restored():
    """Also those that a part writes which is called as it is."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.seen = 0, []

        def forward(self, x):
            self.calls += 1
            self.seen.append(self.calls)
            return x

    block = build(Block(DIM))
    block.drop_path1 = part = Counts()
    fast = maefast.accelerate(block)
    assert (part.calls, part.seen) == (0, [])
    fast(tokens())
    assert (part.calls, part.seen) == (1, [1])


def test_parts_that_are_restored_are_not_claimed():
    model = maefast.accelerate(MaskedAutoencoderViT(**SIZES))
    maefast.restore(model.blocks[1])
    report = maefast.report(model)
    assert [note.path for note in report.kept] == ["blocks.1"]
    assert "restored" in report.kept[0].text
    assert "blocks.0 " in str(report)
    model(images())
    assert "  blocks.0-1" not in str(maefast.report(model))


def test_loss_keeps_no_predictions(monkeypatch):
    """`test_outputs_written_in_place` of every family can fail."""
    model = maefast.accelerate(MaskedAutoencoderViT(**SIZES))
    monkeypatch.setattr(_layers, "kept", lambda pred: pred)
    loss, pred, _ = model(images())
    pred.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rows_share_a_line():
    report = Report("Net")
    for i in range(12):
        report.add(f"blocks.{i}", "", False, "differs")
    assert report.why() == "blocks.0-11: differs"


def test_no_warning_without_a_reason():
    model = MaskedAutoencoderViT(**SIZES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maefast.accelerate(model)
        model(images())
        copy.deepcopy(model).eval()(images())


GAINS = [
    (test_mae_st.TestMAEST, "forward_encoder", "forward_encoder", "visible tubelets only embedded"),
    (test_mae_st.TestMAEST, "patchify", "forward_loss", "pixels read in place, no target tensor"),
    (test_crossmae.TestCrossMAE, "forward_decoder", "forward_decoder", "all blocks in one run"),
    (test_crossmae.TestCrossMAE, "random_masking", "forward_encoder", "visible patches only embedded"),
    (test_crossmae.TestCrossMAE, "decoder_blocks.0.forward", "decoder_blocks.0", "fused cross-attention"),
    (test_timm_vit.TestPatchDropout, "forward_features", "forward_features", "embedded only; sums pending"),
    (test_timm_vit.TestPatchDropout, "_pos_embed", "patch_drop", "patches that the dropout keeps embedded only"),
    (test_lightly.TestLightly, "encoder.encode", "encoder.encode", "sums pending between blocks"),
    (test_lightly.TestLightly, "encoder.images_to_tokens", "encoder.preprocess", "tokens in idx_keep embedded only"),
    (
        test_lightly.TestLightly,
        "decoder.add_pos_embed",
        "decoder.preprocess",
        "mask tokens and positions in two passes",
    ),
    (test_lightly.TestMAEDecoder, "decode", "decode", "sums pending between blocks"),
    (test_spark.TestResNet, "forward", "forward", "encoder on the active cells alone"),
    (test_spark.TestResNet, "dense_decoder.forward", "dense_decoder.forward", "batch norm with ReLU6"),
    (test_videomae.TestV1, "forward", "forward", "one plan for encoder and decoder"),
]


@pytest.mark.parametrize(("family", "path", "where", "gain"), GAINS)
def test_what_is_missed(family, path, where, gain):
    """Where a method of the model is its own."""
    model = family().build()
    owner, _, name = path.rpartition(".")
    part = model.get_submodule(owner)

    def own(self, *args, **kwargs):
        return getattr(type(self), name)(self, *args, **kwargs)

    setattr(part, name, MethodType(own, part))
    report = maefast.report(maefast.accelerate(model))
    (note,) = [note for note in report.kept if note.where == where]
    assert gain in note.gain
    assert f"{note.text}; missed: {note.gain}" in str(report)


@pytest.mark.parametrize(
    ("module", "path", "gain"),
    [
        ("hf_videomae.TestVideoMAE", "forward", "one plan through encoder, decoder and loss"),
        ("hf_videomae.TestVideoMAE", "videomae.forward", "encoder layers in one run"),
        ("hf_vitmae.TestViTMAE", "vit.forward", "encoder layers in one run"),
    ],
)
def test_what_is_missed_in_transformers(module, path, gain):
    pytest.importorskip("transformers")
    module, _, name = module.partition(".")
    family = getattr(importlib.import_module(f"tests.integrations.test_{module}"), name)
    test_what_is_missed(family, path, path, gain)

"""What a model is given: named, from a function, or guessed, and then the model must take it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from maefast.bench.peers import dropin_hf, dropin_vits
from maefast.bench.peers.public import fcmae, jepa, spark, timm_vit, videomae
from maefast.bench.peers.public.mae import MaskedAutoencoderViT
from maefast.check.inputs import fits, given
from maefast.errors import ConfigError

SIZES = {**dropin_vits.TOY, **dropin_vits.DECODER_TOY}
mae = functools.partial(MaskedAutoencoderViT, **SIZES)


def make(kind, *args):
    torch.manual_seed(0)
    return kind(*args)


class NoSize(nn.Module):
    """A patch embedding and a position table say it together."""

    def __init__(self):
        super().__init__()
        self.proj, self.pos_embed = nn.Conv2d(2, 8, 8, stride=8), nn.Parameter(torch.zeros(1, 17, 8))

    def forward(self, pixels, mask):
        tokens = self.proj(pixels).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        return tokens[~mask].reshape(len(pixels), 4, 8)


@pytest.mark.parametrize(
    ("kind", "batch", "says"),
    [
        (mae, None, "imgs [8, 3, 32, 32]; a guess from the model"),
        (functools.partial(mae, in_chans=13), 3, "imgs [3, 13, 32, 32]"),
        (timm_vit.VisionTransformer, 2, "x [2, 3, 32, 32]"),
        (functools.partial(jepa.ImageEncoder, 48, 1, 3), 2, "x [2, 3, "),
        (spark.resnet, 2, "inp_bchw [2, 3, 96, 96]"),
        (fcmae.small, 2, "[2, 3, 96, 96]"),
        (videomae.VideoMAE, None, "x [2, 3, 4, 16, 16], mask [2, 32] bool"),
        (NoSize, 1, "pixels [1, 2, 32, 32], mask [1, 16] bool"),
        (functools.partial(nn.Conv2d, 5, 4, 3), 1, "input [1, 5, 224, 224]"),
    ],
)
def test_guesses(kind, batch, says):
    model = make(kind)
    found = given(model, (), None, "", batch)
    assert found.text.startswith(says) or says in found.text
    fits(found, model)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (dropin_hf.hf_vitmae, "pixel_values [2, 3, 32, 32]"),
        (dropin_hf.hf_videomae, "pixel_values [2, 16, 3, 32, 32], bool_masked_pos [2, 128] bool"),
    ],
)
def test_guesses_for_transformers(kind, says):
    pytest.importorskip("transformers")
    model = make(kind, {**SIZES, **dropin_vits.CLIP})
    found = given(model, (), None, "", 2)
    assert found.text.startswith(says)
    fits(found, model)


def test_a_tube_mask_is_the_same_in_every_frame():
    mask = given(make(videomae.VideoMAE), (), None, "", 3).kwargs["mask"]
    assert torch.equal(mask[:, :16], mask[:, 16:])
    assert mask.sum(1).tolist() == [28, 28, 28]


@pytest.mark.parametrize("model", [nn.Linear(3, 3), jepa.ImagePredictor(24, 48, 1, 3), nn.ModuleList()])
def test_no_guess(model):
    with pytest.raises(ConfigError, match=r"cannot be guessed, as .*--input .*--batch MODULE:FUNCTION"):
        given(model, (), None, "", None)


@pytest.mark.parametrize(
    "wrap",
    [
        functools.partial(torch.compile, backend="eager"),
        nn.DataParallel,
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    ],
)
def test_wrappers_are_looked_through(wrap):
    """Their own forward takes *args."""
    model = wrap(mae())
    assert given(model, (), None, "", 2).text == "imgs [2, 3, 32, 32]; a guess from the model"
    assert given(model, ["imgs=1x3x32x32"], None, "", None).text == "imgs [1, 3, 32, 32]; random"
    with pytest.raises(ConfigError, match="missing a required argument: 'imgs'"):
        given(model, ["image=2x3x32x32"], None, "", None)


def test_a_forward_without_names():
    class Anything(nn.Conv2d):
        def forward(self, *args):
            return super().forward(*args)

    with pytest.raises(ConfigError, match="cannot be guessed, as its forward names no argument"):
        given(Anything(3, 4, 3), (), None, "", None)


def test_shapes():
    model = mae().double()
    found = given(model, ["2x3x32x32"], None, "", None)
    assert found.text == "imgs [2, 3, 32, 32]; random"
    assert found.args[0].dtype is torch.float64
    assert given(model, ["imgs=2x3x32x32"], None, "", None).kwargs["imgs"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (torch.ones(1, 3, 32, 32), "imgs [1, 3, 32, 32]; from b"),
        ((torch.ones(1, 3, 32, 32), 0.5), "imgs [1, 3, 32, 32], mask_ratio 0.5; from b"),
        ({"mask_ratio": 0.5, "imgs": torch.ones(1, 3, 32, 32)}, "imgs [1, 3, 32, 32], mask_ratio 0.5; from b"),
    ],
)
def test_batches(output, says):
    model = mae()
    found = given(model, (), lambda: output, "b", None)
    assert found.text == says
    fits(found, model)


@pytest.mark.parametrize(
    ("shapes", "batch", "size", "says"),
    [
        (["2x3x32x32"], lambda: 1, None, "--input or --batch, not both"),
        (["2x3x32x32"], None, 4, "--batch-size goes with an input that is guessed"),
        (["2,3,32,32"], None, None, "--input wants a shape such as"),
        (["2x0x32x32"], None, None, "--input wants a shape such as"),
        (["9999999999999999999x3x32x32"], None, None, "--input wants a shape such as"),
        (["99999999999x3x32x32"], None, None, "an input of 99999999999x3x32x32 cannot be made: it is too large"),
        (["999999999999999999x999999999999999999"], None, None, "cannot be made: it is too large"),
        ((), None, 99999999999, "an input of 99999999999x3x32x32 cannot be made: it is too large"),
        (["imgs=2x3x32x32", "imgs=3x3x32x32"], None, None, "--input gives imgs twice"),
        (["image=2x3x32x32"], None, None, "missing a required argument: 'imgs'"),
        (["2x3x32x32", "2", "2"], None, None, "too many positional arguments"),
        ((), lambda: 3, None, "b gives a int, not a tensor"),
        ((), lambda: 1 / 0, None, "b raised ZeroDivisionError"),
    ],
)
def test_wrong_inputs(shapes, batch, size, says):
    with pytest.raises(ConfigError) as error:
        given(mae(), shapes, batch, "b", size)
    assert says in str(error.value)


def test_an_input_that_the_model_refuses():
    model = mae()
    with pytest.raises(ConfigError, match=r"given imgs .2, 3, 16, 16.; random, the model raised AssertionError: im"):
        fits(given(model, ["2x3x16x16"], None, "", None), model)

"""Bad input is refused in plain words before anything runs."""

from __future__ import annotations

import pytest
import torch

from maefast import masking, models
from tests.models.common import inputs, small

NAN = float("nan")


@pytest.fixture(scope="module")
def model():
    built = small(torch.float32)
    for module in built.modules():
        if not isinstance(module, models.MaskedAutoencoderViT):
            module.register_forward_pre_hook(lambda *_: pytest.fail("a layer ran before the input was checked"))
    return built


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, n: {"images": x[:, :1]}, ValueError, r"takes images \[B, 3, 32, 32\].*\(3, 1, 32, 32\)"),
        (lambda x, n: {"images": x[:, :, :24]}, ValueError, r"takes images \[B, 3, 32, 32\]"),
        (lambda x, n: {"images": x[0]}, ValueError, "images must have 4 dimensions"),
        (lambda x, n: {"images": x[:0]}, ValueError, "B >= 1"),
        (lambda x, n: {"images": (x * 255).byte()}, TypeError, "images must be float32"),
        (lambda x, n: {"images": [[1.0]]}, TypeError, "images must be a torch.Tensor"),
        (lambda x, n: {"images": x, "mask_ratio": NAN}, ValueError, r"finite number in \[0, 1\], got nan"),
        (lambda x, n: {"images": x, "mask_ratio": 1.5}, ValueError, r"\[0, 1\], got 1.5"),
        (lambda x, n: {"images": x, "mask_ratio": -0.1}, ValueError, r"\[0, 1\]"),
        (lambda x, n: {"images": x, "mask_ratio": "0.75"}, ValueError, r"\[0, 1\], got '0.75'"),
        (lambda x, n: {"images": x, "mask_ratio": None}, ValueError, r"\[0, 1\], got None"),
        (lambda x, n: {"images": x, "mask_ratio": [0.5, 0.5]}, ValueError, "2 values for a batch of 3"),
        (lambda x, n: {"images": x, "mask_ratio": [0.5, NAN, 0.5]}, ValueError, "got nan"),
        (lambda x, n: {"images": x, "mask_ratio": 0.0}, ValueError, "removes no patch"),
        (lambda x, n: {"images": x, "mask_ratio": [0.0] * 3}, ValueError, "removes no patch"),
        (lambda x, n: {"images": x, "noise": n[:, :9]}, ValueError, r"noise must have shape \[3, 16\], got \[3, 9\]"),
        (lambda x, n: {"images": x, "noise": n[:1]}, ValueError, r"noise must have shape \[3, 16\]"),
        (lambda x, n: {"images": x, "noise": n.long()}, TypeError, "noise must be float32"),
        (lambda x, n: {"images": x, "noise": 0.5}, TypeError, "noise must be a torch.Tensor"),
        (lambda x, n: {"images": x, "noise": n.to("meta")}, ValueError, "noise is on meta but images are on cpu"),
        (lambda x, n: {"images": x, "noise": n, "mask": n > 0.5}, ValueError, "not both"),
        (lambda x, n: {"images": x, "mask": n}, TypeError, "mask must be a bool tensor"),
        (lambda x, n: {"images": x, "mask": n[:, :4] > 0.5}, ValueError, r"mask must have shape \[3, 16\]"),
        (lambda x, n: {"images": x, "mask": [True]}, TypeError, "mask must be a"),
        (lambda x, n: {"images": x, "mask": masking.random(3, 9, 0.5)}, ValueError, "3 samples of 16 patches"),
        (lambda x, n: {"images": x, "mask": masking.random(2, 16, 0.5)}, ValueError, "3 samples of 16 patches"),
        (lambda x, n: {"images": x, "mask": masking.random(3, 16, 0.5).to("meta")}, ValueError, "mask is on meta"),
        (lambda x, n: {"images": x, "pred": "visible"}, ValueError, "pred must be one of 'masked', 'full'"),
    ],
)
def test_forward(model, call, error, words):
    images, noise = inputs(model)
    with pytest.raises(error, match=words):
        model(**call(images, noise))


def test_dtype_of_images():
    """Checked by patch_embed, the first op, which knows about autocast."""
    built = small(torch.float32)
    images, noise = inputs(built)
    with pytest.raises(TypeError, match=r"images are torch.float64 but weight is torch.float32"):
        built(images.double(), 0.75, noise)


def test_encode_reconstruct_and_unpatchify(model):
    images, _ = inputs(model)
    with pytest.raises(ValueError, match="takes images"):
        model.encode(images[:, :, :16])
    with pytest.raises(ValueError, match="takes images"):
        model.reconstruct(images[:, :2])
    with pytest.raises(ValueError, match=r"patches must be \[B, 16, 192\]"):
        model.unpatchify(torch.zeros(3, 16, 100))


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ({"img_size": 30}, ValueError, r"\(30, 30\) is not a multiple of the patch size \(8, 8\)"),
        ({"img_size": 0}, ValueError, "img_size must be a positive int"),
        ({"img_size": (32, 32, 32)}, ValueError, "img_size"),
        ({"patch_size": 8.0}, ValueError, "patch_size"),
        ({"in_chans": 0}, ValueError, "in_chans must be a positive int"),
        ({"depth": 0}, ValueError, "depth must be a positive int"),
        ({"decoder_depth": 0}, ValueError, "decoder_depth must be a positive int"),
        ({"num_heads": 5}, ValueError, "multiple of the number of heads, got 5"),
        ({"decoder_num_heads": 0}, ValueError, "number of heads, got 0"),
        ({"embed_dim": 30, "num_heads": 2}, ValueError, "multiple of 4"),
        ({"positions": "rotary"}, ValueError, "'sincos' or 'learned'"),
        ({"drop_path": 0.1}, TypeError, "drop_path"),
    ],
)
def test_create(overrides, error, words):
    with pytest.raises(error, match=words):
        small(**overrides)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"unknown model 'mae_giant'; choose from fcmae, fcmae_convnextv2_atto"):
        models.create("mae_giant")

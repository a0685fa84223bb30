"""The convolutional head of vectors, and the similarity of images."""

from __future__ import annotations

import pytest
import torch

from maefast.nn.image_decoder import ImageDecoder, ssim


def test_sizes():
    for shortcut in ("input", "output"):
        head = ImageDecoder(8, 4, (1, 2, 4), 2, 3, shortcut)
        assert head(torch.randn(2, 8, 3, 5)).shape == (2, 3, 12, 20)
    with pytest.raises(ValueError, match="multiples"):
        ImageDecoder(8, 4, ())


def test_ssim_is_that_of_scikit_image():
    from skimage.metrics import structural_similarity

    generator = torch.Generator().manual_seed(0)
    one = torch.rand(2, 3, 20, 17, generator=generator, dtype=torch.float64)
    other = (one + 0.3 * torch.rand(one.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    want = sum(
        structural_similarity(a.numpy(), b.numpy(), **how)
        for a, b in zip(one.flatten(0, 1), other.detach().flatten(0, 1))
    )
    found = ssim(one, other)
    assert abs(found.item() - want / 6) < 1e-12
    assert torch.autograd.gradcheck(lambda x: ssim(one[:1, :1], x), other.detach()[:1, :1].requires_grad_())
    assert ssim(one, one) == 1


@pytest.mark.parametrize(
    ("change", "message"), [({"window": 10}, "odd"), ({"window": 21}, "at most"), ({"data_range": 0.0}, "data_range")]
)
def test_bad_calls(change, message):
    image = torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match=message):
        ssim(image, image, **change)
    with pytest.raises(ValueError, match="alike"):
        ssim(image, image[:, :1])

"""resize: the reference is Pillow's filter, the kernel is the reference, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import ops
from maefast.data.images.files import shipped_photographs
from maefast.ops.resize import resize_reference

from .common import backends, property_test

Image = pytest.importorskip("PIL.Image")


def noise(height, width, channels, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8))


def pillow(image, size, box=None):
    made = Image.fromarray(image.numpy() if image.shape[2] > 1 else image[..., 0].numpy())
    made = np.array(made.resize(size[::-1], Image.Resampling.BICUBIC, box=box)).reshape(*size, -1)
    return torch.from_numpy(made).permute(2, 0, 1)


def columns_first(image, size, box):
    """Pillow 13 takes this order where it costs less."""
    box = (0, 0, image.shape[1], image.shape[0]) if box is None else box
    turned = [box[i] for i in (1, 0, 3, 2)]
    return resize_reference(image.transpose(0, 1), size[::-1], turned, False).transpose(1, 2)


@st.composite
def cases(draw, channels=(1, 2, 3, 4)):
    sides = st.integers(1, 90)
    image = noise(draw(sides), draw(sides), draw(st.sampled_from(channels)), draw(st.integers(0, 99)))
    size, box = (draw(sides), draw(sides)), None
    if draw(st.booleans()):
        (top, bottom), (left, right) = (
            sorted(draw(st.lists(st.floats(0, side, width=32), min_size=2, max_size=2, unique=True)))
            for side in image.shape[:2]
        )
        box = (left, top, max(right, left + 1e-3), max(bottom, top + 1e-3))
        box = None if box[2] > image.shape[1] or box[3] > image.shape[0] else box
    return image, size, box


@given(case=cases(channels=(1, 3)))
@property_test
def test_reference_is_pillows(case):
    image, size, box = case
    want, got = pillow(image, size, box), ops.resize(image, size, box=box, backend="reference")
    assert torch.equal(got, want) or torch.equal(columns_first(image, size, box), want)


@pytest.mark.parametrize("where", backends("resize", reference=False))
@given(case=cases(), flip=st.booleans(), crop=st.booleans())
@property_test
def test_kernel_is_the_reference(where, case, flip, crop):
    image, size, box = case
    if crop:  # rows that lie apart
        height, width, channels = image.shape
        whole = noise(height + 5, width + 7, channels, 1)
        whole[2 : 2 + height, 3 : 3 + width] = image
        image = whole[2 : 2 + height, 3 : 3 + width]
    out = torch.full((image.shape[2] + 1, *size), 77, dtype=torch.uint8)
    given = ops.resize(image, size, box=box, flip=flip, out=out[:-1], backend=where[0])
    assert given.data_ptr() == out.data_ptr()
    assert torch.equal(given, ops.resize(image, size, box=box, flip=flip, backend="reference"))
    assert (out[-1] == 77).all()  # nothing is written behind it


def test_crops_of_photographs_are_pillows():
    pytest.importorskip("skimage")
    rng = np.random.default_rng(0)
    for path in shipped_photographs()[:4]:
        with Image.open(path) as file:
            photo = torch.from_numpy(np.array(file.convert("RGB").resize((320, 240))))
        for _ in range(10):
            width = int(rng.integers(100, 240))
            height = int(width * rng.uniform(3 / 4, 1))
            top, left = int(rng.integers(0, 241 - height)), int(rng.integers(0, 321 - width))
            crop = photo[top : top + height, left : left + width]
            assert torch.equal(ops.resize(crop, (64, 64)), pillow(crop.contiguous(), (64, 64)))


def test_an_image_of_its_own_size_is_itself():
    image = noise(20, 30, 3)
    assert torch.equal(ops.resize(image, (20, 30)), image.permute(2, 0, 1))
    assert torch.equal(ops.resize(image, (20, 30), flip=True), image.permute(2, 0, 1).flip(2))
    assert torch.equal(ops.resize(image, (5, 6), box=(3, 4, 9, 9)), image[4:9, 3:9].permute(2, 0, 1))


def test_grey_levels_stay_in_range():
    stripes = torch.zeros(40, 40, 3, dtype=torch.uint8)
    stripes[:, ::8], stripes[:, 1::8] = 255, 255
    for size in ((90, 90), (23, 23)):
        assert torch.equal(ops.resize(stripes, size), ops.resize(stripes, size, backend="reference"))
    assert torch.equal(ops.resize(torch.full((9, 9, 1), 255, dtype=torch.uint8), (31, 4)), torch.full((1, 31, 4), 255))


def test_odd_strides():
    image = noise(12, 10, 3)
    for view in (image.transpose(0, 1), image[:, ::2], image[::2], image[..., :2], image[:, :, 1:2], image[:, 3:4]):
        assert torch.equal(ops.resize(view, (7, 5)), ops.resize(view.contiguous(), (7, 5), backend="reference"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": torch.zeros(4, 4, 3)}, TypeError, "image must be uint8 on the CPU, got torch.float32"),
        ({"image": noise(4, 4, 3)[0]}, ValueError, "image"),
        ({"image": noise(4, 4, 5)}, ValueError, r"C of 1 to 4, got \[4, 4, 5\]"),
        ({"image": noise(0, 4, 3)}, ValueError, "of a pixel at least"),
        ({"size": (4, 0)}, ValueError, "size: width"),
        ({"size": 4}, TypeError, "size must be"),
        ({"size": (4, 4.0)}, TypeError, "size: width"),
        ({"box": (0, 0, 5, 4)}, ValueError, "lie within an image of 4 x 4"),
        ({"box": (2, 0, 2, 4)}, ValueError, "must not be empty"),
        ({"box": (1, 0, 1 + 1e-9, 4)}, ValueError, "must not be empty"),
        ({"box": (0, 0, float("nan"), 4)}, ValueError, "box"),
        ({"box": "all"}, TypeError, "four numbers"),
        ({"flip": "no"}, TypeError, "flip"),
        ({"out": torch.zeros(3, 4, 4)}, ValueError, r"out must be uint8 \[3, 4, 4\]"),
        ({"out": torch.zeros(3, 4, 5, dtype=torch.uint8)}, ValueError, r"got torch.uint8 \[3, 4, 5\]"),
        ({"out": torch.zeros(3, 4, 8, dtype=torch.uint8)[..., ::2]}, ValueError, "out must be contiguous"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        ops.resize(**{"image": noise(4, 4, 3), "size": (4, 4), **changes})

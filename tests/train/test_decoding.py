"""Scales of sets with files of several kinds, hints, limits inside of crops, examples that cannot be read."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image

from maefast.data.images.augment import Augment
from maefast.data.images.files import find_images
from maefast.data.images.pixels import Decoder, centre_crop
from maefast.data.images.value_range import settle
from maefast.data.records import Names
from maefast.train import BadImage
from tests.train.common import pick_examples, write_photos


def settled(folder, **options):
    images = find_images(folder)
    decoder, lines = settle(images, Decoder(channels=1, **options), "auto")
    return images, decoder, lines


def save(path, high, dtype):
    Image.fromarray(np.linspace(0, high, 64).reshape(8, 8).astype(dtype)).save(path)


def test_each_kind_of_file_has_a_scale_of_its_own(tmp_path):
    """Floats up to 1 beside 32-bit integers up to 255: the one must not make the other black."""
    save(tmp_path / "a.tif", 1.0, np.float32)
    save(tmp_path / "b.tif", 255, np.int32)
    save(tmp_path / "c.tif", 65535, np.uint16)
    save(tmp_path / "d.png", 200, np.uint8)
    images, decoder, lines = settled(tmp_path)
    assert [np.asarray(decoder(images.path(i))).max() for i in range(4)] == [255, 255, 255, 200]
    assert decoder.scale == {"float": 1.0, "32-bit signed": 255.0}
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("dtype", "high", "hint"),
    [
        (np.float32, 0.03, "3.0% of the range from 0 to 1 is used"),
        (np.int32, 300, "10-bit data? --value-range 0,1023"),
        (np.int32, 4095, "12-bit data? --value-range 0,4095"),
    ],
)
def test_a_scale_that_was_found_can_be_too_wide_as_well(tmp_path, dtype, high, hint):
    save(tmp_path / "a.tif", high, dtype)
    _, _, (found, warning) = settled(tmp_path)
    assert "--value-range sets it" in found
    assert hint in warning


def test_the_largest_value_of_an_image_is_no_scale(tmp_path):
    """Some programs write it into TIFF's MaxSampleValue."""
    tifffile = pytest.importorskip("tifffile")
    values = np.linspace(0, 3000, 64).reshape(8, 8).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=[(281, 3, 1, 3000, True)])
    assert np.asarray(Decoder(1)(tmp_path / "a.tif")).max() == 12


def test_floats_whose_white_is_zero(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = np.array([[0.0, 0.2, 1.0]], np.float32)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
    assert np.asarray(Decoder(1)(tmp_path / "a.tif")).tolist() == [[255, 204, 0]]


def test_crops_do_not_ask_for_the_limit_again(tmp_path, monkeypatch):
    Image.new("L", (60, 40)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # an error from 800 pixels on
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = Decoder(1, max_pixels=0)(tmp_path / "large.png")
        assert Augment((8, 8), scale=(1.0, 1.0))(image, np.random.default_rng(0)).size == (8, 8)
        assert centre_crop(image, (8, 8)).size == (8, 8)
    assert Image.MAX_IMAGE_PIXELS == 400


def test_the_sample_of_a_set_keeps_the_limit(tmp_path, monkeypatch):
    """Looking for a scale must not decode what would be refused later."""
    save(tmp_path / "a.tif", 1.0, np.float32)
    Image.fromarray(np.full((40, 40), 200, np.float32)).save(tmp_path / "huge.tif")
    _, decoder, _ = settled(tmp_path, max_pixels=1000)
    assert decoder.scale == {"float": 1.0}


def test_without_skip_bad_an_unreadable_example_stops(tmp_path):
    images = find_images(write_photos(tmp_path, count=4))
    images.path(0).write_bytes(b"broken")
    with pytest.raises(BadImage, match=r"image00\.png.*--skip-bad"):
        pick_examples(images, 2, (16, 16), Decoder(), 16, seed=0, skip_bad=False)
    for index in range(4):
        images.path(index).write_bytes(b"broken")
    with pytest.raises(BadImage, match="any of the 4 images") as error:
        pick_examples(images, 2, (16, 16), Decoder(), 16, seed=0, skip_bad=True)
    assert "--skip-bad" not in str(error.value)


def test_examples_behind_many_bad_files(tmp_path):
    for index in range(30):
        (tmp_path / f"{index:02d}.png").write_bytes(b"broken")
    save(tmp_path / "25.png", 200, np.uint8)
    images = find_images(tmp_path)
    names = pick_examples(images, 1, (16, 16), Decoder(), 16, seed=0, skip_bad=True).names
    assert names == [images.files[25]]


def test_names_are_hashed_where_they_lie():
    names = Names(["b", "ä", "c\ud8ff".encode(errors="surrogatepass").decode(errors="surrogateescape")])
    assert bytes(names.lines()) == "\n".join(names).encode(errors="surrogateescape")
    assert bytes(Names([]).lines()) == b""

"""Finding and decoding files of every kind."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from maefast.train import BadImage, ConfigError
from maefast.train.images import SHIPPED, centre_crop, find_images, open_image, to_uint8


def pixels(path, channels=3):
    return np.asarray(open_image(path, channels))


def test_folder_is_searched_at_any_depth_in_a_fixed_order(tmp_path):
    for name in ("b/z.JPG", "b/deep/er/a.png", "a.jpeg", "c.webp", ".hidden/x.png", "b/._x.jpg", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert find_images(tmp_path).files == ("a.jpeg", "b/deep/er/a.png", "b/z.JPG", "c.webp")
    (tmp_path / "b" / "up").symlink_to(tmp_path)  # a cycle
    assert len(find_images(tmp_path)) == 4
    fingerprint = find_images(tmp_path).fingerprint()
    (tmp_path / "d.png").touch()
    assert find_images(tmp_path).fingerprint() != fingerprint


def test_missing_empty_and_mistaken_folders(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"no images found in it.*\.jpg"):
        find_images(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        find_images(tmp_path / "notes.txt")


def test_shipped_photographs():
    pytest.importorskip("skimage")
    images = find_images("skimage")
    wanted = set(SHIPPED["skimage"][1].split())
    assert wanted <= {images.name(i) for i in range(len(images))}
    assert {"astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"} <= wanted
    for path in map(images.path, range(len(images))):
        image = open_image(path)
        assert min(image.size) >= 300
        red, _, blue = (to_uint8(image)[c].astype(float) for c in range(3))
        assert np.abs(red - blue).mean() > 3, f"{path.name} has no colour"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0] = 255  # the bright corner belongs at the top left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert np.array_equal(pixels(path), upright)


def test_sixteen_bit_grey_keeps_its_scale(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert pixels(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.fromarray(values).save(tmp_path / "deep.tif")
    assert pixels(tmp_path / "deep.tif")[0, :, 2].tolist() == [0, 1, 128, 255]
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "wide.tif")
    assert pixels(tmp_path / "wide.tif")[0, :, 1].tolist() == [0, 1, 128, 255]


def test_floats(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "unit.tif")
    assert pixels(tmp_path / "unit.tif")[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[0.0, 100.0, 255.0]], np.float32)).save(tmp_path / "bytes.tif")
    assert pixels(tmp_path / "bytes.tif")[0, :, 0].tolist() == [0, 100, 255]
    Image.fromarray(np.array([[-1.0, 0.5]], np.float32)).save(tmp_path / "signed.tif")
    with pytest.raises(BadImage, match=r"signed\.tif.*pixel values from -1"):
        open_image(tmp_path / "signed.tif")


def test_grey_palette_cmyk_and_bilevel_become_rgb(tmp_path):
    grey = np.array([[0, 100, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(pixels(tmp_path / "grey.png"), np.stack([grey] * 3, -1))
    colours = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8))
    colours.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    assert np.array_equal(pixels(tmp_path / "palette.png"), np.asarray(colours))
    colours.convert("CMYK").save(tmp_path / "print.tif")
    assert np.array_equal(pixels(tmp_path / "print.tif"), np.asarray(colours))
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert pixels(tmp_path / "bits.png")[0, :, 0].tolist() == [255, 0]
    assert pixels(tmp_path / "palette.png", channels=1).shape == (1, 2)


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    assert pixels(tmp_path / "clear.png").tolist() == [[[200, 0, 0], [255, 255, 255], [127, 127, 127]]]


def test_broken_files_are_named(tmp_path):
    good = tmp_path / "good.jpg"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(good)
    for name, content in {"cut.jpg": good.read_bytes()[:400], "text.jpg": b"not an image", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage, match=name) as error:
            open_image(tmp_path / name)
        assert error.value.path == tmp_path / name


def test_centre_crop_keeps_proportions():
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = 255
    assert (to_uint8(centre_crop(Image.fromarray(image), (8, 8))) == 255).all()
    assert centre_crop(Image.fromarray(image), (8, 16)).size == (16, 8)
    assert centre_crop(Image.fromarray(image[:2, :2]), (8, 8)).size == (8, 8)

"""Finding and decoding files of every kind."""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from maefast.data.blob import Blob
from maefast.data.images import pictures
from maefast.data.images.files import SHIPPED, find_images
from maefast.data.images.pixels import Decoder, centre_crop, to_array
from maefast.data.records import Names, Paths
from maefast.train import BadImage, ConfigError, pretrain
from tests.train.common import tiny_config, write_photos


def pixels(path, channels=3):
    return np.asarray(Decoder(channels)(path))


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


@pytest.mark.parametrize("data", [".", "photos", "link"])
def test_what_maefast_writes_is_never_data(tmp_path, monkeypatch, data):
    """A run with --data . reads the same images before and after it has drawn its pictures."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", count=6)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    out = tmp_path / data / "out"
    options = {"picture_rows": 2, "picture_every": 2, "steps": 4, "save_every": 2, "tensorboard": True}
    first = find_images(data, out)
    pretrain(tiny_config(data, out, **options))
    assert len(list(out.rglob("*.png"))) >= 3
    again = find_images(data, out)
    assert list(again.files) == list(first.files)
    assert again.fingerprint() == first.fingerprint()
    assert "left out out: the output folder" in again.notes[0]
    # Another run, into another folder: the first is known by what is in it, whatever it is called.
    out.rename(tmp_path / data / "renamed")
    assert list(find_images(data, tmp_path / "elsewhere").files) == list(first.files)
    pretrain(tiny_config(data, tmp_path / data / "second", **options))
    assert list(find_images(data).files) == list(first.files)
    # Pictures that were copied out of it.
    (tmp_path / data / "reconstruction.png").write_bytes(
        (tmp_path / data / "renamed" / "reconstruction.png").read_bytes()
    )
    images = find_images(data)
    assert list(images.files) == list(first.files)
    assert "left out reconstruction.png, renamed/loss_curve.png" in " ".join(images.notes)


def test_images_beside_a_run_are_data(tmp_path):
    """--data . --output-dir .: what lies in the folder is data, what the run wrote there is not."""
    write_photos(tmp_path, count=4)
    first = find_images(tmp_path, tmp_path)
    pretrain(tiny_config(tmp_path, tmp_path, steps=2, picture_rows=2, picture_every=1))
    assert {"reconstruction.png", "loss_curve.png", "pictures"} <= {path.name for path in tmp_path.iterdir()}
    assert find_images(tmp_path, tmp_path).files == first.files
    assert find_images(tmp_path).files == first.files


def test_images_of_the_user_s_own_are_never_taken_for_ours(tmp_path):
    """In folders with the names of ours, beside another program's run, below a run of ours."""
    paint = Image.new("RGB", (16, 16), (9, 90, 200))
    for name in ("pictures/cat.png", "checkpoints/dog.png", "tensorboard/cow.png", "a/step-00000001.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        paint.save(tmp_path / name)
    first = find_images(tmp_path, tmp_path)
    assert len(first) == 4
    (tmp_path / "config.yaml").write_text("optimizer: adam\n")  # of another program
    (tmp_path / "metrics.csv").write_text("epoch,loss\n")
    assert find_images(tmp_path).files == first.files
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "metrics.csv").unlink()
    pretrain(tiny_config(tmp_path, tmp_path, steps=2, picture_rows=2, picture_every=1))
    again = find_images(tmp_path, tmp_path)
    assert again.files == first.files
    assert "drawn by maefast" in again.notes[0]
    assert len(find_images(tmp_path.parent).files) >= len(first)  # and from above


def test_pictures_of_older_versions_have_no_mark(tmp_path):
    write_photos(tmp_path, count=3)
    first = find_images(tmp_path)
    pretrain(tiny_config(tmp_path, tmp_path / "out", steps=2, picture_rows=2, picture_every=1))
    for path in (tmp_path / "out").rglob("*.png"):
        Image.open(path).convert("RGB").save(path)
    assert find_images(tmp_path).files == first.files  # known by their place in a run


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_folders_that_may_not_be_read_are_told(tmp_path):
    write_photos(tmp_path, count=3)
    (tmp_path / "closed").mkdir(mode=0o000)
    assert "left out closed: may not be read" in find_images(tmp_path).notes[0]


def test_our_own_pictures_under_another_name(tmp_path):
    """Told when they are met; a photograph called reconstruction.png is one."""
    photo = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    photo.save(tmp_path / "reconstruction.png")
    assert find_images(tmp_path).files == ("reconstruction.png",)
    for suffix in ("png", "jpg", "webp", "tif"):
        path = tmp_path / f"figure1.{suffix}"
        pictures.save_picture([torch.zeros(1, 3, 8, 8, dtype=torch.uint8)] * 4, ["a"], path)
        with pytest.raises(BadImage, match="maefast drew this picture; it is no data"):
            Decoder()(path)


def test_missing_empty_and_mistaken_folders(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"no images in it.*\.jpg"):
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
        image = Decoder()(path)
        assert min(image.size) >= 300
        red, _, blue = (to_array(image, 3)[c].astype(float) for c in range(3))
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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_tiffs_without_compression_are_turned_too(tmp_path, kind, orientation):
    """Which Pillow would map into memory."""
    path = tmp_path / "turned.tif"
    stored = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (40, 64)).astype(kind)
    Image.fromarray(stored).save(path, tiffinfo={0x0112: orientation})
    turned = stored.T if orientation > 4 else stored
    down, across = ((1, 1), (1, 1), (1, -1), (-1, -1), (-1, 1), (1, 1), (1, -1), (-1, -1), (-1, 1))[orientation]
    decoder = Decoder(1, bits=8 * stored.itemsize)
    assert np.array_equal(np.asarray(decoder(path)), turned[::down, ::across])
    assert np.array_equal(np.asarray(decoder(Blob("turned.tif", path.read_bytes))), turned[::down, ::across])


def test_names_take_no_objects(tmp_path):
    """One buffer; the order and the hash are those of the strings."""
    texts = ["z", "a", "ä/ö.png", "b" * 300, "日本.jpg", os.fsdecode(b"\xff\xfe.png"), "", "c"]
    names = Names(texts)
    assert list(names) == texts
    assert (names[-1], names[1:3], len(names)) == ("c", ("a", "ä/ö.png"), 8)
    assert names == tuple(texts)
    assert names != (*texts[:-1], "d")
    assert pickle.loads(pickle.dumps(names)) == names
    with pytest.raises(IndexError):
        names[8]
    images = Paths("s", "/root", names)
    want = hashlib.sha256("\n".join(texts).encode(errors="surrogateescape")).hexdigest()[:16]
    assert images.fingerprint() == want
    many = Paths("s", "/root", Names(str(i) for i in range(25_000)))
    want = hashlib.sha256("\n".join(map(str, range(25_000))).encode()).hexdigest()[:16]
    assert many.fingerprint() == want
    assert len(gc.get_referents(many.files)) < 10


def test_names_that_are_no_text(tmp_path):
    """A name in another encoding than the system's is read like any other, in the order of strings."""
    raw = [b"a\xff.png", b"b.png", "\uffff.png".encode(), b"\x80.png"]
    try:
        for name in raw:
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(os.path.join(os.fsencode(tmp_path), name))
    except OSError:
        pytest.skip("this file system knows only text")
    images = find_images(tmp_path)
    assert list(images.files) == sorted(os.fsdecode(name) for name in raw)
    for i in range(4):
        Decoder()(images.path(i))


MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I;16",
    "I",
    "F",
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow(mode, channels):
    """Colour and grey of all kinds of images that a file can give."""
    colours = Image.new("RGB", (8, 6), (200, 40, 90))
    if mode == "LAB":
        image = ImageCms.profileToProfile(
            colours, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    elif mode in ("I;16", "I", "F"):
        image = Image.new(mode, (8, 6), 1)
    elif mode == "PA":
        image = colours.convert("P").convert("PA")
    else:
        image = colours.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode))
        image = image.convert(mode)
    assert image.mode == mode
    got = Decoder(channels, scale={"16-bit": 65535.0})._levels(image)
    assert got.mode == ("RGB" if channels == 3 else "L")
    assert got.size == (8, 6)
    if channels == 3 and mode not in ("1", "L", "LA", "La", "P", "PA", "I;16", "I", "F"):
        assert np.abs(np.asarray(got)[0, 0].astype(int) - (200, 40, 90)).max() <= 6


def test_lab_files_in_grey(tmp_path):
    lab = np.zeros((4, 4, 3), np.uint8)
    lab[..., 0] = 128
    Image.fromarray(lab, "LAB").save(tmp_path / "lab.tif")
    grey, colour = pixels(tmp_path / "lab.tif", 1), pixels(tmp_path / "lab.tif", 3)
    assert grey.shape == (4, 4)
    assert np.abs(grey.astype(int) - colour[..., 1]).max() <= 2
    assert 100 < grey[0, 0] < 140


def test_more_pixels_than_the_limit(tmp_path, recwarn):
    Image.new("L", (300, 200)).save(tmp_path / "large.png")
    with pytest.raises(BadImage, match=r"300 x 200 = 60000 pixels are more than 50000.*--max-pixels N raises it, 0"):
        Decoder(max_pixels=50000)(tmp_path / "large.png")
    limit = Image.MAX_IMAGE_PIXELS
    for allowed in (60000, 0):
        assert Decoder(max_pixels=allowed)(tmp_path / "large.png").size == (300, 200)
    assert limit == Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = 1000  # Pillow's own limit stands back, and does not warn
    try:
        assert Decoder()(tmp_path / "large.png").size == (300, 200)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    assert not [w for w in recwarn if "Decompression" in str(w.category)]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_limit_holds_in_workers(tmp_path, workers):
    folder = write_photos(tmp_path / "photos", count=4)
    Image.new("RGB", (300, 200)).save(folder / "large.png")
    with pytest.raises(BadImage, match=r"large\.png.*--max-pixels"):
        pretrain(tiny_config(folder, tmp_path / "out", workers=workers, max_pixels=50000))
    pretrain(tiny_config(folder, tmp_path / "out", workers=workers, max_pixels=60000, steps=3))


def test_extensions(tmp_path):
    for name in ("a.jfif", "b.JFIF", "c.pnm"):
        Image.new("L", (8, 8)).save(tmp_path / name, format="PPM" if name.endswith("pnm") else "JPEG")
    images = find_images(tmp_path)
    assert images.files == ("a.jfif", "b.JFIF", "c.pnm")
    assert all(Decoder()(images.path(i)).size == (8, 8) for i in range(3))


def test_heic_needs_a_package(tmp_path, monkeypatch):
    write_photos(tmp_path, count=1)
    (tmp_path / "a.heic").touch()
    (tmp_path / "b.HEIC").touch()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    images = find_images(tmp_path)
    assert len(images) == 1
    assert "left out 2 .heic file(s), which Pillow reads with the package pillow-heif" in images.notes[0]
    called = []
    package = types.SimpleNamespace(register_heif_opener=lambda: called.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    assert len(find_images(tmp_path)) == 3
    assert called


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
            Decoder()(tmp_path / name)
        assert error.value.path == tmp_path / name


def test_centre_crop_keeps_proportions():
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = 255
    assert (to_array(centre_crop(Image.fromarray(image), (8, 8)), 3) == 255).all()
    assert centre_crop(Image.fromarray(image), (8, 16)).size == (16, 8)
    assert centre_crop(Image.fromarray(image[:2, :2]), (8, 8)).size == (8, 8)


@pytest.mark.parametrize(("mode", "channels", "bits"), [("F", 1, 16), ("L", 1, 8), ("L", 3, 8), ("RGB", 3, 8)])
def test_pixels_may_be_written_to(mode, channels, bits):
    """Else torch warns of each image."""
    image = Image.new(mode, (5, 4), 3.0 if mode == "F" else 3 if mode == "L" else (3, 3, 3))
    pixels = to_array(image, channels, bits)
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous
    assert pixels.shape == (channels, 4, 5)

"""What is black and white: one rule for a whole data set, never one image alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from maefast.data.images.batch import normalise, normaliser
from maefast.data.images.files import find_images
from maefast.data.images.pixels import Decoder, to_array
from maefast.data.images.value_range import settle
from maefast.train import BadImage, ConfigError, pretrain
from maefast.train.config import load_config, parse_value_range
from maefast.train.reconstruct import reconstruct_files
from tests.train.common import losses, tiny_config


def write(folder, dtype, *ranges, suffix="tif", size=16):
    """One grey image for each (low, high), with these extremes and everything between."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (low, high) in enumerate(ranges):
        values = np.linspace(low, high, size * size).reshape(size, size)
        Image.fromarray(values.astype(dtype)).save(folder / f"{i}.{suffix}")
    return folder


def decoded(folder, value_range="auto", **options):
    """The grey levels of all images of a folder, and the lines that were said."""
    images = find_images(folder)
    decoder, lines = settle(images, Decoder(channels=1, **options), value_range)
    return [np.asarray(decoder(images.path(i))) for i in range(len(images))], lines


# --- the figures of the report: each was nearly black ---------------------------------------------------------


def test_floats_a_little_above_one(tmp_path):
    """A maximum of 1.02 once made 255 white."""
    (first, second), lines = decoded(write(tmp_path, np.float32, (0, 1.02), (0, 0.5)))
    assert (first.min(), first.max(), second.max()) == (0, 255, 128)  # what is above white is white
    assert "float images: 0 is black and 1 white" in lines[0]


def test_int32_of_bytes(tmp_path):
    (first, second), lines = decoded(write(tmp_path, np.int32, (0, 255), (0, 60)))
    assert (first.max(), second.max()) == (255, 60)
    assert "32-bit signed images: 0 is black and 255 white" in lines[0]


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_twelve_bits_in_sixteen(tmp_path, suffix):
    folder = write(tmp_path, np.uint16, (0, 4095), (100, 3000), suffix=suffix)
    (first, _), (line,) = decoded(folder)
    assert first.max() == 16  # by their bits; and it is told
    assert "12-bit data? --value-range 0,4095" in line
    (first, second), lines = decoded(folder, "0,4095")
    assert (first.min(), first.max()) == (0, 255)
    assert (second.min(), second.max()) == (6, 187)
    assert lines == []


def test_ten_thousand(tmp_path):
    """Reflectances of satellites."""
    folder = write(tmp_path, np.uint16, (0, 10000))
    (first,), (line,) = decoded(folder)
    assert first.max() == 39
    assert "14-bit data?" in line
    (first,), _ = decoded(folder, "0,10000")
    assert first.max() == 255


# --- one rule for a set ---------------------------------------------------------------------------------------


def test_a_dark_image_stays_dark(tmp_path):
    """The scale is the set's: a dim image among bright ones is not stretched."""
    (_, dim, bright), _ = decoded(write(tmp_path, np.float32, (0, 1), (0, 0.1), (0.8, 1)))
    assert (dim.max(), bright.min()) == (26, 204)


def test_a_set_of_floats_up_to_255(tmp_path):
    (first, second), _ = decoded(write(tmp_path, np.float32, (0, 1), (0, 255)))
    assert (first.max(), second.max()) == (1, 255)  # each once had a scale of its own


def test_values_without_a_usual_scale_are_refused_with_a_proposal(tmp_path):
    for i, values in enumerate(((-1000, 3000), (0, 1e6))):
        folder = write(tmp_path / str(i), np.float32, values)
        with pytest.raises(ConfigError, match=rf"from {values[0]:g} to .*--value-range {values[0]:g},"):
            decoded(folder)
    (first,), _ = decoded(tmp_path / "0", "-1000,1000")
    assert first[0, 0] == 0
    assert first[-1, -1] == 255


def test_a_stray_file_of_another_kind_is_not_guessed(tmp_path):
    """Without a sample of its kind a float has white at 1, and more than that is refused, not made black."""
    write(tmp_path, np.float32, (0, 255))
    with pytest.raises(BadImage, match=r"0\.tif.*from 0 to 255, where 0 is black and 1 is white: --value-range"):
        Decoder()(tmp_path / "0.tif")
    write(tmp_path, np.float32, (-1, 1))
    with pytest.raises(BadImage, match="pixel values from -1 to 1"):
        Decoder()(tmp_path / "0.tif")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(BadImage, match="not all of its pixel values are finite"):
        Decoder(value_range=(0, 1))(tmp_path / "nan.tif")


def test_a_range_holds_for_every_file_also_of_eight_bits(tmp_path):
    folder = write(tmp_path, np.uint8, (0, 60), suffix="png")
    (first,), lines = decoded(folder)
    assert first.max() == 60
    assert lines == []
    (first,), _ = decoded(folder, "0,60")
    assert first.max() == 255
    Image.fromarray(np.full((2, 2, 3), (0, 30, 60), np.uint8)).save(folder / "colour.png")
    assert np.asarray(Decoder(value_range=(0, 60))(folder / "colour.png"))[0, 0].tolist() == [0, 128, 255]


def test_percentiles(tmp_path):
    folder = write(tmp_path, np.uint16, (0, 10000), (0, 10000))
    images = find_images(folder)
    decoder, (line,) = settle(images, Decoder(1), "10%,90%")
    low, high = decoder.value_range
    assert (low, high) == pytest.approx((1000, 9000), rel=0.02)
    assert f"is {low:g},{high:g} in a sample of 2 images" in line
    assert settle(images, Decoder(1), "10%,90%")[0] == decoder
    write(folder, np.uint8, (0, 255), suffix="png")
    with pytest.raises(ConfigError, match="need images of one kind, and the set has"):
        settle(find_images(folder), Decoder(1), "10%,90%")
    with pytest.raises(ConfigError, match="both percentiles of the sample are 7"):
        decoded(write(tmp_path / "flat", np.uint8, (7, 7)), "1%,99%")


def test_hardly_used_ranges_are_told(tmp_path):
    _, (line,) = decoded(write(tmp_path / "a", np.uint16, (0, 255)))
    assert "0.4% of the range from 0 to 65535 is used" in line
    assert "--value-range 0,255 would use it all" in line
    _, (line,) = decoded(write(tmp_path / "b", np.uint16, (0, 255)), "0,60000")
    assert "0.4% of the range from 0 to 60000" in line
    _, lines = decoded(write(tmp_path / "c", np.uint16, (0, 60000)))
    assert lines == []


def test_bits_that_a_file_tells(tmp_path):
    """A PGM's maximum; white-is-zero is turned round. TIFF's MaxSampleValue may be that of the one image: no scale."""
    tifffile = pytest.importorskip("tifffile")
    values = np.array([[0, 2048, 4095]], np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=[(281, 3, 1, 4095, True)])
    tifffile.imwrite(tmp_path / "b.tif", values * 16, photometric="miniswhite")
    (tmp_path / "c.pgm").write_bytes(b"P5 3 1 4095\n" + values.astype(">u2").tobytes())
    (a, b, c), _ = decoded(tmp_path)
    assert a.tolist() == [[0, 8, 16]]
    assert c.tolist() == [[0, 128, 255]]
    assert b.tolist() == [[255, 127, 0]]


def test_a_range_is_in_units_of_the_file(tmp_path):
    """Pillow stretches a PGM to its maximum, and reads sixteen bits of colour with eight."""
    values = np.array([[0, 511, 1023]], np.uint16)
    (tmp_path / "a.pgm").write_bytes(b"P5\n# a comment\n3 1 1023\n" + values.astype(">u2").tobytes())
    (tmp_path / "b.pgm").write_bytes(b"P5 3 1 15\n" + bytes([0, 7, 15]))
    assert np.asarray(Decoder(1, value_range=(0, 1023))(tmp_path / "a.pgm")).tolist() == [[0, 127, 255]]
    assert np.asarray(Decoder(1, value_range=(0, 7))(tmp_path / "b.pgm")).tolist() == [[0, 255, 255]]
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "c.tif", np.full((4, 4, 3), 16384, np.uint16), photometric="rgb")
    assert np.asarray(Decoder(3, value_range=(0, 32768))(tmp_path / "c.tif")).ravel()[0] in (127, 128)


def test_unsigned_and_signed_integers(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.array([[0, 2**31, 2**32 - 1]], np.uint32))
    assert np.asarray(Decoder(1, value_range=(0, 2**32 - 1))(tmp_path / "a.tif")).tolist() == [[0, 128, 255]]
    tifffile.imwrite(tmp_path / "b.tif", np.array([[-60, 4, 67]], np.int8))
    with pytest.raises(BadImage, match="signed 8-bit values"):
        Decoder(1)(tmp_path / "b.tif")


def test_the_sample_follows_no_pattern_in_names(tmp_path):
    """Every other file of another scale: a regular step saw one half alone."""
    write(tmp_path, np.float32, *[(0, 255 if i % 2 else 1) for i in range(511)], size=2)
    _, lines = decoded(tmp_path)
    assert "255 white" in lines[0]
    assert "files use less than 5% of the range" in lines[1]


def test_files_that_no_sample_showed(tmp_path):
    """One file in six hundred: its kind has no scale, and gets none."""
    write(tmp_path, np.uint8, *[(0, 255)] * 300, suffix="png", size=2)
    write(tmp_path / "z", np.int32, (0, 255))
    images = find_images(tmp_path)
    decoder = Decoder(1)
    with pytest.raises(BadImage, match="no sample of the set had 32-bit signed images"):
        decoder(images.path(300))
    write(tmp_path / "z", np.float32, (0, 1))
    assert np.asarray(decoder(images.path(300))).max() == 255


def test_hot_pixels_set_no_scale(tmp_path):
    for i in range(3):
        values = np.linspace(0, 1, 64 * 64).reshape(64, 64).astype(np.float32)
        values[0, 0], values[0, 1] = 5000, -3
        Image.fromarray(values).save(tmp_path / f"{i}.tif")
    images, lines = decoded(tmp_path)
    assert "1 white" in lines[0]
    assert 120 < images[0].mean() < 136
    values[: 64 // 8] = 3  # an eighth of them is no stray any more
    Image.fromarray(values).save(tmp_path / "3.tif")
    with pytest.raises(BadImage, match=r"3\.tif.*where 0 is black and 1 is white"):
        Decoder(1, scale={"float": 1.0})(tmp_path / "3.tif")


def test_percentiles_see_every_channel_and_no_hidden_pixel(tmp_path):
    rng = np.random.default_rng(0)
    colours = np.stack(
        [rng.integers(0, 51, (256, 256)), rng.integers(0, 256, (256, 256)), rng.integers(100, 256, (256, 256))], -1
    )
    Image.fromarray(colours.astype(np.uint8)).save(tmp_path / "a.png")
    decoder, _ = settle(find_images(tmp_path), Decoder(3), "1%,99%")
    assert decoder.value_range == pytest.approx((0, 252), abs=4)
    clear = np.full((64, 64, 4), (10, 10, 10, 0), np.uint8)
    clear[:32] = (200, 200, 200, 255)
    Image.fromarray(clear).save(tmp_path / "a.png")
    decoder, _ = settle(find_images(tmp_path), Decoder(3), "0%,100%")
    assert decoder.value_range == (200, 255)  # what is clear is white


def test_ranges_that_do_not_suit(tmp_path):
    _, (line,) = decoded(write(tmp_path / "a", np.uint8, (0, 255), suffix="png"), "0,1")
    assert "% of them are outside of the range from 0 to 1" in line
    _, (line,) = decoded(write(tmp_path / "b", np.uint8, (0, 255), suffix="png"), "0,4095")
    assert "of the range from 0 to 4095 they can use 6%" in line
    _, (line,) = decoded(write(tmp_path / "c", np.uint16, (0, 1000)))
    assert "10-bit data? --value-range 0,1023" in line


def test_the_sample_needs_little_memory(tmp_path):
    """Views into whole images once kept all of them."""
    import tracemalloc

    for i in range(8):
        Image.fromarray(np.zeros((1500, 2000, 3), np.uint8)).save(tmp_path / f"{i}.png", compress_level=1)
    images = find_images(tmp_path)
    tracemalloc.start()
    settle(images, Decoder(3), "0,200")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 * 2**20


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", None), (None, None), ("0,4095", (0, 4095)), ([0, 1.5], (0, 1.5)), ("-10, 1e3", (-10, 1000)),
     ("1%,99%", "1%,99%"), (" 0.5% , 99.5% ", "0.5%,99.5%")],
)  # fmt: skip
def test_ranges_are_read(text, value):
    assert parse_value_range(text) == value


@pytest.mark.parametrize("text", ["", "1", "a,b", "3,1", "1,1", "1%,99", "-1%,50%", "1%,101%", "0,inf", [1, 2, 3], 7])
def test_ranges_that_make_no_sense(text):
    with pytest.raises(ConfigError, match="--value-range"):
        parse_value_range(text)


# --- sixteen bits ---------------------------------------------------------------------------------------------


def test_sixteen_bits_reach_the_model(tmp_path):
    write(tmp_path, np.uint16, (0, 65535), size=32)
    image = Decoder(channels=3, bits=16)(tmp_path / "0.tif")
    pixels = to_array(image, 3, 16)
    assert pixels.dtype == np.uint16
    assert pixels.shape == (3, 32, 32)
    want = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)
    assert all(np.array_equal(channel, want) for channel in pixels)
    assert len(np.unique(to_array(Decoder(channels=3)(tmp_path / "0.tif"), 3))) == 256
    mean, std = normaliser(3)
    got = normalise(torch.from_numpy(pixels[None]), mean, std)
    torch.testing.assert_close(got[0, 1], (torch.from_numpy(want / 65535).float() - 0.456) / 0.224)


def test_eight_bits_are_the_same_in_sixteen(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    mean, std = normaliser(3)
    one, two = (
        normalise(torch.from_numpy(to_array(Decoder(bits=bits)(tmp_path / "a.png"), 3, bits)[None]), mean, std)
        for bits in (8, 16)
    )
    assert torch.equal(one, two)


# --- a run ----------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_range(tmp_path, capsys):
    folder = write(tmp_path / "data", np.uint16, *[(0, 2000 + 500 * i) for i in range(5)])
    config = tiny_config(folder, tmp_path / "out", steps=2, picture_rows=2, value_range="0%,100%")
    pretrain(config)
    assert "--value-range 0%,100% is 0,4000 in a sample of 5 images" in capsys.readouterr().out
    assert load_config(tmp_path / "out" / "config.yaml")["value_range"] == [0, 4000]
    config.steps = 3
    pretrain(config)
    assert "value_range:" not in capsys.readouterr().out
    config.value_range, config.steps = "0,8000", 4
    pretrain(config)
    assert "value_range: [0.0, 4000.0] -> [0.0, 8000.0]" in capsys.readouterr().out


def test_percentiles_are_kept_though_the_data_grow(tmp_path, capsys):
    folder = write(tmp_path / "data", np.uint16, *[(0, 4000)] * 4)
    config = tiny_config(folder, tmp_path / "out", steps=2, value_range="0%,100%")
    pretrain(config)
    write(folder, np.uint16, *[(0, 4000)] * 4, (0, 60000))
    config.steps = 3
    pretrain(config)
    assert "value_range:" not in capsys.readouterr().out
    assert load_config(tmp_path / "out" / "config.yaml")["value_range"] == [0, 4000]


def test_checkpoints_of_the_older_rule_say_so(tmp_path, capsys):
    folder = write(tmp_path / "data", np.float32, *[(0, 1)] * 4)
    config = tiny_config(folder, tmp_path / "out", steps=2)
    pretrain(config)
    for path in (tmp_path / "out" / "checkpoints").glob("*/state.json"):
        document = json.loads(path.read_text())
        del document["extra"]["scale"]
        path.write_text(json.dumps(document))
    config.steps = 3
    pretrain(config)
    assert "once had a scale for each image" in capsys.readouterr().out


def test_a_run_notices_another_scale(tmp_path, capsys):
    folder = write(tmp_path / "data", np.float32, *[(0, 1)] * 4)
    config = tiny_config(folder, tmp_path / "out", steps=2)
    pretrain(config)
    write(folder, np.float32, *[(0, 200)] * 4)
    config.steps = 3
    pretrain(config)
    assert "value of white: 1.0 -> 255.0" in capsys.readouterr().out


def test_pictures_afterwards_follow_the_run(tmp_path):
    """`reconstruct` of one image must not find a scale of its own."""
    folder = write(tmp_path / "data", np.uint16, (0, 4095), (0, 2000), (0, 300), size=32)
    pretrain(tiny_config(folder, tmp_path / "out", steps=1, value_range="0,4095"))
    for name, options in (("run", {}), ("told", {"value_range": "0,4095"}), ("other", {"value_range": "0,300"})):
        reconstruct_files(tmp_path / "out", [folder / "2.tif"], tmp_path / f"{name}.png", **options)
    run, told, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("run", "told", "other"))
    assert run == told
    assert run != other


def test_sixteen_bits_in_a_run(tmp_path):
    folder = write(tmp_path / "data", np.uint16, *[(0, 50000 + i) for i in range(4)])
    for bits in (8, 16):
        options = {"steps": 2, "picture_rows": 2, "pixel_bits": bits, "workers": bits // 16}
        pretrain(tiny_config(folder, tmp_path / str(bits), **options))
    assert losses(tmp_path / "8") != losses(tmp_path / "16")
    eight, sixteen = (float(losses(tmp_path / bits)[0][1]) for bits in ("8", "16"))
    assert eight == pytest.approx(sixteen, rel=0.05)

"""Images of numbers with any number of channels, for masked autoencoders (--channels) and ChA-MAEViT."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from maefast.data.blob import Blob
from maefast.data.channel_files import read_channels
from maefast.data.channel_scale import Scale
from maefast.data.channels import ChannelBatch, Channels
from maefast.data.images import Images
from maefast.errors import BadFile, ConfigError, TrainError
from maefast.recipes.masked_images import MaskedImages
from maefast.train import PretrainConfig, checkpoint, pretrain
from maefast.train.config import load_config
from maefast.train.export import export_file
from maefast.train.probe import Options, probe
from maefast.train.reconstruct import reconstruct_files
from tests.data.sources import goes_on_when_killed, write_tar
from tests.train.common import TINY, in_two_parts, losses, tiny_config

tifffile = pytest.importorskip("tifffile")

DTYPES = ("uint8", "int16", "uint16", "int32", "uint32", "float16", "float32", "float64")


def image(seed=0, channels=5, shape=(24, 20), dtype="float32", scale=100.0, shift=1000.0):
    values = np.random.default_rng(seed).standard_normal((channels, *shape)) * scale + shift
    if np.dtype(dtype).kind != "f":
        values = values.clip(*(np.iinfo(dtype).min, np.iinfo(dtype).max)).round()
    return values.astype(dtype)


def write_arrays(folder, count=10, **more):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        np.save(folder / f"{index:02}.npy", image(index, shape=(24 + index, 30 - index), **more))
    return folder


def config(data, out, **changes):
    return tiny_config(data, out, **{"channels": 5, **changes})


def options(**changes):
    return PretrainConfig(**{"data": "x", "channels": 5, **changes})


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_and_tiffs_of_any_type(tmp_path, dtype):
    want = image(channels=4, dtype=dtype)
    np.save(tmp_path / "first.npy", want)
    np.save(tmp_path / "last.npy", want.transpose(1, 2, 0))
    np.savez(tmp_path / "a.npz", image=want)
    tifffile.imwrite(tmp_path / "pages.tif", want, photometric="minisblack")
    tifffile.imwrite(tmp_path / "planar.tiff", want, photometric="minisblack", planarconfig="separate")
    tifffile.imwrite(tmp_path / "last.tif", want.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "zip.tif", want, photometric="minisblack", compression="zlib")
    tifffile.imwrite(tmp_path / "big.tif", want.astype(want.dtype.newbyteorder(">")), byteorder=">",
                     photometric="minisblack")  # fmt: skip
    with tifffile.TiffWriter(tmp_path / "one.tif") as writer:
        for page in want:
            writer.write(page, photometric="minisblack", contiguous=False)
    for path in sorted(tmp_path.iterdir()):
        found = read_channels(path, 4)
        assert found.shape == want.shape
        assert np.array_equal(found, want), path.name


def test_compressed_tiffs(tmp_path):
    pytest.importorskip("imagecodecs")
    want = image(channels=3, dtype="uint16")
    tifffile.imwrite(tmp_path / "a.tif", want, photometric="minisblack", compression="lzw", predictor=True)
    assert np.array_equal(read_channels(tmp_path / "a.tif", 3), want)


def test_pages_of_different_types(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(np.ones((6, 5), np.uint8), photometric="minisblack", contiguous=False)
        writer.write(np.full((6, 5), 0.5, np.float32), photometric="minisblack", contiguous=False)
    assert read_channels(tmp_path / "a.tif", 2)[:, 0, 0].tolist() == [1, 0.5]


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_pictures_are_numbers_too(tmp_path, mode):
    bands = len(Image.new(mode, (1, 1)).getbands())
    ending = {"CMYK": "jpg", "F": "tiff"}.get(mode, "png")
    want = image(channels=bands, dtype={"I;16": "uint16", "F": "float32"}.get(mode, "uint8"), shift=100)
    pixels = want[0] if bands == 1 else want.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels), mode=None if mode in ("I;16", "F", "L", "RGB") else mode).save(
        tmp_path / f"a.{ending}", quality=95
    )
    found = read_channels(tmp_path / f"a.{ending}", bands)
    assert found.shape == want.shape
    assert ending == "jpg" or np.array_equal(found, want)


def test_what_does_not_fit_is_named(tmp_path):
    def refused(name, match, count=4, write=None):
        if write is not None:
            write(tmp_path / name)
        with pytest.raises((ValueError, OSError), match=match):
            read_channels(tmp_path / name, count)

    wanted = r"an image is numbers \[4, height, width\] or \[height, width, 4\], not "
    refused("a.npy", wanted + r"float32 \[5, 24, 20\] \(see --channels\)", write=lambda p: np.save(p, image()))
    refused("a.npy", wanted + r"complex128 \[4, 3, 3\]", write=lambda p: np.save(p, np.ones((4, 3, 3), complex)))
    refused("a.npy", wanted + r"float64 \[4, 0, 3\]", write=lambda p: np.save(p, np.ones((4, 0, 3))))
    refused("a.npy", wanted + r"bool \[4, 3, 3\]", write=lambda p: np.save(p, np.ones((4, 3, 3), bool)))
    refused("a.npy", wanted + r"float64 \[2, 4, 3, 3\]", write=lambda p: np.save(p, np.ones((2, 4, 3, 3))))
    refused("a.npz", "the file holds x, y", write=lambda p: np.savez(p, x=image(), y=image()))
    refused("a.tif", wanted + r"a TIFF of uint8 \[3, 24, 20\], axes \w+", write=lambda p: tifffile.imwrite(
        p, image(channels=3, dtype="uint8"), photometric="minisblack"))  # fmt: skip
    refused("a.png", wanted + r"uint8 \[9, 8, 3\]", write=lambda p: Image.new("RGB", (8, 9)).save(p))
    refused("a.gif", "Pillow's mode P, which are no channels", write=lambda p: Image.new("P", (8, 9)).save(p))
    for name in ("a.npy", "a.npz", "a.tif", "a.png"):
        refused(name, ".", write=lambda p: p.write_bytes(b"no image"))
    whole = io.BytesIO()
    tifffile.imwrite(whole, image(channels=4), photometric="minisblack")
    half = whole.getvalue()[: len(whole.getvalue()) // 2]
    refused("a.tif", ".", write=lambda p: p.write_bytes(half))
    with pytest.raises((ValueError, OSError)):
        read_channels(Blob("x.tar/a.tif", lambda: half), 4)
    with pytest.raises(ValueError, match="8 x 9 pixels are more than 50"):
        read_channels(_saved(tmp_path / "b.png", Image.new("RGB", (8, 9))), 3, max_pixels=50)


def _saved(path, picture):
    picture.save(path)
    return path


def test_files_are_mapped(tmp_path):
    np.save(tmp_path / "a.npy", image())
    tifffile.imwrite(tmp_path / "a.tif", image(), photometric="minisblack")
    assert isinstance(read_channels(tmp_path / "a.npy", 5), np.memmap)
    assert isinstance(read_channels(tmp_path / "a.tif", 5).base, np.memmap)


# --- scale --------------------------------------------------------------------------------------------------


def test_the_scale_is_estimated_from_a_sample(tmp_path):
    data = write_arrays(tmp_path / "a")
    for path in data.iterdir():
        np.save(path, np.load(path) * np.array([1, 2, 3, 4, 5]).reshape(5, 1, 1))
    source = Channels(5, (16, 16), own_scale=False).open(options(data=str(data)))
    values = np.concatenate([np.load(path).reshape(5, -1) for path in sorted(data.iterdir())], 1)
    np.testing.assert_allclose(source.settled["mean"], values.mean(1), rtol=1e-4)
    np.testing.assert_allclose(source.settled["std"], values.std(1), rtol=1e-4)
    assert "estimated from a sample of 10 image(s), and kept: --mean 998." in source.notes[0]
    batch, names = source.examples(4)
    assert batch.images.dtype is torch.float32
    assert batch.images.shape == (4, 5, 16, 16)
    assert batch.present is None
    assert batch.images.mean().abs() < 0.05
    assert names[0] == "00.npy"
    again = Channels(5, (16, 16), own_scale=False).open(options(data=str(data)))
    assert again.settled == source.settled
    assert again.record() == source.record()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_become_what_the_scale_says(dtype):
    scale = Scale.of(options(mean=[1000.0], std="100,100,100,100,200"), 5)
    raw = image(dtype=dtype)
    want = (raw.astype(np.float64) - 1000) / np.array([100, 100, 100, 100, 200]).reshape(5, 1, 1)
    np.testing.assert_allclose(scale(raw), want, rtol=2e-5, atol=2e-5)
    assert scale(raw).dtype == np.float32
    spanned = Scale.of(options(mean=0.5, std=0.25, value_range=[900, 1100]), 5)
    want = ((raw.astype(np.float64).clip(900, 1100) - 900) / 200 - 0.5) / 0.25
    np.testing.assert_allclose(spanned(raw), want, rtol=1e-4, atol=1e-4)


def test_small_differences_of_large_numbers():
    """A float64 or 32-bit value minus the mean is taken before anything is rounded to float32."""
    scale = Scale.of(options(mean=3e9, std=1.0, channels=1), 1)
    for dtype in ("uint32", "float64"):
        raw = (3e9 + np.arange(12.0)).reshape(1, 3, 4).astype(dtype)
        assert scale(raw).ravel().tolist() == list(range(12))


def test_pixels_without_a_value():
    scale = Scale.of(options(mean=1000.0, std=100.0), 5)
    raw = image(dtype="float64")
    good = scale(raw)
    raw[0, 3, 4], raw[1, 0, 0], raw[2, 1, 1] = np.nan, np.inf, 1e300
    found = scale(raw)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0, 3, 4], np.delete(good[0].ravel(), 3 * 20 + 4).mean(), rtol=1e-4)
    assert np.array_equal(found[3:], good[3:])
    raw[4] = np.nan
    with pytest.raises(ValueError, match="channel 4 has no finite value"):
        scale(raw)


def test_scales_that_make_no_sense(tmp_path):
    data = write_arrays(tmp_path / "a", count=2)
    wants = Channels(5, (16, 16), own_scale=False)
    with pytest.raises(ConfigError, match="--mean wants one number, or one for each of 5 channels, not 3"):
        wants.open(options(data=str(data), mean="1,2,3"))
    with pytest.raises(ConfigError, match="--std wants numbers, such as"):
        options(std="a,b")
    with pytest.raises(ConfigError, match="--mean wants finite numbers"):
        options(mean=[float("nan")])
    with pytest.raises(ConfigError, match="--std must be positive"):
        options(std=[1.0, 0.0], output_dir=str(tmp_path)).check()
    with pytest.raises(ConfigError, match="--mean and --std go with --channels"):
        options(channels=None, mean=0.5, output_dir=str(tmp_path)).check()
    with pytest.raises(ConfigError, match="percentiles are of photographs"):
        wants.open(options(data=str(data), value_range="1%,99%"))
    with pytest.raises(ConfigError, match="--pixel-bits is for photographs"):
        options(pixel_bits=16, output_dir=str(tmp_path)).check()
    flat = np.load(data / "00.npy")
    flat[2] = 7
    for path in data.iterdir():
        np.save(path, flat)
    source = wants.open(options(data=str(data)))
    assert source.settled["std"][2] == 1
    assert "channel(s) 2 have one value throughout" in source.notes[0]
    flat[2] = np.nan
    for path in data.iterdir():
        np.save(path, flat)
    with pytest.raises(ConfigError, match="channel 2 has no finite value in a sample"):
        wants.open(options(data=str(data)))


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mae", "fcmae", "spark_resnet50"])
def test_models_take_any_number_of_channels(tmp_path, model):
    from maefast.train.build import build_recipe

    given = {"model": model, "patch_size": None, "img_size": 64, "model_args": TINY if model == "mae" else {}}
    if model == "fcmae":
        given["model_args"] = {"depths": [1, 1, 1, 1], "widths": [8, 8, 16, 16], "decoder_embed_dim": 16}
    recipe = build_recipe(options(**given, mask_ratio=0.5))
    assert isinstance(recipe, MaskedImages)
    assert recipe.wants == Channels(5, (64, 64), own_scale=False)
    loss = recipe(ChannelBatch(torch.randn(2, 5, 64, 64))).loss
    assert loss.isfinite()
    with pytest.raises(ValueError, match="some lack one"):
        recipe(ChannelBatch(torch.randn(2, 5, 64, 64), torch.tensor([[True] * 5, [True] * 4 + [False]])))
    with pytest.raises(ConfigError, match="--channels 5, and in_chans is 4"):
        build_recipe(options(**{**given, "model_args": {**given["model_args"], "in_chans": 4}}))
    for changes, arguments, message in (
        ({"img_size": 32}, {"img_size": 64}, "--img-size 32, and img_size is 64: leave one out"),
        ({"norm_pix": False}, {"norm_pix_loss": True}, "--no-norm-pix, and norm_pix_loss is True: leave one out"),
        ({}, {"norm_pix_loss": "no"}, "norm_pix_loss must be true or false, not 'no'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_recipe(options(**{**given, **changes, "model_args": {**given.get("model_args", {}), **arguments}}))


def test_a_run_goes_on_bit_for_bit_with_its_scale(tmp_path, monkeypatch):
    """What was estimated is written down and kept, also when the data have grown."""
    data = write_arrays(tmp_path / "a", dtype="uint16")
    pretrain(config(data, tmp_path / "whole", workers=1, picture_rows=2))
    in_two_parts(config(data, tmp_path / "parts"), monkeypatch, stop=7)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert Image.open(tmp_path / "whole" / "reconstruction.png").size[0] > 100
    scale = load_config(tmp_path / "whole" / "config.yaml")
    assert len(scale["mean"]) == len(scale["std"]) == 5
    state = checkpoint.read_state(checkpoint.latest(tmp_path / "whole" / "checkpoints")[0])
    assert state.config["mean"] == scale["mean"]
    np.save(data / "99.npy", 10 * image(99, dtype="uint16"))
    pretrain(config(data, tmp_path / "whole", steps=13))
    assert load_config(tmp_path / "whole" / "config.yaml")["mean"] == scale["mean"]
    pretrain(config(data, tmp_path / "new", steps=2))
    assert load_config(tmp_path / "new" / "config.yaml")["mean"] != scale["mean"]


def test_another_scale_is_told(tmp_path, capsys):
    data = write_arrays(tmp_path / "a")
    pretrain(config(data, tmp_path / "out", mean=1000.0, std=100.0, steps=6))
    capsys.readouterr()
    pretrain(config(data, tmp_path / "out", mean=900.0, std=100.0, steps=7))
    assert f"mean: {[1000.0] * 5} -> {[900.0] * 5}" in capsys.readouterr().out


@pytest.mark.parametrize("step", [2, 8])
def test_a_run_that_is_killed(tmp_path, step):
    data = write_arrays(tmp_path / "a")
    goes_on_when_killed(config(data, tmp_path / "whole", save_every=1, workers=1), tmp_path / "out", step)


def test_every_place_gives_the_same_run(tmp_path):
    """A folder, a list, a tar, an array of all images, TIFFs: the same numbers."""
    folder = tmp_path / "a"
    folder.mkdir()
    images = [image(index, dtype="uint16") for index in range(10)]
    for index, part in enumerate(images):
        np.save(folder / f"{index}.npy", part)
    (tmp_path / "list.txt").write_text("".join(f"a/{index}.npy\n" for index in range(10)))
    write_tar(tmp_path / "a.tar", ((f"{i}.npy", (folder / f"{i}.npy").read_bytes()) for i in range(10)))
    np.save(tmp_path / "all.npy", np.stack(images).transpose(0, 2, 3, 1))
    (tmp_path / "tiffs").mkdir()
    for index, part in enumerate(images):
        tifffile.imwrite(tmp_path / "tiffs" / f"{index}.tif", part, photometric="minisblack")
    for name in ("a", "list.txt", "a.tar", "all.npy", "tiffs"):
        pretrain(config(tmp_path / name, tmp_path / f"out-{name}", steps=4))
        assert losses(tmp_path / f"out-{name}") == losses(tmp_path / "out-a")


def test_one_image_is_a_data_set(tmp_path):
    np.save(tmp_path / "one.npy", image(shape=(90, 70)))
    pretrain(config(tmp_path / "one.npy", tmp_path / "out", steps=2))
    assert len(losses(tmp_path / "out")) == 2


def test_errors_before_a_run(tmp_path):
    data = write_arrays(tmp_path / "a", count=3)
    with pytest.raises(BadFile, match=r"00\.npy: an image is numbers \[4, height, width\].* not float32 \[5, 24, 30\]"):
        pretrain(config(data, tmp_path / "out", channels=4))
    with pytest.raises(BadFile, match="none of a sample of the images can be read"):
        pretrain(config(data, tmp_path / "out", channels=4, skip_bad=True))
    with pytest.raises(ConfigError, match=r"3 array\(s\), such as 00\.npy, are read with --channels N"):
        pretrain(config(data, tmp_path / "out", channels=None))
    with pytest.raises(TrainError, match="the model wants 5: --channels 5"):
        pretrain(config(data, tmp_path / "out", channels=None, model_args={**TINY, "in_chans": 5}))
    np.save(tmp_path / "all.npy", np.zeros((3, 4, 8, 8)))
    with pytest.raises(ConfigError, match=r"all\.npy: float64 \[3, 4, 8, 8\], images \[N, 5, height, width\]"):
        pretrain(config(tmp_path / "all.npy", tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"with --channels N an array of them"):
        pretrain(config(tmp_path / "all.npy", tmp_path / "out", channels=None))
    np.save(tmp_path / "zero.npy", np.float32(3))
    with pytest.raises(ConfigError, match="no images in it"):
        pretrain(config(tmp_path / "zero.npy", tmp_path / "out"))


def test_a_bad_image_among_good_ones(tmp_path):
    data = write_arrays(tmp_path / "a")
    np.save(data / "03.npy", image(channels=4))
    with pytest.raises(BadFile, match=r"03\.npy: an image is .*--skip-bad"):
        pretrain(config(data, tmp_path / "strict"))
    result = pretrain(config(data, tmp_path / "lax", skip_bad=True))
    assert [name.rpartition("/")[2] for name in result.bad] == ["03.npy"]
    empty = image(3)
    empty[1] = np.nan
    np.save(data / "03.npy", empty)
    with pytest.raises(BadFile, match=r"03\.npy: channel 1 has no finite value"):
        pretrain(config(data, tmp_path / "gap"))


def test_what_runs_leave_is_no_data(tmp_path):
    """Pictures of a run in the folder of its data are left out."""
    write_arrays(tmp_path)
    pretrain(config(tmp_path, tmp_path / "out", picture_rows=2, steps=3))
    pretrain(config(tmp_path, tmp_path / "out", picture_rows=2, steps=4))
    assert len(losses(tmp_path / "out")) == 4


def test_reconstruct_and_export(tmp_path):
    data = write_arrays(tmp_path / "a", dtype="uint16")
    pretrain(config(data, tmp_path / "out", steps=3))
    target = tmp_path / "seen.png"
    reconstruct_files(tmp_path / "out", [data / "00.npy", data / "01.npy"], target)
    assert Image.open(target).size[0] > 100
    np.save(tmp_path / "x.npy", image(channels=4))
    with pytest.raises(BadFile, match=r"x\.npy: an image is numbers \[5"):
        reconstruct_files(tmp_path / "out", [tmp_path / "x.npy"], target)
    lines = export_file(tmp_path / "out", tmp_path / "a.safetensors", "timm")
    assert any("normalised by the run's own scale: mean [" in line for line in lines)


def test_probe(tmp_path):
    """Features of images of numbers, read and normalised as the run did it."""
    for name in "ab":
        write_arrays(tmp_path / "data" / name, count=4)
    pretrain(config(tmp_path / "data", tmp_path / "out", steps=1))
    found = probe(tmp_path / "out", str(tmp_path / "data"), tmp_path / "probe", Options(baselines=True), say=str)
    assert (found["classes"], found["learnt_from"] + found["held_back"]) == (["a", "b"], 8)
    assert found["baselines"].keys() == {"random weights", "pixels"}


def test_tiffs_for_cha_maevit(tmp_path):
    for index in range(3):
        tifffile.imwrite(tmp_path / f"{index}.tif", image(index, channels=4, dtype="uint16"), photometric="minisblack")
    source = Channels(4, (16, 16)).open(options(data=str(tmp_path), channels=4))
    batch, names = source.examples(3)
    assert names == ["0.tif", "1.tif", "2.tif"]
    torch.testing.assert_close(batch.images.mean((2, 3)), torch.zeros(3, 4), atol=1e-4, rtol=0)
    run = tiny_config(
        tmp_path, tmp_path / "out", recipe="cha_maevit", channels=4, patch_size=4, steps=2, graph="off",
        model_args={"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_num_heads": 2}, model="mae_base",
    )  # fmt: skip
    pretrain(run)
    assert len(losses(tmp_path / "out")) == 2
    run.mean = [1.0]
    with pytest.raises(ConfigError, match="--mean means nothing to the images of many channels"):
        pretrain(run)


def test_pages_without_the_option_are_warned_of(tmp_path):
    (tmp_path / "a").mkdir()
    for index in range(3):
        tifffile.imwrite(tmp_path / "a" / f"{index}.tif", image(index, dtype="uint8"), photometric="minisblack")
    notes = Images(3, (16, 16)).open(options(data=str(tmp_path / "a"), channels=None)).notes
    assert any("0.tif has 5 pages, and only the first is read; --channels 5 would take" in note for note in notes)


def test_photographs_are_numbers_too():
    pytest.importorskip("skimage")
    source = Channels(3, (16, 16), own_scale=False).open(options(data="skimage", channels=3))
    assert 0 < min(source.settled["mean"]) < max(source.settled["mean"]) < 255

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from maefast.data.collection import DEMO
from maefast.data.volume_files import read_volume
from maefast.data.volumes import VolumeBatch, Volumes, ellipsoids, sheet
from maefast.errors import BadFile, ConfigError, TrainError
from maefast.nn.patches import patchify, reconstruct
from maefast.ops import TokenMask

OPTIONS = {"data": DEMO, "flip": 0.0, "value_range": "auto", "seed": 0, "skip_bad": False}
WINDOW = (0.0, 1000.0)


def kind(wants: Volumes, **changes):
    return wants.open(SimpleNamespace(**{**OPTIONS, **changes})).kind


def numbered(*size: int) -> np.ndarray:
    """A voxel's value tells its place."""
    d, h, w = np.indices(size)
    return (100 * d + 10 * h + w)[None].astype(np.int16)


def volume(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-50, 50, shape).astype(np.int16)


def test_files(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    whole = volume(0, 5, 6, 7)
    np.save(tmp_path / "a.npy", whole)
    np.savez(tmp_path / "b.npz", whole)
    tifffile.imwrite(tmp_path / "c.tif", whole)
    for name in ("a.npy", "b.npz", "c.tif"):
        assert np.array_equal(read_volume(tmp_path / name), whole[None])
    source = Volumes(1, (4, 4, 4)).open(SimpleNamespace(**{**OPTIONS, "data": str(tmp_path)}))
    assert [source.entries.label(i) for i in range(len(source))] == ["a.npy", "b.npz", "c.tif"]
    batch, _ = source.collate([source[i, 0, i] for i in range(3)])
    assert batch.volumes.shape == (3, 1, 4, 4, 4)
    assert batch.volumes.dtype is torch.float32
    assert torch.equal(batch.volumes, source.collate([source[i, 0, i] for i in range(3)])[0].volumes)


def test_channels_may_stand_first_or_last(tmp_path):
    whole = volume(1, 2, 3, 4, 5)
    for name, array in (("first", whole), ("last", whole.transpose(1, 2, 3, 0))):
        np.save(tmp_path / f"{name}.npy", array)
        assert np.array_equal(read_volume(tmp_path / f"{name}.npy", 2), whole)


def test_nifti(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    whole = volume(2, 3, 4, 5)
    stored = nibabel.Nifti1Image(whole.T[::-1].copy(), np.diag([-1.0, 1, 1, 1]))  # x runs backwards
    for name in ("a.nii", "b.nii.gz"):
        nibabel.save(stored, tmp_path / name)
        assert np.array_equal(read_volume(tmp_path / name), whole[None])


def test_crops_are_voxels_as_they_are_stored():
    made, raw = kind(Volumes(1, (2, 3, 4), WINDOW)), numbered(4, 6, 8)
    seen = set()
    for seed in range(1000):
        crop = made.sample(raw, np.random.default_rng(seed))[0] * 1000
        first = round(float(crop[0, 0, 0]))
        seen.add(first)
        np.testing.assert_allclose(crop - first, numbered(2, 3, 4)[0], atol=1e-3)
    assert seen == {100 * d + 10 * h + w for d in range(3) for h in range(4) for w in range(5)}
    assert round(float(made.example(raw)[0, 0, 0, 0] * 1000)) == 112
    assert kind(Volumes(1, (2, 3, 4), WINDOW), value_range="100,200").example(raw).tolist() == pytest.approx(
        (made.example(raw).astype(np.float64) * 10 - 1).clip(0, 1), abs=1e-6
    )


def test_flips_and_turns():
    raw = numbered(2, 3, 3)
    flips = {
        kind(Volumes(1, (2, 3, 3), WINDOW), flip=0.5).sample(raw, np.random.default_rng(seed)).tobytes()
        for seed in range(60)
    }
    assert len(flips) == 8
    made = kind(Volumes(1, (2, 3, 3), WINDOW, turn=1.0))
    whole = made.example(raw)
    turned = {made.sample(raw, np.random.default_rng(seed)).tobytes() for seed in range(40)}
    assert turned == {np.rot90(whole, k, (2, 3)).tobytes() for k in (1, 2, 3)}
    oblong = kind(Volumes(1, (2, 3, 4), WINDOW, turn=1.0))
    assert np.array_equal(
        oblong.sample(numbered(2, 3, 4), np.random.default_rng(0)),
        np.rot90(oblong.example(numbered(2, 3, 4)), 2, (2, 3)),
    )


def test_the_foreground_is_where_crops_are():
    raw = np.full((1, 20, 20, 20), -5, np.int16)
    raw[:, 15:, 15:, 15:] = 300
    near, far = (
        np.mean(
            [kind(Volumes(1, (4, 4, 4), WINDOW, share)).sample(raw, np.random.default_rng(s)).any() for s in range(60)]
        )
        for share in (1.0, 0.0)
    )
    assert near > 0.6  # of 64 tries, each hits it with 1/64
    assert far < 0.15


def test_values():
    raw = np.random.default_rng(0).normal((5, -3), (2, 0.5), (8, 8, 8, 2)).transpose(3, 0, 1, 2)
    crop = kind(Volumes(2, (8, 8, 8))).example(raw)
    np.testing.assert_allclose(crop.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(crop.std((1, 2, 3)), 1, atol=1e-5)
    flat = np.ones((1, 8, 8, 8))
    assert not kind(Volumes(1, (4, 4, 4))).example(flat).any()
    jittered = [
        kind(Volumes(1, (8, 8, 8), WINDOW, jitter=(0.1, 1.0))).sample(500 * flat, np.random.default_rng(s))
        for s in range(200)
    ]
    assert 0.35 < min(part.min() for part in jittered) < 0.43
    assert 0.57 < max(part.max() for part in jittered) < 0.65
    raw[0, 2, 3, 4] = np.nan
    assert kind(Volumes(2, (8, 8, 8))).example(raw)[0, 2, 3, 4] == pytest.approx(
        kind(Volumes(2, (8, 8, 8))).example(raw)[0].min()
    )
    raw[0] = np.nan
    with pytest.raises(ValueError, match="a channel has no finite value"):
        kind(Volumes(2, (8, 8, 8))).example(raw)


def test_small_volumes_are_padded_around():
    crop = kind(Volumes(1, (4, 3, 6), (-10.0, 990.0))).example(numbered(2, 6, 3))
    assert crop.shape == (1, 4, 3, 6)
    assert not crop[:, (0, 3)].any()
    assert not crop[..., (0, 4, 5)].any()
    np.testing.assert_allclose(1000 * crop[0, 1:3, :, 1:4] - 10, numbered(2, 6, 3)[0, :, 1:4], atol=1e-3)


def test_the_demo_is_the_same_every_time():
    one = ellipsoids(3, (20, 24, 28), 2)
    assert one.shape == (2, 20, 24, 28)
    assert one.dtype == np.float32
    assert np.array_equal(one, ellipsoids(3, (20, 24, 28), 2))
    assert not np.array_equal(one, ellipsoids(4, (20, 24, 28), 2))
    assert not np.array_equal(one[0], one[1])
    assert -175 <= one.min() < -170
    assert 0 < one.max() <= 250
    source = Volumes(1, (12, 12, 12), (-175, 250)).open(SimpleNamespace(**OPTIONS))
    batch, names = source.examples(2)
    assert batch.volumes.shape == (2, 1, 12, 12, 12)
    assert names == ["ellipsoids 0", "ellipsoids 32"]


def test_pictures():
    volumes = torch.rand(2, 2, 8, 8, 8)
    plan = TokenMask.from_bool(torch.arange(8).expand(2, 8) < 4)  # the first half of the slices
    pred = patchify(volumes, (4, 4, 4))[:, :4]
    shown = sheet(reconstruct(pred, volumes, plan, (4, 4, 4)), ["a", "b"], "", slices=2)
    assert shown.names == ["a, slice 2", "a, slice 6", "b, slice 2", "b, slice 6"]
    original, masked, hidden, pasted = shown.columns
    assert original.shape == (4, 1, 8, 8)
    assert torch.equal(original, pasted)
    assert bool((masked[0] == 128).all())  # grey, for what is empty is black
    assert torch.equal(masked[1], original[1])
    assert bool((hidden[1] == 128).all())


def test_refusals(tmp_path):
    wants = Volumes(1, (4, 4, 4))
    wants.check(VolumeBatch(torch.zeros(1, 1, 4, 4, 4)))
    with pytest.raises(TypeError, match="a VolumeBatch is wanted"):
        wants.check(3)
    with pytest.raises(ValueError, match=r"volumes must be \[B, 1, 4, 4, 4\], got \(1, 2, 4, 4, 4\)"):
        wants.check(VolumeBatch(torch.zeros(1, 2, 4, 4, 4)))
    with pytest.raises(TypeError, match="float"):
        wants.check(VolumeBatch(torch.zeros(1, 1, 4, 4, 4, dtype=torch.uint8)))
    for arguments, reason in (
        ({"size": (4, 4)}, r"size must be \(depth, height, width\)"),
        ({"size": (4, 4, 0)}, "size must be at least 1"),
        ({"window": (3, 3)}, r"window must be \(low, high\)"),
        ({"turn": 2}, r"turn: a share lies in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=reason):
            Volumes(**arguments)
    with pytest.raises(ConfigError, match="percentiles are of photographs"):
        kind(wants, value_range="1%,99%")
    with pytest.raises(ConfigError, match="no volumes in it"):
        kind(wants, data=str(tmp_path))
    np.save(tmp_path / "a.npy", np.zeros((4, 4)))
    with pytest.raises(
        ValueError, match=r"\[1, depth, height, width\] or \[depth, height, width, 1\], not float64 \[4, 4\]"
    ):
        read_volume(tmp_path / "a.npy")
    with pytest.raises(BadFile, match=r"a\.npy: a volume is numbers"):
        wants.open(SimpleNamespace(**{**OPTIONS, "data": str(tmp_path)})).examples(1)
    (tmp_path / "b.csv.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="a volume is a file that ends in"):
        read_volume(tmp_path / "b.csv.gz")
    (tmp_path / "c.tif").write_bytes(b"II*\0")
    with pytest.raises((ValueError, TrainError)):
        read_volume(tmp_path / "c.tif")

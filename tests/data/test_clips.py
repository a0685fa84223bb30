from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from maefast.data.clips import ClipBatch, Clips, moving_photograph, read_video, resized, sheet
from maefast.data.images.files import shipped_photographs
from maefast.errors import ConfigError
from maefast.nn.patches import Reconstruction

OPTIONS = {"crop_scale": (0.5, 1.0), "crop_ratio": (0.75, 4 / 3), "flip": 0.5, "seed": 0, "skip_bad": False}


def video(frames=9, height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_arrays_and_folders_of_frames(tmp_path):
    pytest.importorskip("skimage")
    frames = video()
    np.save(tmp_path / "a.npy", frames)
    np.savez(tmp_path / "b.npz", frames)
    (tmp_path / "c").mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "c" / f"{index:03d}.png")
    for name in ("a.npy", "b.npz", "c"):
        assert np.array_equal(read_video(tmp_path / name), frames)
    source = Clips(4, (8, 8), stride=2).open(SimpleNamespace(data=str(tmp_path), **OPTIONS))
    assert [source.entries.label(i) for i in range(len(source))] == ["a.npy", "b.npz", "c"]
    batch, _ = source.collate([source[i, 0, i] for i in range(3)])
    assert batch.clips.shape == (3, 3, 4, 8, 8)
    assert torch.equal(batch.clips, source.collate([source[i, 0, i] for i in range(3)])[0].clips)
    np.save(tmp_path / "d.npy", np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"a video is uint8 \[frames, height, width, 3\]"):
        read_video(tmp_path / "d.npy")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="no videos in it"):
        Clips().open(SimpleNamespace(data=str(empty), **OPTIONS))


def test_frames_that_are_taken():
    kind = Clips(4, (20, 30), stride=2).open(SimpleNamespace(data="demo", **OPTIONS)).kind
    raw = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None], (20, 20, 30, 3))
    for seed in range(20):
        taken = kind.sample(raw, np.random.default_rng(seed))[:, 0, 0, 0].tolist()
        assert np.diff(taken).tolist() == [2, 2, 2]
    assert kind.example(raw[:5])[:, 0, 0, 0].tolist() == [1, 2, 3, 4]  # a smaller stride
    with pytest.raises(ValueError, match="3 frames, fewer than the 4 of a clip"):
        kind.example(raw[:3])


def test_one_crop_for_all_frames():
    raw = np.broadcast_to(video(1), (4, 20, 30, 3))
    kind = Clips(4, (8, 8), stride=1).open(SimpleNamespace(data="demo", **OPTIONS)).kind
    clip = kind.sample(raw, np.random.default_rng(3))
    assert all(np.array_equal(frame, clip[0]) for frame in clip)
    assert np.array_equal(resized(raw, (3, 2, 11, 10), (8, 8)), raw[:, 2:10, 3:11])


def test_photographs_move():
    pytest.importorskip("skimage")
    path = shipped_photographs()[0]
    clip = moving_photograph(path, 6, (24, 24), 1)
    assert clip.shape == (6, 32, 32, 3)
    assert np.array_equal(clip, moving_photograph(path, 6, (24, 24), 1))
    assert not np.array_equal(clip[0], clip[-1])
    assert not np.array_equal(clip, moving_photograph(path, 6, (24, 24), 2))


def test_pictures_show_what_is_hidden_in_one_grey():
    clips, mask = torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 3, 2, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    shown = sheet(Reconstruction(clips, clips.masked_fill(mask, 0.3), clips + 0.9, clips, mask), ["a"], "", 2)
    masked, hidden = shown.columns[1:3]
    assert bool((masked[..., :2] == 128).all())
    assert bool((hidden[..., 2:] == 128).all())
    assert not masked[..., 2:].any()
    assert not hidden[..., :2].any()


def test_refusals():
    wants = Clips(4, (8, 8))
    wants.check(ClipBatch(torch.zeros(1, 3, 4, 8, 8, dtype=torch.uint8)))
    with pytest.raises(TypeError, match="a ClipBatch is wanted"):
        wants.check(3)
    with pytest.raises(ValueError, match="clips must be uint8"):
        wants.check(ClipBatch(torch.zeros(1, 3, 4, 8, 8)))

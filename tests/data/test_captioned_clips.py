from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from maefast.data.captioned_clips import CaptionedClips, on_grid, read_captioned
from maefast.data.moving_shapes import MovingShape
from maefast.errors import BadFile, ConfigError

OPTIONS = {"crop_scale": (0.5, 1.0), "crop_ratio": (0.75, 4 / 3), "flip": 0.5, "seed": 0, "skip_bad": False}
WANTS = CaptionedClips(frames=4, size=(8, 12), stride=2, grid=(2, 2, 3), text=5)


def arrays(captions=2, frames=9):
    rng = np.random.default_rng(0)
    return {
        "video": rng.integers(0, 256, (frames, 16, 24, 3), dtype=np.uint8),
        "texts": rng.standard_normal((captions, 5)).astype(np.float16),
        "scores": rng.standard_normal((captions, frames, 4, 6)).astype(np.float16),
    }


def opened(wants, data, **changes):
    return wants.open(SimpleNamespace(data=str(data), **{**OPTIONS, **changes}))


def test_files(tmp_path):
    given = arrays()
    np.savez(tmp_path / "a.npz", **given)
    np.save(tmp_path / "b.npy", given["video"])
    np.savez(tmp_path / "c.npz", **{**given, "video": "b.npy"})
    source = opened(WANTS, tmp_path)
    assert [source.entries.label(i) for i in range(len(source))] == ["a.npz", "c.npz"]
    batch, _ = source.examples(2)
    WANTS.check(batch)
    assert batch.clips.shape == (2, 3, 4, 8, 12)
    assert torch.equal(batch.clips[0], batch.clips[1])
    assert batch.text.dtype is batch.scores.dtype is torch.float32
    np.testing.assert_array_equal(batch.text[0], given["texts"][0].astype(np.float32))
    # Frames 1, 3, 5, 7; the whole of them, two by two, and blocks of 2 x 2 values of a map for each position.
    want = given["scores"][0, 1::2].astype(np.float32).reshape(2, 2, 4, 6).mean(1)
    smooth = on_grid(given["scores"][0, 1::2], (0, 0, 24, 16), (16, 24), (2, 4, 6))
    np.testing.assert_allclose(smooth, want.reshape(2, -1), rtol=1e-5)
    np.testing.assert_allclose(batch.scores[0].mean(), want.mean(), atol=0.1)
    assert WANTS.check(batch.to("cpu")) is None


def test_scores_go_with_the_pixels():
    """Maps that are the brightness of the video stay so when it is cropped and flipped."""
    ramp = np.add.outer(np.arange(16.0), 3 * np.arange(24.0)) * 2
    video = np.repeat(np.broadcast_to(ramp, (9, 16, 24))[..., None], 3, 3).astype(np.uint8)
    maps = video[None, ..., 0].astype(np.float32)
    kind = opened(WANTS, "demo").kind
    for seed in range(12):
        raw = SimpleNamespace(frames=video, texts=np.ones((1, 5), np.float32), scores=maps)
        clip, _, scores = kind.sample(raw, np.random.default_rng(seed))
        seen = clip[..., 0].reshape(2, 2, 2, 4, 3, 4).mean((1, 3, 5)).reshape(2, 6)
        np.testing.assert_allclose(scores, seen, atol=8)


def test_one_of_several_captions(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays(captions=3))
    source = opened(WANTS, tmp_path)
    seen = {float(source[0, epoch, 0][0][1][0]) for epoch in range(20)}
    assert seen == set(arrays(captions=3)["texts"][:, 0].astype(np.float32).tolist())
    again, other = (source[0, epoch, 0][0] for epoch in (3, 3))
    assert all(np.array_equal(one, two) for one, two in zip(again, other))


def test_scores_of_fewer_frames_and_none(tmp_path):
    given = arrays(captions=1, frames=8)
    np.savez(tmp_path / "a.npz", **{**given, "scores": given["scores"][:, ::4]})
    batch, _ = opened(CaptionedClips(4, (16, 24), 2, (2, 4, 6), 5), tmp_path).examples(1)
    np.testing.assert_allclose(batch.scores[0], given["scores"][0, ::4].reshape(2, -1), rtol=1e-3)
    unscored = CaptionedClips(4, (8, 12), 2, (2, 2, 3), 5, scored=False)
    np.savez(tmp_path / "a.npz", video=given["video"], texts=given["texts"])
    batch, _ = opened(unscored, tmp_path).examples(1)
    assert batch.scores is None
    unscored.check(batch)
    assert batch.pin_memory is not None
    with pytest.raises(ValueError, match="scores are wanted"):
        WANTS.check(batch)


def test_the_demo():
    wants = CaptionedClips(4, (48, 48), 1, (2, 6, 6), 32)
    batch, names = opened(wants, "demo", flip=0.0).examples(3)
    assert names[0] == MovingShape(0).caption
    assert names[0].startswith("a ")
    np.testing.assert_array_equal(batch.text[0], MovingShape(0).embedding(32))
    assert batch.text.norm(dim=1).sub(1).abs().max() < 1e-5
    assert torch.equal(batch.clips, opened(wants, "demo").examples(3)[0].clips)
    # The shape is where the scores say.
    shape = MovingShape(1)
    video, near = shape.video(3, (64, 64))
    inside = near[1].repeat(4, 0).repeat(4, 1) == 1
    assert 0.1 < inside.mean() < 0.5
    colour = np.argmax(video[1][inside].mean(0)), np.argmax(video[1][~inside].mean(0))
    assert (shape.colour, shape.ground) == ("yellow", "blue")
    assert colour == (0, 2)


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="no captioned videos"):
        opened(WANTS, tmp_path)
    given = arrays()
    for changes, reason in (
        ({"scores": None}, "no array scores in it; it holds video, texts"),
        (
            {"video": given["video"][..., 0]},
            r"video must be uint8 \[frames, height, width, 3\], not uint8 \[9, 16, 24\]",
        ),
        ({"texts": given["texts"][:, :4]}, r"texts must be floating \[captions, 5\], not float16 \[2, 4\]"),
        ({"texts": given["texts"][:1]}, r"scores must be floating \[1, frames, h, w\], not float16 \[2, 9, 4, 6\]"),
        ({"scores": given["scores"] * np.nan}, "scores holds values that are not finite"),
    ):
        changed = {name: value for name, value in {**given, **changes}.items() if value is not None}
        np.savez(tmp_path / "a.npz", **changed)
        with pytest.raises(ValueError, match=reason):
            read_captioned(tmp_path / "a.npz", 5, True)
    with pytest.raises(BadFile, match="not finite"):
        opened(WANTS, tmp_path).examples(1)
    with pytest.raises(TypeError, match="a CaptionedClipBatch is wanted, got dict"):
        WANTS.check({})

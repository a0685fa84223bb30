"""Frames of coded videos, by their numbers."""

from __future__ import annotations

import struct
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from maefast.data.blob import Blob
from maefast.data.clips import Clips, read_video
from maefast.data.video_files import CodedVideo
from maefast.errors import BadFile
from tests.data.sources import write_tar

av = pytest.importorskip("av")

OPTIONS = {"crop_scale": (0.5, 1.0), "crop_ratio": (0.75, 4 / 3), "flip": 0.5, "seed": 0, "skip_bad": False}
CODECS = [
    (".mp4", "mpeg4", {}), (".mp4", "libx264", {"bf": "3", "g": "12"}), (".webm", "libvpx-vp9", {"g": "10"}),
    (".mkv", "libx264", {"bf": "2", "g": "250"}), (".avi", "mjpeg", {}), (".ts", "libx264", {"g": "8"}),
    # Packets that are marked as key frames and need others: pictures that are renewed stripe by stripe, open groups.
    (".mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=8:bframes=0:scenecut=0"}),
    (".ts", "mpeg4", {"g": "8", "bf": "2"}), (".mkv", "libx264", {"x264-params": "open-gop=1:keyint=8:bframes=2"}),
]  # fmt: skip


def write(path, codec="libx264", frames=40, size=(64, 48), options=None, sound=False):
    """A moving gradient whose brightness tells the number of the frame."""
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV has no {codec}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.time_base = Fraction(1, 25)
        for number in range(frames):
            ramp = (np.arange(size[0]) + 5 * number) % 256
            pixels = np.broadcast_to(ramp[None, :, None], (size[1], size[0], 3)).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = number
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def decoded(path):
    """All frames, one after another."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize(("ending", "codec", "options"), CODECS)
def test_any_frame_by_its_number(tmp_path, ending, codec, options):
    path = write(tmp_path / f"a{ending}", codec, options=options)
    whole = decoded(path)
    video = read_video(path)
    assert video.shape == whole.shape == (40, 48, 64, 3)
    for part in (slice(0, 4), slice(7, 8), slice(39, 40), slice(3, 36, 4), slice(11, 13), slice(20, 20), slice(None)):
        assert np.array_equal(video[part], whole[part])
    held = CodedVideo(Blob(f"{tmp_path}/x.tar/a{ending}", path.read_bytes))
    assert np.array_equal(held[5:30:6], whole[5:30:6])


def test_clips_of_files(tmp_path):
    write(tmp_path / "a.mp4", "mpeg4")
    np.save(tmp_path / "b.npy", np.zeros((9, 20, 30, 3), np.uint8))
    (tmp_path / "sub").mkdir()
    write_tar(tmp_path / "sub" / "x.tar", [("a.mp4", (tmp_path / "a.mp4").read_bytes())])
    wants = Clips(4, (16, 16), stride=3)
    source = wants.open(SimpleNamespace(data=str(tmp_path), **OPTIONS))
    assert [source.entries.label(i) for i in range(len(source))] == ["a.mp4", "b.npy"]
    batch, _ = source.collate([source[i, 0, i] for i in range(2)])
    assert batch.clips.shape == (2, 3, 4, 16, 16)
    assert batch.clips.equal(source.collate([source[i, 0, i] for i in range(2)])[0].clips)
    np.save(tmp_path / "all.npy", decoded(tmp_path / "a.mp4"))
    same = wants.open(SimpleNamespace(data=str(tmp_path / "sub"), **OPTIONS))
    (tmp_path / "alone").mkdir()
    (tmp_path / "all.npy").rename(tmp_path / "alone" / "all.npy")
    array = wants.open(SimpleNamespace(data=str(tmp_path / "alone"), **OPTIONS))
    for position in range(3):  # as from an array of all frames
        one, two = (found.collate([found[position, position, 0]])[0].clips for found in (same, array))
        assert one.equal(two)


def test_what_cannot_be_decoded(tmp_path):
    path = write(tmp_path / "a.mp4", "mpeg4")
    whole = path.read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) // 2])  # its table of frames is at the end
    (tmp_path / "c.mp4").write_bytes(b"no video")
    write(tmp_path / "d.mp4", "mpeg4", frames=3)
    with av.open(str(tmp_path / "e.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.rate = 8000
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    source = Clips(4, (16, 16), stride=2).open(SimpleNamespace(data=str(tmp_path), **OPTIONS))
    for index, match in ((1, r"b\.mp4: "), (2, r"c\.mp4: "), (4, r"e\.mkv: no video in it")):
        with pytest.raises(BadFile, match=match):
            source.entries[index]
    _, _, bad = source[0, 0, 3]
    assert bad == [("d.mp4", "3 frames, fewer than the 4 of a clip")]
    source.skip_bad = True
    batch, bad = source.collate([source[i, 0, i] for i in range(4)])
    assert len(batch) == 4
    assert {name.rpartition("/")[2] for name, _ in bad} == {"b.mp4", "c.mp4", "d.mp4", "e.mkv"}


def test_videos_that_are_turned(tmp_path):
    """As telephones write them held upright: the track's matrix turns the picture by 90 degrees with the clock."""
    path = write(tmp_path / "a.mp4", "mpeg4")
    flat = CodedVideo(path)[:]
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # past times, duration, layer and volume
    one = 1 << 16
    data[at : at + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    turned = CodedVideo(tmp_path / "turned.mp4")
    assert turned.shape == (40, 64, 48, 3)
    assert np.array_equal(turned[3:9:2], np.rot90(flat[3:9:2], -1, axes=(1, 2)))

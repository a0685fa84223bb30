"""Videos in files of codecs (.mp4, .webm, ...), by PyAV: any frame by its number, without decoding those before it but
for the ones since its key frame; and their sound."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from maefast.data.blob import Blob, Where, opened
from maefast.errors import TrainError, need

CODED = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")
_INTRA = 1  # a picture that needs no others, of FFmpeg's types
_KEPT = 4096  # tables of times that a process keeps: those of the files that it met last
_tables: OrderedDict[tuple[str, int | None], _Table] = OrderedDict()


@dataclass(frozen=True)
class _Table:
    """times: int64, of each frame in the order in which it is shown. keys: those of frames that need no others. unit:
    seconds of 1. height, width: upright. turns: by 90 degrees against the clock, that make it so."""

    times: np.ndarray
    keys: np.ndarray
    unit: float
    height: int
    width: int
    turns: int


class CodedVideo:
    """Frames of a file, uint8 [frames, height, width, 3], of which slices are decoded when they are asked for.

    Raises:
        ValueError: it cannot be decoded, or holds no pictures. BadFile's reason, also from what is asked for later.
    """

    def __init__(self, where: Where) -> None:
        self._where = where
        key = (str(where), None if isinstance(where, Blob) else os.stat(where).st_mtime_ns)
        if key not in _tables:
            with _container(where) as container:
                found = _read_times(container)
            with _container(where) as container:  # anew: not all formats find their beginning
                _tables[key] = _read_table(container, *found)
            if len(_tables) > _KEPT:
                _tables.popitem(last=False)
        self._table = _tables[key]
        self.shape = (len(self._table.times), self._table.height, self._table.width, 3)
        self.dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def shown(self) -> np.ndarray:
        """float64 [frames + 1], seconds: when each frame is shown, and when the last one ends, if it is shown as long
        as the others are on average."""
        times = self._table.times * self._table.unit
        step = (times[-1] - times[0]) / max(1, len(times) - 1)
        return np.append(times, times[-1] + step)

    def __getitem__(self, index: slice) -> np.ndarray:
        numbers = range(len(self))[index]
        if not len(numbers):
            return np.empty((0, *self.shape[1:]), np.uint8)
        wanted = {int(self._table.times[number]): number for number in numbers}
        found: dict[int, np.ndarray] = {}
        keys = self._table.keys
        at = int(np.searchsorted(keys, min(wanted), side="right")) - 1
        for start in (int(keys[at]) if at > 0 else None, None):
            with _container(self._where) as container:
                try:
                    self._decode(container, start, wanted, found)
                except TrainError:
                    raise
                except Exception as error:
                    raise _complaint(error) from error
            if start is None or len(found) == len(wanted):  # else: some formats only find places near to it
                break
        if lacking := sorted(set(numbers) - set(found)):
            raise ValueError(f"frame {lacking[0]} of {len(self)} cannot be decoded")
        return np.stack([found[number] for number in numbers])

    def _decode(self, container: Any, start: int | None, wanted: dict[int, int], found: dict[int, np.ndarray]) -> None:
        """From the key frame at the time `start` on, or from the first frame."""
        stream, last = _stream(container), max(wanted)
        if start is not None:
            container.seek(start, stream=stream, backward=True)
        for number, frame in enumerate(container.decode(stream)):
            if start is not None and not number and not (frame.key_frame and int(frame.pict_type) == _INTRA):
                return  # called a key frame, as where a picture is renewed stripe by stripe, it needs those before it
            if frame.pts in wanted:
                found[wanted[frame.pts]] = _upright(frame, self._table.turns)
            if len(found) == len(wanted) or (frame.pts is not None and frame.pts > last):
                return


def read_sound(where: Where, rate: int) -> tuple[np.ndarray, float]:
    """The sound of a video, float32 [S] in [-1, 1] at `rate` samples a second, the mean of its channels; all of the
    first track. And when it begins, in the seconds of `CodedVideo.shown`. ValueError: there is none, or it cannot be
    decoded."""
    with _container(where) as container:
        if not container.streams.audio:
            raise ValueError("no sound in it")
        try:
            import av

            resampler, begins, pieces = av.AudioResampler(format="fltp", rate=rate), None, []
            for frame in container.decode(audio=0):
                begins = frame.time if begins is None else begins
                pieces += resampler.resample(frame)
            pieces += resampler.resample(None)
        except Exception as error:
            raise _complaint(error) from error
    if not pieces:
        raise ValueError("no sound in it")
    return np.concatenate([piece.to_ndarray().mean(0) for piece in pieces]), begins or 0.0


def _container(where: Where) -> Any:
    try:
        import av
    except ImportError as error:
        raise need("av", "Reading files of video", "data") from error
    try:
        return av.open(opened(where) if isinstance(where, Blob) else str(where))
    except av.error.FFmpegError as error:
        raise _complaint(error) from error


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("no video in it")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # loader processes are many already
    return stream


def _read_times(container: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """The times of all frames, of those that need no others, and their unit; no packet is decoded."""
    if container.format.name == "mpeg" and _stream(container).codec.name == "hevc":
        raise ValueError("H.265 in an MPEG programme stream, where frames that need others are marked as key frames")
    try:
        packets = [packet for packet in container.demux(_stream(container)) if packet.size and not packet.is_discard]
        times, keys = [packet.pts for packet in packets], [packet.pts for packet in packets if packet.is_keyframe]
    except ValueError:
        raise
    except Exception as error:
        raise _complaint(error) from error
    if not times:
        raise ValueError("no frames in it")
    if None in times or len(set(times)) < len(times):
        raise ValueError("its frames have no times of their own, so that none can be found by its number")
    unit = float(_stream(container).time_base)
    return np.array(sorted(times), np.int64), np.array(sorted(keys), np.int64), unit


def _read_table(container: Any, times: np.ndarray, keys: np.ndarray, unit: float) -> _Table:
    try:
        frame = next(container.decode(_stream(container)))
    except StopIteration as error:
        raise ValueError("none of its frames can be decoded") from error
    except Exception as error:
        raise _complaint(error) from error
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
    return _Table(times, keys, unit, height, width, turns)


def _upright(frame: Any, turns: int) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), turns)


def _complaint(error: Exception) -> ValueError:
    return ValueError(f"{type(error).__name__}: {error}")

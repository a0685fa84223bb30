"""JPEG files by NVIDIA's nvImageCodec, on a GPU, for `--gpu-decode`.

UNTESTED ON A DEVICE: written against the documented Python interface of version 0.9, whose calls were tried with its
CPU decoder only (libjpeg-turbo).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maefast.errors import ConfigError

PACKAGE = 'pip install "maefast[gpu-decode]"; on CUDA 12 "nvidia-nvimgcodec-cu12[nvjpeg]" instead of what that installs'


class NvImageCodec:
    """Decodes files into tensors on `device`. The library's decoder is made at the first call, so that an object may be
    handed to another process before it.

    Args:
        device: a CUDA device, or the CPU, for tests.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._decoder = self._params = None
        _library()

    def __call__(self, files: Sequence[np.ndarray]) -> list[Tensor | None]:
        """uint8 [bytes] each -> uint8 RGB [H, W, 3] each, as it lies in the file (EXIF is not looked at); None: the
        device does not decode it."""
        codec = _library()
        if self._decoder is None:
            self._decoder, self._params = self._opened(codec)
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        streams = [codec.CodeStream(np.ascontiguousarray(file)) for file in files]
        images = self._decoder.decode(streams, params=self._params, cuda_stream=stream)
        return [None if image is None else self._tensor(image, stream) for image in images]

    def _opened(self, codec):
        kinds, number = codec.BackendKind, self.device.index or 0
        allowed = [kinds.HW_GPU_ONLY, kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU]  # its CPU decoder would be slower than ours
        if self.device.type == "cpu":
            allowed, number = [kinds.CPU_ONLY], codec.NVIMGCODEC_DEVICE_CPU_ONLY
        decoder = codec.Decoder(device_id=number, backends=[codec.Backend(kind) for kind in allowed])
        return decoder, codec.DecodeParams(apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB)

    def _tensor(self, image, stream: int) -> Tensor:
        if self.device.type == "cpu":
            return torch.from_numpy(np.array(image))
        return torch.from_dlpack(image.to_dlpack(cuda_stream=stream))


def _library():
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        raise ConfigError(f"--gpu-decode needs the package 'nvidia-nvimgcodec-cu13': {PACKAGE}") from error
    return nvimgcodec


def opened(options) -> NvImageCodec:
    """The decoder of a run with `--gpu-decode`, tried on a file.

    Raises:
        ConfigError: no CUDA device or package, or it decodes nothing.
    """
    if options.device == "cpu" or not torch.cuda.is_available():
        what = "--device cpu has none" if options.device == "cpu" else "torch sees none"
        raise ConfigError(f"--gpu-decode needs a CUDA device, and {what}")
    device = torch.device("cuda", torch.cuda.current_device())
    try_out(NvImageCodec(device))
    return NvImageCodec(device)  # anew: what was tried has threads, and worker processes are forked from here


def try_out(decode: NvImageCodec) -> None:
    """Raise ConfigError unless it decodes a small file."""
    from .jpeg import simplejpeg

    if simplejpeg is None:
        raise ConfigError("--gpu-decode needs the package 'simplejpeg': pip install \"maefast[train]\"")
    file = simplejpeg.encode_jpeg(np.full((32, 48, 3), 128, dtype=np.uint8))
    try:
        (found,) = decode([np.frombuffer(file, dtype=np.uint8)])
    except RuntimeError as error:  # of CUDA, in the library
        raise ConfigError(f"--gpu-decode: nvImageCodec fails on {decode.device}: {error}") from error
    if found is None or tuple(found.shape) != (32, 48, 3):
        raise ConfigError(
            f"--gpu-decode: nvImageCodec decodes no JPEG on {decode.device}; nvJPEG is missing perhaps: {PACKAGE}"
        )

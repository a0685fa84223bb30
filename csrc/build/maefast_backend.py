"""PEP 517 / 660 backend: scikit-build-core, plus three things it cannot know.

1. torch. The libraries are compiled against the torch that is installed where maefast goes, not against a copy
   downloaded into the isolated build environment; torch becomes a build requirement only where there is none.
2. No compiler. The build then falls back, first to a build without CUDA (unless MAEFAST_CUDA=on asks for it),
   then to the Python files alone; the reason travels in the wheel and `import maefast` reports it.
3. MAEFAST_REQUIRE_NATIVE=1 forbids the fallback.
"""

from __future__ import annotations

import base64
import hashlib
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scikit_build_core import build as skbuild
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from torch_location import find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any]
FAILURE_NOTE = "maefast/_build_failure.txt"


def get_requires_for_build_wheel(config_settings: Settings | None = None) -> list[str]:
    return skbuild.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: Settings | None = None) -> list[str]:
    return skbuild.get_requires_for_build_editable(config_settings) + _torch_requirement()


def _torch_requirement() -> list[str]:
    torch = find_torch()
    return [] if torch is not None and torch.recent_enough else ["torch>=2.10"]


def build_wheel(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    return _build(skbuild.build_wheel, wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    return _build(skbuild.build_editable, wheel_directory, config_settings, metadata_directory)


def _build(hook: Callable[..., str], directory: str, settings: Settings | None, metadata_directory: str | None) -> str:
    settings = dict(settings or {})
    cuda = (os.environ.get("MAEFAST_CUDA") or settings.get("cmake.define.MAEFAST_CUDA", "auto")).lower()
    if cuda not in ("auto", "on", "off"):
        raise SystemExit(f"maefast: MAEFAST_CUDA={cuda}: choose auto, on or off")
    required = cuda == "on" or os.environ.get("MAEFAST_REQUIRE_NATIVE") == "1"
    for attempt in (cuda,) if required or cuda == "off" else (cuda, "off"):
        os.environ["MAEFAST_CUDA"] = attempt  # read by csrc/build/cuda.cmake
        try:
            return hook(directory, settings, metadata_directory)
        except (SystemExit, Exception) as error:  # scikit-build-core exits when CMake or the compiler fails
            reason = f"{type(error).__name__}: {error}"
            print(f"maefast: the native build failed with MAEFAST_CUDA={attempt} ({reason})", file=sys.stderr)
    if required:
        raise SystemExit("maefast: the native libraries are required and could not be built (see above)")
    print("maefast: installing without native libraries", file=sys.stderr)
    name = hook(directory, {**settings, "wheel.cmake": "false"}, None)
    note = "the C++ build failed during installation; `pip install -v` shows the compiler's messages"
    _add_file(Path(directory, name), FAILURE_NOTE, note)
    return name


def _add_file(wheel: Path, name: str, text: str) -> None:
    """Add a file to a wheel and list it in RECORD (which must stay the last word on what is inside)."""
    with zipfile.ZipFile(wheel) as archive:
        members = {item: archive.read(item) for item in archive.infolist()}
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, text)
        for item, data in members.items():
            if item.filename.endswith(".dist-info/RECORD"):
                data = f"{name},sha256={digest},{len(text.encode())}\n".encode() + data
            archive.writestr(item, data)

"""Where the members of a tar lie, so that any one can be read by itself. Made once, and stored beside the tar or, where
that cannot be, in the cache folder."""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from maefast.data import remote
from maefast.data.cache import cache_path
from maefast.data.records import Names, is_url
from maefast.data.written import write_whole

_VERSION = 1
_BLOCK = tarfile.BLOCKSIZE
PADDING = 2**20  # bytes behind the end mark that are looked at: tars are filled up with zeros, 10 KiB or so
FOLLOWED = "what follows its end mark is left out (if tars were joined by cat, tar --concatenate joins them into one)"


@dataclass(frozen=True, eq=False)
class TarIndex:
    """Regular members in their order. offsets, sizes: int64 [members], of their bytes in the tar. complaint: why there
    are no more, where the tar is cut off or broken. stored: where the index was written; None: nowhere, or before.
    followed: whether there is more than zeros behind the end mark.
    """

    names: Names
    offsets: np.ndarray
    sizes: np.ndarray
    complaint: str | None = None
    stored: Path | None = None
    followed: bool = False

    def __len__(self) -> int:
        return len(self.names)


def index_of(name: str) -> TarIndex:
    """The index of the tar at `name`, a path or a URL: the stored one, if the tar is as it was then.

    Raises:
        OSError: it cannot be opened. Unreachable: no answer.
    """
    known = file_identity(name)
    places = _places(name)
    for place in places:
        if (found := _load(place, known)) is not None:
            return found
    with remote.open_file(name) if is_url(name) else open(name, "rb") as file:
        index = scan(file, known["size"])
    if index.complaint is None:  # a broken tar will be replaced
        for place in places:
            try:
                write_whole(place, lambda path: _save(path, index, known))
            except OSError:  # not writable: the next place
                continue
            return replace(index, stored=place)
    return index


def file_identity(name: str) -> dict[str, Any]:
    """What tells that the file is another one, in JSON types."""
    if is_url(name):
        return remote.identity(name)
    status = os.stat(name)
    return {"size": status.st_size, "mtime": status.st_mtime_ns}


def scan(file: BinaryIO, size: int) -> TarIndex:
    """Go through the headers of a tar of `size` bytes."""
    names: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    complaint, followed = None, False
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # which it would keep
                if member.offset_data + (member.size if member.isreg() else 0) > size:
                    complaint = f"it is cut off within the member {member.name}"
                    break
                if member.isreg() and not member.issparse():
                    names.append(member.name)
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
            end = tar.offset
        if complaint is None:
            file.seek(end)
            block = file.read(_BLOCK)
            if len(block) < _BLOCK:
                complaint = "it is cut off: its end mark is missing"
            elif block != bytes(_BLOCK):
                complaint = f"no header of a member at byte {end}"
            else:
                followed = not_zero(file.read(PADDING))
    except (tarfile.TarError, EOFError, ValueError) as error:
        complaint = "it is empty" if size == 0 else _no_tar(file) or f"{type(error).__name__}: {error}"
    if complaint is not None and names:
        complaint += f", behind {names[-1]}"
    places = np.array(offsets, np.int64), np.array(sizes, np.int64)
    return TarIndex(Names(names), *places, complaint, followed=followed)


def not_zero(data: bytes) -> bool:
    return data.count(0) < len(data)


def _no_tar(file: BinaryIO) -> str | None:
    file.seek(0)
    start = file.read(6)
    packed = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
    kind = next((kind for magic, kind in packed.items() if start.startswith(magic)), None)
    return None if kind is None else f"it is compressed ({kind}) and has no places to go to; unpack it to a plain .tar"


def _places(name: str) -> list[Path]:
    """Where the index of a tar may be stored, best first."""
    if is_url(name):
        return [cache_path("tars", name, ".npz")]
    path = Path(os.path.abspath(name))
    return [path.with_name(f"{path.name}.index.npz"), cache_path("tars", str(path), ".npz")]


def _save(path: Path, index: TarIndex, known: dict[str, Any]) -> None:
    followed = {"followed": True} if index.followed else {}
    about = json.dumps({"version": _VERSION, "tar": known, **followed}).encode()
    text = np.frombuffer(bytes(index.names.lines()), np.uint8)
    with open(path, "wb") as file:
        np.savez(file, about=np.frombuffer(about, np.uint8), names=text, offsets=index.offsets, sizes=index.sizes)


def _load(path: Path, known: dict[str, Any]) -> TarIndex | None:
    """None: there is none, it is of another state of the tar, or broken."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            about = json.loads(bytes(file["about"]))
            followed = about.pop("followed", False)
            if about != {"version": _VERSION, "tar": known}:
                return None
            offsets, sizes = file["offsets"], file["sizes"]
            text = bytes(file["names"]).decode(errors="surrogateescape")
        names = Names(text.split("\n") if len(offsets) else [])
    except Exception:  # cut off, or not ours
        return None
    whole = len(names) == len(offsets) == len(sizes)
    return TarIndex(names, offsets, sizes, followed=followed) if whole else None

"""Members of tars, in WebDataset's layout or any other, read one by one through an index (`tar_index`)."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from maefast.data import remote
from maefast.data.blob import Blob
from maefast.data.records import Names, is_url
from maefast.data.tar_index import FOLLOWED, TarIndex, index_of
from maefast.errors import ConfigError

_OPEN = 128  # tars that a process keeps open
_PATIENCE = 5.0  # seconds before it is told that tars are being indexed, and between tellings


@dataclass(frozen=True, eq=False)
class Tars:
    """Members of tars as `maefast.data.records.Records`. tars: their paths or URLs. firsts: int64 [tars + 1], the place
    of each one's first member in names, offsets and sizes."""

    source: str
    tars: Sequence[str]
    firsts: np.ndarray
    names: Names
    offsets: np.ndarray
    sizes: np.ndarray
    notes: Sequence[str] = ()
    root: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_files", OrderedDict())

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Blob:
        tar, (start, size) = self._tar(index), (int(part[index]) for part in (self.offsets, self.sizes))
        return Blob(f"{tar}/{self.names[index]}", lambda: self._bytes(tar, start, size))

    def _tar(self, index: int) -> str:
        return self.tars[int(np.searchsorted(self.firsts, range(len(self))[index], side="right")) - 1]

    def name(self, index: int) -> str:
        return f"{os.path.basename(self._tar(index))}/{self.names[index]}"

    def fingerprint(self) -> str:
        hashed = hashlib.sha256(self.names.lines())
        hashed.update("\n".join(map(os.path.basename, self.tars)).encode(errors="surrogateescape"))
        hashed.update(np.asarray(self.firsts, np.int64).tobytes())
        return hashed.hexdigest()[:16]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": OrderedDict()}

    def _bytes(self, tar: str, start: int, size: int) -> bytes:
        data = remote.read(tar, start, start + size) if is_url(tar) else self._pread(tar, start, size)
        if len(data) != size:
            raise ValueError(f"{len(data)} of its {size} bytes are there: the tar is cut off, or another than before")
        return data

    def _pread(self, tar: str, start: int, size: int) -> bytes:
        """Without a position in the file, which processes that were forked would share."""
        files = self._files
        if tar not in files:
            while len(files) >= _OPEN:
                files.popitem(last=False)[1].close()
            files[tar] = open(tar, "rb", buffering=0)  # noqa: SIM115 (closed above, or with the process)
        files.move_to_end(tar)
        parts: list[bytes] = []
        while size > 0 and (part := os.pread(files[tar].fileno(), size, start)):  # 2 GiB at most at once
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return b"".join(parts)


def open_tars(
    source: str, tars: Sequence[str], endings: Sequence[str], *, column: str | None = None, skip_bad: bool = False
) -> Tars:
    """The members of `tars` that have one of these endings; with `column` those of this ending within a sample, such as
    "jpg" of 0001.jpg and 0001.seg.png; with "*" all of these endings, whatever is one sample.

    Raises:
        ConfigError: a tar that is not there, cut off or broken (with `skip_bad` its whole members are taken, and a note
            says so); no such members; several of a sample, without `column`.
    """
    notes: list[str] = []
    firsts, offsets, sizes = [0], [], []
    stored: list[str] = []

    def wanted_names() -> Iterator[str]:
        for tar, index in zip(tars, _indices(tars, skip_bad, notes)):
            kept = [place for place, name in enumerate(index.names) if is_wanted(name, endings, column)]
            yield from (index.names[place] for place in kept)
            offsets.append(index.offsets[kept])
            sizes.append(index.sizes[kept])
            firsts.append(firsts[-1] + len(kept))
            if index.stored is not None:
                stored.append(str(index.stored))
            if not kept and len(index):
                notes.append(f"--data {tar}: none of its {len(index)} members is wanted, such as {index.names[0]}")

    names = Names(wanted_names())  # never all of them as objects
    if stored:
        more = f" and {len(stored) - 1} more" if len(stored) > 1 else ""
        notes.append(f"--data {source}: indices of tars were made and stored ({stored[0]}{more})")
    if not names:
        ending = f".{column.lstrip('.')}" if column not in (None, "*") else None
        wanted = f"that ends in {ending}" if ending else f"with an ending of {' '.join(endings)}"
        raise ConfigError("; ".join([f"--data {source}: no member {wanted} in {len(tars)} tar(s)", *notes[:3]]))
    if column is None:
        one_a_sample(source, names)
    return Tars(source, list(tars), np.array(firsts), names, *map(np.concatenate, (offsets, sizes)), notes)


def _indices(tars: Sequence[str], skip_bad: bool, notes: list[str]) -> Iterator[TarIndex]:
    def make(tar: str) -> TarIndex | Exception:
        try:
            return index_of(tar)
        except OSError as error:
            return error

    began = time.monotonic()
    for done, (tar, index) in enumerate(zip(tars, _mapped(make, tars)), 1):
        complaint = index.complaint if isinstance(index, TarIndex) else _reason(index)
        if complaint is not None:
            if not skip_bad:
                advice = "--skip-bad takes what is whole" if isinstance(index, TarIndex) else "--skip-bad goes on"
                raise ConfigError(f"cannot read the tar {tar}: {complaint} ({advice})")
            count = len(index) if isinstance(index, TarIndex) else 0
            notes.append(f"warning: {tar}: {complaint}; {count} whole members of it are taken")
        elif index.followed:
            notes.append(f"warning: {tar}: {FOLLOWED}")
        if time.monotonic() - began > _PATIENCE:
            began = time.monotonic()
            print(f"indices of tars: {done} of {len(tars)}", file=sys.stderr, flush=True)
        yield index if isinstance(index, TarIndex) else TarIndex(Names([]), *np.zeros((2, 0), np.int64))


def _mapped(make: Callable[[str], TarIndex | Exception], tars: Sequence[str]) -> Iterator[TarIndex | Exception]:
    """Remote ones several at once: they are waited for."""
    if not any(map(is_url, tars)):
        yield from map(make, tars)
        return
    with ThreadPoolExecutor(min(8, len(tars))) as pool:
        try:
            yield from pool.map(make, tars)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _reason(error: OSError) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error) or repr(error)


def is_wanted(name: str, endings: Sequence[str], column: str | None) -> bool:
    """Whether a member is, see `open_tars`."""
    base = name.rpartition("/")[2]
    if base.startswith("."):  # what some systems add
        return False
    if column not in (None, "*"):
        return _key(name)[1].lower() == column.lstrip(".").lower()
    return os.path.splitext(base)[1].lower() in endings


def _key(name: str) -> tuple[str, str]:
    """(sample, ending) as WebDataset takes them apart: at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending


def one_a_sample(source: str, names: Sequence[str]) -> None:
    """ConfigError: several of the members are of one sample."""
    last, kinds, several = "", set(), None
    for name in names:
        key, ending = _key(name)
        if key == last and several is None:
            several = name
        last = key
        if len(kinds) < 8:
            kinds.add(ending)
    if several is not None and len(kinds) > 1:
        raise ConfigError(
            f"--data {source}: several members of one sample, such as {several}; --column says which are meant, one of "
            f"{', '.join(sorted(kinds))}, or '*' for all"
        )

"""Shards read front to back, for `--stream`: tars, compressed or not, and Parquet by its groups of rows. Local or
behind a URL."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import tarfile
import warnings
import zlib
from bz2 import BZ2File
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from maefast.data import remote
from maefast.data.blob import Blob
from maefast.data.lists import pick_column
from maefast.data.records import Names, Paths, is_url
from maefast.data.table_values import bytes_of, field_of, fitting_columns, has_bytes, is_text, open_parquet, raising
from maefast.data.tar_index import FOLLOWED, PADDING, not_zero
from maefast.errors import BadFile, ConfigError, TrainError, need

_BLOCK = tarfile.BLOCKSIZE
_AHEAD = 4 * 2**20  # bytes of a remote shard that are asked for at once
_DROPPED = 2**20  # bytes that are read at once where some are passed over
_ROWS = 64  # of a table, decoded at once
_BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)

Opened = Iterator["Blob | Path"]


def read_tar(shard: str, start: int, wanted: Callable[[str], bool]) -> Opened:
    """The members of a tar whose names are wanted, from the `start`-th of them on; those before are passed over.

    Raises:
        BadFile: it cannot be opened, or is cut off or broken behind what was given. Unreachable: no answer.
    """
    place, last = 0, ""
    with ExitStack() as stack:
        try:
            front = _Front(*_unpacked(shard, stack))
            tar = stack.enter_context(
                tarfile.open(fileobj=front, mode="r:", encoding="utf-8", errors="surrogateescape")
            )
            while (member := tar.next()) is not None:
                tar.members = []  # which it would keep
                last = member.name
                if not member.isreg() or member.issparse() or not wanted(member.name):
                    continue
                place += 1
                if place <= start:
                    continue
                front.seek(member.offset_data)
                data = front.read(member.size)
                if len(data) < member.size:
                    raise _Cut(f"it is cut off within the member {member.name}")
                yield Blob(f"{shard}/{member.name}", partial(bytes, data))
            if len(front.last) < _BLOCK:
                raise _Cut("it is cut off: its end mark is missing")
            if front.last != bytes(_BLOCK):
                raise _Cut(f"no header of a member at byte {front.tell() - _BLOCK}")
            if _is_followed(front):  # told by the process that reads it, once for each shard
                warnings.warn(f"{shard}: {FOLLOWED}", stacklevel=1)
        except TrainError:
            raise
        except _BROKEN as error:
            behind = f", behind {last}" if last and last not in str(error) else ""
            raise BadFile(shard, _reason(error) + behind) from error


def _is_followed(front: _Front) -> bool:
    """Whether there is more than zeros behind the end mark. All members were read: nothing is said of what is broken
    there."""
    try:
        return not_zero(front.read(PADDING))
    except TrainError:
        raise
    except _BROKEN:
        return False


def read_parquet(shard: str, start: int, column: str | None) -> Opened:
    """The values of a column of Parquet, see `maefast.data.tables`, from row `start` on. Groups of rows before it are
    not read. Raises as `read_tar` does."""
    try:
        import pyarrow
    except ImportError as error:
        raise need("pyarrow", "Reading tables", "data") from error
    try:
        with open_parquet(shard) as table:
            schema = table.schema_arrow
            column = pick_column(shard, schema.names, *fitting_columns(schema, column))
            first = 0
            for group in range(table.num_row_groups):
                at, first = first, first + table.metadata.row_group(group).num_rows
                if first <= start:
                    continue
                for batch in table.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False):
                    values = batch.column(column)
                    for place in range(max(0, start - at), len(values)):
                        yield _value(shard, at + place, values, place)
                    at += len(values)
    except ConfigError as error:  # of the column
        raise BadFile(shard, str(error).removeprefix(f"--data {shard}: ")) from error
    except TrainError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadFile(shard, _reason(error)) from error


def _value(shard: str, row: int, values: Any, place: int) -> Blob | Path:
    """What the row holds, without the table around it."""
    path = values[place].as_py() if is_text(values.type) else field_of(values, place, "path")
    if path and (is_text(values.type) or not has_bytes(values, place)):
        root = shard.rpartition("/")[0] if is_url(shard) else os.path.dirname(os.path.abspath(shard))
        return Paths(shard, root, Names([path])).path(0)
    name = f"{shard}[{row}]" + (f"/{os.path.basename(path)}" if path else "")
    try:
        data = b"" if is_text(values.type) else bytes_of(values, place)
        if not data:
            raise ValueError("there is nothing in its row")
    except ValueError as error:
        return Blob(name, partial(raising, error))
    return Blob(name, partial(bytes, data))


def _unpacked(shard: str, stack: ExitStack) -> tuple[BinaryIO, bool]:
    """What the file holds, decompressed by what its first bytes say; whether places in it can be gone to."""
    file: Any = remote.open_file(shard, _AHEAD) if is_url(shard) else open(shard, "rb")  # noqa: SIM115
    stack.enter_context(file)
    start = file.peek(6)
    if start.startswith(b"\x1f\x8b"):
        return stack.enter_context(gzip.GzipFile(fileobj=file)), False
    if start.startswith(b"BZh"):
        return stack.enter_context(BZ2File(file)), False
    if start.startswith(b"\xfd7zXZ\x00"):
        return stack.enter_context(lzma.LZMAFile(file)), False
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import pyarrow
        except ImportError as error:
            raise need("pyarrow", "Reading zstd", "data") from error
        return stack.enter_context(pyarrow.CompressedInputStream(file, "zstd")), False
    return file, True


class _Front(io.RawIOBase):
    """A file that is only gone through forwards, as `tarfile` reads it. last: what was read last."""

    def __init__(self, file: BinaryIO, seeks: bool) -> None:
        self._file, self._seeks, self._at, self.last = file, seeks, 0, b""

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        parts: list[bytes] = []
        while size > 0 and (part := self._file.read(size)):
            parts.append(part)
            size -= len(part)
        self.last = parts[0] if len(parts) == 1 else b"".join(parts)
        self._at += len(self.last)
        return self.last

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or to < self._at:
            raise io.UnsupportedOperation("it is only gone through forwards")
        if self._seeks and to > self._at:
            self._at = self._file.seek(to)
        while self._at < to and (part := self._file.read(min(_DROPPED, to - self._at))):
            self._at += len(part)
        return self._at


class _Cut(EOFError):
    """Said in our own words."""


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).splitlines()[0] if str(error) else repr(error)
    known = {"empty file": "it is empty", "unexpected end of data": "it is cut off"}
    if isinstance(error, tarfile.ReadError) and text in known:
        return known[text]
    return text if isinstance(error, _Cut) else f"{type(error).__name__}: {text}"

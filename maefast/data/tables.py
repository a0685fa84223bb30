"""Columns of tables: encoded images (bytes, or Hugging Face's {bytes, path}) or paths, in Parquet and Arrow files, such
as those that the package `datasets` writes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maefast.data.blob import Blob
from maefast.data.cache import cache_path
from maefast.data.lists import named_by, pick_column
from maefast.data.records import Paths, is_url
from maefast.data.table_values import (
    bytes_of,
    field_of,
    fitting_columns,
    has_bytes,
    is_text,
    open_parquet,
    raising,
    reason_of,
)
from maefast.data.tar_index import file_identity
from maefast.data.written import write_whole
from maefast.errors import ConfigError, need

_ROWS = 64  # written at once where a Parquet file is made readable by rows


@dataclass(frozen=True, eq=False)
class Table:
    """A column of Arrow files, mapped into memory, as `maefast.data.records.Records`.

    files: as the user knows them; stored: the Arrow files with their rows; firsts: int64 [files + 1], the place of each
    one's first row.
    """

    source: str
    column: str
    files: Sequence[str]
    stored: Sequence[str]
    firsts: np.ndarray
    notes: Sequence[str] = ()
    root: str = ""
    _mapped: dict[int, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def path(self, index: int) -> Blob | Path:
        file, row = self._place(index)
        try:
            value, at = self._value(file, row)
        except (ValueError, OSError) as error:  # Arrow's are of these: gone, or another than it was
            gone = error
            return Blob(f"{self.files[file]}[{row}]", lambda: raising(gone))
        path = field_of(value, at, "path")
        if path is not None and not has_bytes(value, at):
            return Path(os.path.dirname(os.path.abspath(self.files[file])), path)
        inner = f"/{os.path.basename(path)}" if path else ""
        return Blob(f"{self.files[file]}[{row}]{inner}", lambda: bytes_of(value, at))

    def name(self, index: int) -> str:
        file, row = self._place(index)
        path = field_of(*self._value(file, row), "path")
        return os.path.basename(path) if path else f"{os.path.basename(self.files[file])}[{row}]"

    def fingerprint(self) -> str:
        names = "\n".join([self.column, *map(os.path.basename, self.files)])
        hashed = hashlib.sha256(names.encode(errors="surrogateescape"))
        hashed.update(np.asarray(self.firsts, np.int64).tobytes())
        return hashed.hexdigest()[:16]

    def _place(self, index: int) -> tuple[int, int]:
        index = range(len(self))[index]
        file = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return file, index - int(self.firsts[file])

    def _value(self, file: int, row: int) -> tuple[Any, int]:
        """(an Arrow array, the row's place in it)."""
        if file not in self._mapped:
            arrays, complaint = _arrays(self.stored[file], self.column)
            if sum(map(len, arrays)) != self.firsts[file + 1] - self.firsts[file]:
                raise ValueError(f"{self.stored[file]}: {complaint or 'it is another file than before'}")
            self._mapped[file] = arrays, np.cumsum([0, *map(len, arrays)])
        arrays, starts = self._mapped[file]
        part = int(np.searchsorted(starts, row, side="right")) - 1
        return arrays[part], row - int(starts[part])


def open_tables(
    source: str, files: Sequence[str], *, column: str | None = None, skip_bad: bool = False
) -> Table | Paths:
    """The images or paths in `files`, Parquet or Arrow, of the column that is asked for or the only one that fits.

    Parquet keeps rows together, so that one cannot be read alone: its column of images is written once as Arrow, into
    the cache folder.

    Raises:
        ConfigError: a file that is not there, cut off or broken (with `skip_bad` its whole rows are taken and a note
            says so), no such column or several.
    """
    arrow = _arrow("Reading tables")
    notes: list[str] = []
    kept, stored, counts, texts = [], [], [0], []
    made = 0
    for file in files:
        try:
            schema = _schema(file)
            column = pick_column(file, schema.names, *fitting_columns(schema, column))
            if is_text(schema.field(column).type):
                texts += _texts(file, column)
                continue
            place = file
            if not file.lower().endswith(".arrow"):
                place, new = _by_rows(file, column)
                made += new
            arrays, complaint = _arrays(place, column)
        except (arrow.ArrowException, OSError) as error:
            place, arrays, complaint = None, [], reason_of(error)
        if complaint is not None:
            if not skip_bad:
                raise ConfigError(f"cannot read the table {file}: {complaint} (--skip-bad takes what is whole)")
            notes.append(f"warning: {file}: {complaint}; {sum(map(len, arrays))} whole rows of it are taken")
        if place is None:
            continue
        kept.append(file)
        stored.append(str(place))
        counts.append(sum(map(len, arrays)))
    if texts:
        if kept:
            raise ConfigError(f"--data {source}: the column {column!r} holds paths in some files and bytes in others")
        return named_by(files[0], texts)
    if not sum(counts):
        raise ConfigError("; ".join([f"--data {source}: no rows in {len(files)} table(s)", *notes[:3]]))
    if made:
        notes.append(
            f"--data {source}: {made / 2**20:.0f} MiB of images were written once into {Path(stored[-1]).parent}, for "
            "rows of Parquet cannot be read alone"
        )
    return Table(source, column, kept, stored, np.cumsum(counts), notes)


def _arrow(purpose: str) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise need("pyarrow", purpose, "data") from error
    return pyarrow


def _schema(file: str) -> Any:
    if file.lower().endswith(".arrow"):
        if is_url(file):
            raise ConfigError(
                f"--data {file}: Arrow files are mapped into memory and must be local; copy it, or use .parquet"
            )
        with _reader(file) as reader:
            return reader.schema
    with open_parquet(file) as table:
        return table.schema_arrow


def _reader(file: str) -> Any:
    """Of an Arrow file mapped into memory, in either of its two formats."""
    import pyarrow as pa

    mapped = pa.memory_map(str(file))
    options = pa.ipc.IpcReadOptions(use_threads=False)  # whose pool does not outlive a fork
    try:
        return pa.ipc.open_stream(mapped, options=options)
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_file(mapped, options=options)


def _arrays(file: str, column: str) -> tuple[list[Any], str | None]:
    """The column of every batch, and why there are no more where the file is cut off or broken."""
    import pyarrow as pa

    arrays: list[Any] = []
    try:
        with _reader(file) as reader:
            if hasattr(reader, "num_record_batches"):
                arrays += (reader.get_batch(i).column(column) for i in range(reader.num_record_batches))
            else:
                arrays += (batch.column(column) for batch in reader)
                if not _has_end(file):
                    return arrays, "it is cut off: its end mark is missing"
    except (pa.ArrowException, OSError) as error:
        return arrays, reason_of(error)
    except KeyError:
        return arrays, f"it has no column {column!r}"
    return arrays, None


def _has_end(file: str) -> bool:
    """Whether the mark that ends a stream of Arrow's is there: cut off between batches, it looks whole."""
    with open(file, "rb") as stream:
        stream.seek(-min(8, os.path.getsize(file)), os.SEEK_END)
        return stream.read() == b"\xff\xff\xff\xff\0\0\0\0"


def _by_rows(file: str, column: str) -> tuple[Path, int]:
    """An Arrow file with the column of a Parquet file, in the cache; how many bytes were written."""
    import pyarrow as pa

    known = file_identity(file)
    where = file if is_url(file) else os.path.abspath(file)
    place = cache_path("tables", f"{where}\n{column}\n{sorted(known.items())}", ".arrow")
    if place.exists():
        return place, 0

    def write(path: Path) -> None:
        with open_parquet(file) as table:
            fields = pa.schema([table.schema_arrow.field(column)])
            with pa.ipc.new_stream(str(path), fields) as writer:
                for batch in table.iter_batches(_ROWS, columns=[column], use_threads=False):
                    writer.write_batch(pa.record_batch([batch.column(column)], schema=fields))

    try:
        write_whole(place, write)
    except OSError as error:
        if error.filename is None or is_url(file) or not os.path.exists(file):
            raise
        raise ConfigError(
            f"--data {file}: its images cannot be written into the cache: {error}; $MAEFAST_CACHE names another folder"
        ) from error
    return place, place.stat().st_size


def _texts(file: str, column: str) -> list[str]:
    if file.lower().endswith(".arrow"):
        arrays, complaint = _arrays(file, column)
        values = [value for part in arrays for value in part.to_pylist()]
        if complaint is not None:
            raise ConfigError(f"cannot read the table {file}: {complaint}")
    else:
        with open_parquet(file) as table:
            values = table.read([column], use_threads=False).column(column).to_pylist()
    empty = next((row for row, value in enumerate(values) if not value), None)
    if empty is not None:
        raise ConfigError(f"--data {file}: row {empty} has nothing in the column {column!r}")
    return values

"""What `--data` names, as a sequence of things to be read: files of a folder or a list, members of tars, values of
tables. Whatever they are of, and wherever they lie, they look alike."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from maefast.data.blob import Blob, Where
from maefast.errors import ConfigError


class Records(Protocol):
    """Things to be read in a fixed order.

    Attributes:
        source: as a person knows them. root: folder that their names are relative to; "": none. notes: lines for the
            user, such as what was left out.
    """

    source: str
    root: str
    notes: Sequence[str]

    def __len__(self) -> int: ...

    def path(self, index: int) -> Where:
        """What to open. Nothing is read yet."""

    def name(self, index: int) -> str:
        """What messages and pictures show."""

    def fingerprint(self) -> str:
        """A short hash of the names in order, so that a resumed run notices changed data."""


class Names(Sequence[str]):
    """Strings in one buffer. A list of a million names is a million objects, each of whose reference counts is written
    to when it is looked at: every worker process would soon hold a copy of all of them."""

    def __init__(self, names: Iterable[str]) -> None:
        # Each ends with a line feed, so that the buffer is what `Paths.fingerprint` hashes. No list of ends and no
        # second copy of the buffer: with ten million names those would be gigabytes.
        self._buffer, self._ends = bytearray(), array("Q", [0])
        for name in names:
            self._buffer += name.encode(errors="surrogateescape") + b"\n"
            self._ends.append(len(self._buffer))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def lines(self) -> memoryview:
        """All names, with line feeds between them."""
        return memoryview(self._buffer)[:-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._buffer[self._ends[index] : self._ends[index + 1] - 1].decode(errors="surrogateescape")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return self._buffer == other._buffer and self._ends == other._ends
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None

    def __repr__(self) -> str:
        return f"Names({len(self)})"


@dataclass(frozen=True, eq=False)
class Paths:
    """Files in a fixed order, by names relative to `root`, absolute ones or URLs."""

    source: str
    root: str
    files: Names
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path | Blob:
        name = self.files[index]
        if not is_url(name):
            if not is_url(self.root):
                return Path(self.root, name)
            name = f"{self.root}/{name}"
        from maefast.data import remote

        return Blob(name, lambda: remote.read(name))

    def name(self, index: int) -> str:
        name = self.files[index]
        return os.path.basename(name) if os.path.isabs(name) or is_url(name) else name

    def fingerprint(self) -> str:
        names = self.files
        if not self.root:  # absolute ones, of which `name` is the last part
            names = Names(self.name(index) for index in range(len(self)))
        return hashlib.sha256(names.lines()).hexdigest()[:16]


TARS, LISTS, TABLES = (".tar",), (".txt", ".csv", ".tsv"), (".parquet", ".arrow")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_records(data: str | Path, endings: Sequence[str], options: Any = None) -> Records | None:
    """The records of a list, tars or tables that `data` names, or of a remote folder; None for all else, such as a
    local folder.

    Args:
        data: a name, a pattern ("shards/{0000..0127}.tar", "shards/*.tar") or a URL that fsspec knows.
        endings: of the records that are wanted in tars.
        options: of the run: `column`, `skip_bad`.

    Raises:
        ConfigError: a pattern without a match; what is there cannot be read.
    """
    text = on_the_hub(str(data))
    if not is_url(text) and Path(text).expanduser().is_dir():
        return None
    if text.lower().endswith(PACKED) and not _streams(options):
        raise ConfigError(
            f"--data {text}: a compressed tar has no places to go to; --stream reads it front to back, or unpack it to "
            "a plain .tar"
        )
    names = _matches(text)
    kinds = {_kind(name) for name in names}
    if is_url(text) and not kinds & {*TARS, *LISTS, *TABLES}:
        return inside(text, endings, options)
    if len(kinds) > 1 and kinds & {*TARS, *TABLES}:
        raise ConfigError(f"--data {text}: {', '.join(sorted(kinds))} files; give those of one kind")
    return _open(text, names, kinds.pop() if kinds else "", endings, options)


def no_column(data: str | Path, options: Any) -> None:
    """ConfigError: a column is asked for, and `data` has none."""
    if getattr(options, "column", None) is not None:
        raise ConfigError(f"--column {options.column} is for tables and tars, and --data {data} is neither")


def inside(folder: str | Path, endings: Sequence[str], options: Any = None) -> Records | None:
    """The records of the tars or, if there are none, of the tables in a folder, at any depth; None: it has neither."""
    text = on_the_hub(str(folder))
    found = _listing(text)
    for kind in (*TARS, *TABLES):
        names = [name for name in found if name.lower().endswith(kind)]
        if kind in TARS and _streams(options):
            names = [name for name in found if _kind(name) == kind]
        left_out = None
        if kind in TABLES:
            names, left_out = _of_datasets(names)
        if names:
            join = f"{text.rstrip('/')}/"
            records = _open(text, [join + name for name in names], kind, endings, options)
            return replace(records, notes=[*records.notes, f"--data {text}: {left_out}"]) if left_out else records
    if is_url(text):
        raise ConfigError(f"--data {text}: neither tars nor tables (.parquet) in it")
    return None


def _open(text: str, names: list[str], kind: str, endings: Sequence[str], options: Any) -> Records | None:
    column, skip_bad = getattr(options, "column", None), getattr(options, "skip_bad", False)
    if _streams(options) and kind in (*TARS, *TABLES):
        return _open_streamed(text, names, kind, endings, options)
    if kind in TARS:
        from maefast.data.tars import open_tars

        return open_tars(text, names, endings, column=column, skip_bad=skip_bad)
    if kind in TABLES:
        from maefast.data.tables import open_tables

        return open_tables(text, names, column=column, skip_bad=skip_bad)
    if kind in LISTS and len(names) == 1 and (is_url(names[0]) or Path(names[0]).is_file()):
        from maefast.data.lists import open_list

        return open_list(names[0], column=column)
    return None


def _open_streamed(text: str, names: list[str], kind: str, endings: Sequence[str], options: Any) -> Records:
    from maefast.data import shards, streams, tars

    if kind not in TARS:
        if arrow := [name for name in names if not name.lower().endswith(".parquet")]:
            raise ConfigError(f"--data {arrow[0]}: --stream reads Parquet; rows of Arrow files are read without it")
        read = partial(shards.read_parquet, column=options.column)
        return streams.open_streamed(text, names, read, options, "rows")
    wanted = partial(tars.is_wanted, endings=endings, column=options.column)
    what = f"member with an ending of {' '.join(endings)}" if options.column is None else f"member {options.column}"
    found = streams.open_streamed(text, names, partial(shards.read_tar, wanted=wanted), options, what)
    if options.column is None:
        tars.one_a_sample(text, [str(where) for where in found.head])
    return found


def _streams(options: Any) -> bool:
    return getattr(options, "stream", False)


def _kind(name: str) -> str:
    """The ending that says what a file is, that of compressed tars ".tar"."""
    return ".tar" if name.lower().endswith(PACKED) else os.path.splitext(name)[1].lower()


def on_the_hub(text: str) -> str:
    """hf://USER/NAME as fsspec's hf://datasets/USER/NAME."""
    if not text.startswith("hf://") or text.startswith(("hf://datasets/", "hf://spaces/", "hf://buckets/")):
        return text
    return "hf://datasets/" + text.removeprefix("hf://")


def is_url(text: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def expand_braces(text: str) -> list[str]:
    """As a shell does it: "{00..12}" and "{a,b}" -> every text that is meant. ConfigError: more than a million."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices: list[list[str]] = []
    for place, part in enumerate(parts):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part) if place % 2 else None
        if span:
            first, last = int(span[1]), int(span[2])
            width = max(map(len, span.groups())) if any(t.startswith("0") and len(t) > 1 for t in span.groups()) else 0
            if abs(last - first) >= 1_000_000:
                raise ConfigError(f"--data {text}: more than a million files")
            step = 1 if first <= last else -1
            choices.append([f"{number:0{width}}" for number in range(first, last + step, step)])
        else:
            choices.append([part] if place % 2 == 0 else part.split(",") if "," in part else [f"{{{part}}}"])
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _matches(text: str) -> list[str]:
    """The files that a pattern means, existing or not; those of a wildcard exist, and are sorted."""
    if not is_url(text):
        text = str(Path(text).expanduser())
        if os.path.exists(text):  # whatever is in its name
            return [text]
    names = []
    for name in expand_braces(text):
        if not re.search(r"[*?\[]", name):
            names.append(name)
            continue
        if is_url(name):
            from maefast.data import remote

            found = remote.matching(name)
        else:
            found = sorted(glob.glob(name, recursive=True))
        if not found:
            raise ConfigError(f"--data {name}: no file has such a name")
        names += found
    return names


def _listing(folder: str) -> list[str]:
    """Names of all files below a folder, relative to it, sorted; hidden ones are left out."""
    if is_url(folder):
        from maefast.data import remote

        names = remote.listing(folder)
    else:
        names = [
            os.path.relpath(os.path.join(at, name), folder).replace(os.sep, "/")
            for at, _, files in os.walk(folder, followlinks=False)
            for name in files
        ]
    return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))


def _of_datasets(names: list[str]) -> tuple[list[str], str | None]:
    """Without the intermediate files that the package `datasets` leaves; of several splits that of training, and a line
    about the others."""
    names = [name for name in names if not os.path.basename(name).startswith(("cache-", "tmp"))]
    train = [name for name in names if re.search(r"(^|[-_/.])train([-_/.]|$)", name)]
    if not train or len(train) == len(names):
        return names, None
    rest = next(name for name in names if name not in train)
    return train, f"only the split for training is taken; left out {len(names) - len(train)} file(s), such as {rest}"

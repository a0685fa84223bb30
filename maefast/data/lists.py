"""Lists of files: a path a line (.txt), or a column of a table (.csv, .tsv)."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence

import numpy as np

from maefast.data.records import Names, Paths, is_url
from maefast.errors import ConfigError

# Names of the column that holds paths, where none is given, in lower case.
USUAL = ("path", "file", "file_name", "filename", "filepath", "file_path", "image", "image_path", "img", "img_path")
_LOOKED_AT = 16  # paths of a list that are looked for before a run starts


def open_list(name: str, column: str | None = None) -> Paths:
    """The files that the list at `name` (a path or a URL) names: absolute paths, URLs, or paths relative to its folder.

    In a .txt empty lines and those that start with "#" are left out. A .csv or .tsv has a row of names first, unless
    it is one column of paths.

    Raises:
        ConfigError: no text, an empty list, no such column or several, none of its files there.
    """
    try:
        raw = _bytes(name)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--data {name}: is a list of files, and no text in UTF-8 ({error})") from error
    except OSError as error:
        raise ConfigError(f"--data {name}: {error.strerror or error}") from error
    ending = os.path.splitext(name)[1].lower()
    if ending == ".txt":
        if column is not None:
            raise ConfigError(f"--column {column} is for tables, and --data {name} has a path a line")
        lines = (line.strip() for line in text.splitlines())
        found = [line for line in lines if line and not line.startswith("#")]
    else:
        found = _column(name, text, "\t" if ending == ".tsv" else ",", column)
    if not found:
        raise ConfigError(f"--data {name}: is a file without a path in it; a list has one a line")
    return named_by(name, found)


def named_by(name: str, files: Sequence[str]) -> Paths:
    """`files`, which the list or table `name` names. ConfigError: none of those looked for is there."""
    root = name.rpartition("/")[0] if is_url(name) else os.path.dirname(os.path.abspath(name))
    paths = Paths(name, root, Names(files))
    if not is_url(root):
        places = np.linspace(0, len(files) - 1, min(_LOOKED_AT, len(files))).astype(int).tolist()
        local = [paths.path(place) for place in places if not is_url(files[place])]
        if local and not any(path.exists() for path in local):
            raise ConfigError(
                f"--data {name}: its files are not there, such as {local[0]} (paths in a list are relative to the "
                "folder of the list, or absolute)"
            )
    return paths


def _bytes(name: str) -> bytes:
    if is_url(name):
        from maefast.data import remote

        return remote.read(name)
    with open(name, "rb") as file:
        return file.read()


def _column(name: str, text: str, delimiter: str, column: str | None) -> list[str]:
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    if not rows:
        return []
    head, width = [cell.strip() for cell in rows[0]], len(rows[0])
    if column is None and width == 1 and head[0].lower() not in USUAL and os.path.splitext(head[0])[1]:
        return [row[0].strip() for row in rows]  # paths from the first line on
    place = head.index(pick_column(name, head, head, column))
    short = next((number for number, row in enumerate(rows, 1) if len(row) <= place or not row[place].strip()), None)
    if short is not None:
        raise ConfigError(f"--data {name}: row {short} has nothing in the column {head[place]!r}")
    return [row[place].strip() for row in rows[1:]]


def pick_column(name: str, columns: Sequence[str], fitting: Sequence[str], column: str | None) -> str:
    """The one of `columns` that is asked for; else the only one of those `fitting`, or the only one with a usual name.

    Raises:
        ConfigError: there is no such one, or several.
    """
    have = f"its columns are {', '.join(map(repr, columns))}"
    if column is not None:
        if column not in columns:
            raise ConfigError(f"--data {name}: no column {column!r}; {have}")
        if column not in fitting:
            raise ConfigError(f"--data {name}: the column {column!r} holds neither bytes nor paths")
        return column
    usual = [entry for entry in fitting if entry.lower() in USUAL]
    for found in (fitting, usual):
        if len(found) == 1:
            return found[0]
    raise ConfigError(f"--data {name}: --column NAME must say which column holds them; {have}")

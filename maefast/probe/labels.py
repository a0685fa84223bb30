"""A class for each sample: the folder that it lies in, or its row in a CSV file."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from maefast.errors import ConfigError

FOLDERS = "folders"
_NAMES = ("file", "filename", "file_name", "filepath", "path", "image", "image_id", "img", "name", "id")
_CLASSES = ("label", "class", "target", "category")


def read_labels(spec: str, names: Sequence[str], option: str = "--labels") -> tuple[list[str | None], list[str]]:
    """(the class of each sample, None where it has none; lines for the user).

    Args:
        spec: "folders": the first folder of each name, as in ``cats/1.jpg``; else a CSV file of names and classes.
        names: of the samples, relative to the folder of the data, with "/".
        option: what `spec` came from, for messages.

    Raises:
        ConfigError: no such file, no table of names and classes, or none of the samples has a class.
    """
    if spec == FOLDERS:
        found = [
            name.split("/", 1)[0] if "/" in name.lstrip("/") and not name.startswith("/") else None for name in names
        ]
        if not any(found):
            raise ConfigError(
                f"{option} folders: the samples lie in no folders of classes, as in cats/1.jpg: {names[0]}"
            )
        if any(label.endswith((".tar", ".parquet", ".arrow")) for label in set(found) if label):
            raise ConfigError(f"{option} folders: {names[0]} lies in no folder; a CSV file tells classes of such data")
        lacking, where = [name for name, label in zip(names, found) if label is None], "lie in no folder of a class"
    else:
        table = _table(Path(spec).expanduser(), names, option)
        found = [next((table[key] for key in keys if key in table), None) for keys in _keys(names)]
        if not any(label is not None for label in found):
            raise ConfigError(
                f"{option} {spec}: none of the {len(names)} samples is in it; it has {next(iter(table), 'no row')!r}, "
                f"and the first sample is {names[0]!r}"
            )
        lacking, where = [name for name, label in zip(names, found) if label is None], f"have no row in {spec}"
    more = ", ..." if len(lacking) > 3 else ""
    return found, [f"left out, since they {where}: {len(lacking)} ({', '.join(lacking[:3])}{more})"] if lacking else []


def _keys(names: Sequence[str]) -> list[list[str]]:
    """What each sample may be called: its path; and that without the ending, and the last part of either, where no
    other sample shares it."""
    paths = [PurePosixPath(name) for name in names]
    short = [(str(path.with_suffix("")), path.name, path.stem) for path in paths]
    counts = [Counter(forms) for forms in zip(*short)]
    return [
        [str(path), *(form for form, count in zip(forms, counts) if count[form] == 1)]
        for path, forms in zip(paths, short)
    ]


def _table(path: Path, names: Sequence[str], option: str) -> Mapping[str, str]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except OSError as error:
        wanted = "give 'folders', or a CSV file of names and classes"
        raise ConfigError(f"{option} {path}: {error.strerror or error} ({wanted})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{option} {path}: no CSV in UTF-8 ({error})") from error
    if not rows:
        raise ConfigError(f"{option} {path}: is empty")
    first = [cell.strip().lower() for cell in rows[0]]
    name = next((first.index(known) for known in _NAMES if known in first), None)
    label = next((first.index(known) for known in _CLASSES if known in first), None)
    if name is None or label is None:
        if len(first) != 2:
            raise ConfigError(
                f"{option} {path}: its {len(first)} columns ({', '.join(rows[0][:6])}) are not known; wanted are two, "
                f"or a first row that names one of {', '.join(_NAMES)} and one of {', '.join(_CLASSES)}"
            )
        known = {key for keys in _keys(names) for key in keys}
        (name, label), headed = (0, 1), _clean(rows[0][0]) not in known
    else:
        headed = True
    table: dict[str, str] = {}
    for number, row in enumerate(rows[1:] if headed else rows, 2 if headed else 1):
        if len(row) <= max(name, label):
            raise ConfigError(f"{option} {path}: row {number} has {len(row)} columns, not {len(first)}")
        key, value = _clean(row[name]), row[label].strip()
        if table.setdefault(key, value) != value:
            raise ConfigError(f"{option} {path}: {key} has two classes, {table[key]!r} and {value!r}")
    return {key: value for key, value in table.items() if value}


def _clean(name: str) -> str:
    return str(PurePosixPath(name.strip().replace("\\", "/")))

"""What runs leave, as seen from outside: their checkpoints, complete or not, and the mark in their pictures.

`maefast.train.checkpoint` writes them; data that lie beside them must be told from them.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path

SOFTWARE = "maefast"  # in the pictures that we draw, which are no data
FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MODEL_SHARDS, OPTIMIZER_SHARDS = "model", "optimizer"  # folders in place of the files, of runs in shards
_STEP = re.compile(r"step-(\d{8,})$")
WRITING, REMOVING = ".writing-", ".removing-"


def listing(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every folder with a checkpoint's name, oldest first. Nothing is checked."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.match(path.name)) and path.is_dir()]
    return sorted(found)


def weights_of(path: Path) -> Path:
    """The weights of the checkpoint at `path`: a file, or a folder of shards."""
    shards = path / MODEL_SHARDS
    return shards if shards.is_dir() else path / MODEL


def complaint(path: Path) -> str | None:
    """Why the checkpoint at `path` is not usable, or None when it is complete."""
    try:
        document = json.loads((path / STATE).read_text())
        sizes = document["files"]
        if document["format"] != FORMAT:
            return f"format {document['format']}, this version reads {FORMAT}"
    except FileNotFoundError:
        return f"{STATE} is missing"
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"{STATE} cannot be read ({type(error).__name__}: {error})"
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def complete_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """(names of the columns, rows as text) of a CSV whose first column counts steps. A row that a kill cut off, and all
    after it, are left out."""
    text = path.read_text()
    header, *lines = csv.reader(text[: text.rfind("\n") + 1].splitlines() or [""])
    whole = itertools.takewhile(lambda cells: len(cells) == len(header) and cells[0].isdigit(), lines)
    return header, list(whole)


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint in `folder` (None if there is none) and notes on what was passed over."""
    notes = []
    if folder.is_dir():
        notes += [
            f"ignoring {path}: half-written when an earlier run was stopped"
            for path in sorted(folder.iterdir())
            if path.name.startswith(WRITING)
        ]
    for _, path in reversed(listing(folder)):
        problem = complaint(path)
        if problem is None:
            return path, notes
        notes.append(f"ignoring {path}: {problem}")
    return None, notes

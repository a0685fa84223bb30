"""What a sample is read from: a path, or bytes that lie within something else."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias


@dataclass(frozen=True)
class Blob:
    """Bytes under a name, as messages show it: a member of a tar ("0001.tar/a.jpg"), a value of a table, a URL.

    `read` fetches them, each time that they are asked for; a ValueError or OSError says why it cannot.
    """

    name: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.name


Where: TypeAlias = "str | Path | Blob"


def opened(where: Where) -> BinaryIO:
    """The bytes at `where` as a file to be closed by the caller."""
    return io.BytesIO(where.read()) if isinstance(where, Blob) else open(where, "rb")


def ending(where: Where) -> str:
    """The extension of its name, in lower case: ".jpg"."""
    return os.path.splitext(str(where))[1].lower()

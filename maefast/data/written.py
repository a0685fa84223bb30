"""Writing files: as a whole, and so that what goes wrong names the file."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What goes wrong with a file that is open, as on a full disk, does not say which one it is; nor do safetensors."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # by its name: safetensors may not be installed
            raise
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file beside its place and move it there: no other process sees a part of it. OSError, which
    names `path` or what of it cannot be had."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            write(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

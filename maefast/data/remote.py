"""Files behind URLs, by fsspec. Whatever it asks for comes within a time, or is asked for again, or raises: nothing
hangs.

MAEFAST_REMOTE_TIMEOUT (seconds, 60) and MAEFAST_REMOTE_ATTEMPTS (4) say how long and how often.
"""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

from maefast.errors import ConfigError, Unreachable, need

T = TypeVar("T")

PAUSE = 0.5  # seconds before the second attempt, twice as many before each further one
BLOCK = 2**20  # bytes, read at once where a file is gone through
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, EOFError, MemoryError)


def read(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Bytes [start, stop) of the file, or all of them. FileNotFoundError, PermissionError; Unreachable: no answer."""
    system, path = _system(url)
    return _ask(url, lambda: system.cat_file(path, start=start, end=stop))


def identity(url: str) -> dict[str, Any]:
    """Its size, and whatever tells that a file has changed, in JSON types."""
    system, path = _system(url)
    info = _ask(url, lambda: system.info(path))
    if info.get("type") == "directory":
        raise IsADirectoryError(url)
    told = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created", "updated", "md5Hash", "blob_id")
    return {"size": info.get("size"), **{name: str(info[name]) for name in told if info.get(name) is not None}}


def open_file(url: str, block: int | None = None) -> BinaryIO:
    """To be gone through: it is read in blocks, each asked for as `read` does."""
    return io.BufferedReader(_Ranges(url), block or BLOCK)


def matching(pattern: str) -> list[str]:
    """URLs of the files that a pattern with wildcards means, sorted."""
    system, path = _system(pattern)
    return sorted(system.unstrip_protocol(name) for name in _ask(pattern, lambda: system.glob(path)))


def listing(folder: str) -> list[str]:
    """Names of all files below a folder, relative to it. FileNotFoundError as ConfigError."""
    system, path = _system(folder)
    try:
        names = _ask(folder, lambda: system.find(path))
    except FileNotFoundError:
        names = []
    if not names:
        raise ConfigError(f"--data {folder}: no such folder, or nothing in it")
    root = path.rstrip("/") + "/"
    return [name.removeprefix(root) for name in names]


def _system(url: str) -> tuple[Any, str]:
    """(file system, path within it). Those of fsspec belong to a process and a thread, and are kept there by it."""
    try:
        import fsspec
    except ImportError as error:
        raise need("fsspec", f"Reading {url}", "data") from error
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # "Install s3fs to access S3", "Protocol not known"
        raise ConfigError(f"{url} cannot be read: {error}") from error


def _ask(url: str, call: Callable[[], T]) -> T:
    seconds = float(os.environ.get("MAEFAST_REMOTE_TIMEOUT", "60"))
    attempts = max(1, int(os.environ.get("MAEFAST_REMOTE_ATTEMPTS", "4")))
    last: Exception | None = None
    for attempt in range(attempts):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return _within(seconds, call)
        except _FINAL:
            raise
        except Exception as error:  # each file system has errors of its own
            last = error
    times = "one attempt" if attempts == 1 else f"{attempts} attempts"
    reason = f"{Unreachable.START} in {times} of up to {seconds:g} s: {type(last).__name__}: {last}"
    raise Unreachable(url, reason) from last


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises. TimeoutError: nothing within `seconds`, and its thread is left to itself."""
    answer: list[tuple[bool, Any]] = []

    def work() -> None:
        try:
            answer.append((True, call()))
        except BaseException as error:
            answer.append((False, error))

    thread = threading.Thread(target=work, daemon=True)  # which would not keep a process from ending
    thread.start()
    thread.join(seconds)
    if not answer:
        raise TimeoutError("timed out")
    good, value = answer[0]
    if good:
        return value
    raise value


class _Ranges(io.RawIOBase):
    """A file behind a URL, each read a request for a range."""

    def __init__(self, url: str) -> None:
        self._url, self._at, self._size = url, 0, identity(url)["size"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        stop = min(self._size, self._at + len(buffer))
        if stop <= self._at:
            return 0
        data = read(self._url, self._at, stop)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

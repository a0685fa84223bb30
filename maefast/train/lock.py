"""One run to a folder: a second one would mix its checkpoints and metrics with those of the first."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

from maefast.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of some network file systems
_open: set[int] = set()  # descriptors of the locks that this process holds


class FolderLock:
    """Holds `folder` until `close`, or until this process ends, however it ends. Where there are no locks it holds
    nothing.

    Raises:
        ConfigError: another run holds it. `option` is the one that names the folder.
    """

    def __init__(self, folder: Path, option: str = "--output-dir") -> None:
        self._path, self._file = folder / NAME, None
        self._made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return
        try:
            self._file = self._locked(option)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._path.unlink(missing_ok=True)

    def _locked(self, option: str) -> int | None:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is(file):
                    _open.add(file)
                    with suppress(OSError):  # on a full disk the lock is held all the same
                        os.ftruncate(file, 0)
                        os.write(file, f"{os.getpid()} {socket.gethostname()}\n".encode())
                    return file
                os.close(file)  # of a run that ended since, which took the file away
            except BlockingIOError:
                holder = _holder(file)
                os.close(file)
                told = f"{self._path.parent} is in use by another run{holder}; give another {option}"
                raise ConfigError(told) from None
            except BaseException:
                os.close(file)
                raise

    def _is(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Leave no trace: of a run that was refused before it wrote anything, not even its folder."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)  # before it is unlocked: afterwards it may be another's
            _open.discard(self._file)
            os.close(self._file)
            self._file = None
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # something is in it
                break
        self._made = []


def _holder(file: int) -> str:
    """The process that holds it, as it wrote itself down."""
    number, _, host = os.pread(file, 200, 0).decode(errors="replace").strip().partition(" ")
    if not number:
        return ""
    return f" (process {number}{'' if host == socket.gethostname() else f' on {host}'})"


def _forget() -> None:
    """In a process that was forked, as a loader's: it may live on for a while when the run is killed."""
    for file in _open:
        os.close(file)
    _open.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)

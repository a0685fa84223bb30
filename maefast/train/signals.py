"""Finishing the step in hand when told to stop."""

from __future__ import annotations

import os
import signal
import threading

_ANNOUNCED = getattr(signal, "SIGUSR1", None)  # there is none on Windows
_NUMBERS = [number for number in (signal.SIGTERM, signal.SIGINT, _ANNOUNCED) if number is not None]


class StopSignal:
    """Within the block, SIGTERM, SIGINT and SIGUSR1 only set `name`.

    A second SIGTERM or SIGINT acts as usual, for the impatient; SIGUSR1, by which schedulers announce the end of the
    time, may come as often as it likes. tell: say at the first one what happens now.
    """

    def __init__(self, tell: bool = False) -> None:
        self._teller = os.getpid() if tell else None  # not its loader's processes, which are forked with the handlers
        self.name: str | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids handlers
            for number in _NUMBERS:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        if self.name is None and self._teller == os.getpid():
            _tell(number)
        self.name = signal.Signals(number).name
        if number != _ANNOUNCED:
            signal.signal(number, self._old.pop(number))

    def _restore(self) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        self._old = {}

    def __exit__(self, *_: object) -> None:
        self._restore()


def _tell(number: int) -> None:
    """Past Python's buffers, in which the signal may have come."""
    again = "; press again to stop at once without saving" if number == signal.SIGINT else ""
    try:
        start = "\n" if os.isatty(2) else ""  # below the bar of progress
        os.write(2, f"{start}stopping after this step and saving{again}\n".encode())
    except OSError:  # nobody listens any more
        pass

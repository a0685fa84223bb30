"""Finishing the step in hand when told to stop."""

from __future__ import annotations

import signal
import threading

_ANNOUNCED = getattr(signal, "SIGUSR1", None)  # there is none on Windows
_NUMBERS = [number for number in (signal.SIGTERM, signal.SIGINT, _ANNOUNCED) if number is not None]


class StopSignal:
    """Within the block, SIGTERM, SIGINT and SIGUSR1 only set `name`.

    A second SIGTERM or SIGINT acts as usual, for the impatient; SIGUSR1, by which schedulers announce the end of the
    time, may come as often as it likes.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids handlers
            for number in _NUMBERS:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
        if number != _ANNOUNCED:
            signal.signal(number, self._old.pop(number))

    def _restore(self) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        self._old = {}

    def __exit__(self, *_: object) -> None:
        self._restore()

"""Finishing the step in hand when told to stop."""

from __future__ import annotations

import signal
import threading


class StopSignal:
    """Within the block, SIGTERM and SIGINT only set `name`; a second one acts as usual, for the impatient."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        self._old = {}

    def __exit__(self, *_: object) -> None:
        self._restore()

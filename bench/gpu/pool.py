"""Runs jobs in as many processes as there are cores, each process one job after another: kernels are compiled side by
side, and one that takes its process down (a bad address on the device ends every later call of a process) costs one
result."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable
from typing import Any

Outcome = dict[str, Any]  # "outcome" and further fields of the line
Work = Callable[[str], Outcome]


def _serve(pipe, make: Callable[..., Work], arguments: tuple) -> None:
    try:
        work = make(*arguments)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)  # ready
    while (id := pipe.recv()) is not None:
        start = time.monotonic()
        try:
            outcome = work(id)
        except Exception as error:
            outcome = {"outcome": "failed", "error": f"{type(error).__name__}: {error}"}
        pipe.send({**outcome, "seconds": round(time.monotonic() - start, 3)})
        if "CUDA error" in str(outcome.get("error", "")):
            return  # what follows in this process would fail, too


class _Worker:
    def __init__(self, context, make, arguments):
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.job: str | None = None
        self.ready = False  # it still imports, which is not the job's time
        self.start = time.monotonic()

    def give(self, id: str | None) -> None:
        self.job, self.start = id, time.monotonic()
        self.pipe.send(id)

    def took(self) -> float:
        return time.monotonic() - self.start if self.ready else 0.0

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def run(
    ids: list[str],
    make: Callable[..., Work],
    arguments: tuple,
    report: Callable[[str, Outcome], None],
    processes: int,
    seconds: float,
    each: float = 60.0,
) -> None:
    """Run every id in turn and `report` each outcome as it comes.

    Args:
        make: make(*arguments) -> work, in each process; work(id) -> {"outcome": ..., ...}. Importable, as are the
            arguments.
        seconds: for all; what has not begun then is not reported, what has is reported as "cut".
        each: seconds for one.

    Raises:
        RuntimeError: `make` failed.
    """
    context = multiprocessing.get_context("spawn")
    waiting, deadline = list(reversed(ids)), time.monotonic() + seconds
    workers = [_Worker(context, make, arguments) for _ in range(min(processes, len(ids)))]
    try:
        for worker in workers:
            worker.give(waiting.pop())
        while workers:
            now = time.monotonic()
            if now >= deadline:
                break
            until = min([deadline, *(worker.start + each for worker in workers if worker.ready)])
            ready = multiprocessing.connection.wait([w.pipe for w in workers], max(0.0, until - now))
            for worker in list(workers):
                if worker.pipe in ready:
                    try:
                        outcome = worker.pipe.recv()
                        if outcome is None:
                            worker.ready, worker.start = True, time.monotonic()
                            continue
                        if isinstance(outcome, str):
                            raise RuntimeError(f"the processes cannot start: {outcome}")
                    except (EOFError, OSError):
                        worker.process.join(5)
                        outcome = {"outcome": "crashed", "error": f"exit status {worker.process.exitcode}"}
                        outcome["seconds"] = round(worker.took(), 3)
                elif worker.took() >= each:
                    outcome = {"outcome": "timeout", "error": f"not done after {each:g} s", "seconds": each}
                else:
                    continue
                report(worker.job, outcome)
                _next(workers, worker, waiting, outcome, lambda: _Worker(context, make, arguments))
        for worker in workers:
            took = round(worker.took(), 3)
            report(worker.job, {"outcome": "cut", "error": "the stage's time was over", "seconds": took})
    finally:
        for worker in workers:
            worker.stop()


def _next(workers: list[_Worker], worker: _Worker, waiting: list[str], outcome: Outcome, new) -> None:
    """The next job for a worker; a new one in its place where it is lost."""
    lost = outcome["outcome"] in ("crashed", "timeout") or "CUDA error" in str(outcome.get("error", ""))
    if lost or not waiting:
        workers.remove(worker)
        worker.stop()
        if not waiting:
            return
        worker = new()
        workers.append(worker)
    worker.give(waiting.pop())

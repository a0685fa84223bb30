"""A loader that can start at any step of a run."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from maefast import seeds
from maefast.data.source import Samples
from maefast.errors import TrainError
from maefast.recipe import Batch


class Positions(Sampler):
    """Batches of (position, epoch, index) for one process, from any position of the run on.

    The run reads one endless stream of positions; position p is sample permutation(epoch)[p mod n] of epoch p div n.
    Micro-batch k takes the next batch x processes positions, rank r the r-th slice of `batch` of them, so all
    processes together see what one process with their joint batch would.
    """

    def __init__(self, count: int, seed: int, *, batch: int, rank: int, world: int, start: int, micro_batches: int):
        self.count, self.seed, self.batch, self.rank, self.world = count, seed, batch, rank, world
        self.start, self.micro_batches = start, micro_batches

    def __len__(self) -> int:
        return self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, order = -1, None
        for k in range(self.micro_batches):
            first = self.start + (k * self.world + self.rank) * self.batch
            batch = []
            for position in range(first, first + self.batch):
                if position // self.count != epoch:
                    epoch = position // self.count
                    order = seeds.permutation(self.seed, epoch, self.count)
                batch.append((position, epoch, int(order[position % self.count])))
            yield batch


_GRACE = 60  # seconds that a worker goes on after SIGTERM, while the main process finishes its step and saves


def _worker_init(_: int) -> None:
    # Ctrl-C and a scheduler's SIGUSR1 reach the whole group; the main process finishes its step and ends the workers.
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # whose default is to end the process
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
    torch.set_num_threads(1)


class Loader:
    """Iterates `Batch`es, measures the time spent waiting for them, and collects what cannot be read.

    A batch that has a hole for that raises what the samples say, see `Samples.failure`.
    """

    def __init__(self, dataset: Samples, positions: Sampler, *, workers: int, pin: bool):
        self.dataset = dataset
        self.bad: dict[str, str] = {}
        self.places: dict[int, Any] = {}  # of streams, behind the last batch, see `streamed`
        self.waited = 0.0
        loader = DataLoader(
            dataset,
            batch_sampler=positions,
            num_workers=workers,
            collate_fn=dataset.collate,
            pin_memory=pin,
            worker_init_fn=_worker_init,
            prefetch_factor=4 if workers else None,
            # Under "forkserver" (the default from Python 3.14 on) workers would outlive a killed run: torch's watchdog
            # in them looks at their parent, which then is the server, and the server lives as long as they do.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )
        self._iterator = iter(loader)  # starts the workers
        # torch's handler raises for a lost worker wherever the main thread is, in mid-step too. Without it `next` does.
        self._on_child = None
        if workers and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            self._on_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def close(self) -> None:
        """End the workers, whatever holds on to this object, and put the signal handler back."""
        workers = getattr(self._iterator, "_workers", ())
        if workers:
            self._iterator._shutdown_workers()
        for worker in workers:
            if worker.is_alive():
                worker.kill()  # torch's terminate() would wait for `_GRACE`
        self._iterator = iter(())
        if self._on_child is not None:
            signal.signal(signal.SIGCHLD, self._on_child)
            self._on_child = None

    def next(self) -> Batch:
        began = time.perf_counter()
        try:
            batch, bad, *places = next(self._iterator)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainError(
                f"a process that loads {self.dataset.unit}s was lost, killed for its memory perhaps (fewer --workers, "
                f"a smaller --cache-mb): {error}"
            ) from error
        if batch is not None and hasattr(self.dataset, "finish"):
            batch, more = self.dataset.finish(batch)
            bad = [*bad, *more]
        self.waited += time.perf_counter() - began
        self.bad.update(bad)
        for found in places:
            self.places.update(found)
        if batch is None:
            raise self.dataset.failure(bad)
        return batch

"""The streams of a run with `--stream`: which process reads which, and what a checkpoint keeps of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from torch.utils.data import Dataset, Sampler

from maefast.data.images.source import ImageSource
from maefast.data.source import Samples, Source
from maefast.data.streams import Place, Stream, Streamed
from maefast.errors import SKIP_BAD, BadFile, ConfigError, TrainError, Unreachable
from maefast.recipe import Batch

from .accelerator import Processes
from .config import PretrainConfig

_KEY = "streams"  # of a checkpoint's `extra`


class Streams:
    """Streams that the samples of a run come from: of position p, stream (p div unit) mod count.

    `count` and `unit` are those that the run began with: processes x workers (at least one each), and the samples of a
    batch of one process. So micro-batch k of rank r is of one stream, which one worker reads. `rank` of `world`
    processes is this one. places: see `maefast.data.streams.Place`; those of this process are in `mine`.
    """

    def __init__(self, source: Source, config: PretrainConfig, rank: int, world: int) -> None:
        self.records = _streamed(source, config)
        self.config, self.rank, self.world = config, rank, world
        self.count, self.unit = world * max(1, config.workers), config.batch_size
        self._found: dict[int, Place] = {}
        self.mine: dict[int, Place] = {}

    @property
    def epoch(self) -> float:
        """Whole passes over the data, the mean of the streams of this process."""
        return sum(place.epoch for place in self.mine.values()) / max(1, len(self.mine))

    def __str__(self) -> str:
        return f"{self.count} stream(s) of {len(self.records.shards)} shard(s)"

    def resume(self, extra: Mapping[str, Any]) -> None:
        """Go on from what `record` made. ConfigError: these data, or this number of processes, cannot."""
        kept = extra.get(_KEY)
        if kept is None:
            raise ConfigError("the checkpoint is of a run without --stream: go on without it, or another --output-dir")
        if kept["shuffle"] != self.records.shuffle:
            now, then = self.records.shuffle, kept["shuffle"]
            raise ConfigError(f"--shuffle {now}: the run was begun with {then}, which its place in the data depends on")
        if (kept["shards"], kept["fingerprint"]) != (len(self.records.shards), self.records.fingerprint()):
            raise ConfigError(
                f"--data {self.records.source}: the shards are others than those that the run was begun with "
                f"({kept['shards']} then, {len(self.records.shards)} now), and so its place in them is lost. "
                "--init-from starts a new run with its weights"
            )
        self.count, self.unit = kept["count"], kept["unit"]
        self._found = {int(number): Place(*place) for number, place in kept["places"].items()}
        self._check_shares()

    def _check_shares(self) -> None:
        """Each stream must be read by one worker of one process."""
        batch, workers = self.config.batch_size, max(1, self.config.workers)
        units, over = divmod(batch, self.unit)
        turns, left = divmod(self.count, self.world * units) if units else (0, 1)
        if not over and not left and turns % workers == 0:
            return
        have = f"the run was begun with {self.count} streams and a batch of {self.unit} per process"
        if over or not units:
            raise ConfigError(f"--batch-size {batch}: {have}, and goes on with a multiple of {self.unit}")
        if left:
            able = [n for n in range(1, self.count // units + 1) if self.count % (n * units) == 0]
            which = f"with {_listed(able)} process(es)" if able else f"with --batch-size {self.unit}"
            raise ConfigError(f"{have}, which {self.world} process(es) cannot share evenly: go on {which}")
        able = [n for n in range(1, turns + 1) if turns % n == 0]
        raise ConfigError(
            f"--workers {self.config.workers}: {have}, of which each of {self.world} process(es) reads {turns}: give "
            f"--workers {_listed(able)}, or 0"
        )

    def samples(self, samples: Samples) -> StreamSamples:
        return StreamSamples(samples, self)

    def positions(self, start: int, micro_batches: int) -> StreamPositions:
        for turn in range(self.count * self.unit // (self.world * self.config.batch_size)):
            first = start + (turn * self.world + self.rank) * self.config.batch_size
            for position in range(first, first + self.config.batch_size, self.unit):
                number = self.number(position)
                self.mine[number] = self._found.get(number, Place())
        return StreamPositions(start, micro_batches, self.config.batch_size, self.rank, self.world)

    def number(self, position: int) -> int:
        """Of the stream that a position's sample comes from."""
        return position // self.unit % self.count

    def open(self, number: int) -> Stream:
        """A stream, from where this process began on."""
        place = self._found.get(number, Place())
        return Stream(self.records, self.config.seed, number, self.count, place)

    def record(self, processes: Processes) -> dict[str, Any]:
        """What a checkpoint keeps. All processes must ask."""
        places = dict(self._found)
        for part in processes.all(self.mine):
            places.update(part)
        return {
            _KEY: {
                "count": self.count,
                "unit": self.unit,
                "shuffle": self.records.shuffle,
                "shards": len(self.records.shards),
                "fingerprint": self.records.fingerprint(),
                "places": {str(number): list(places[number]) for number in sorted(places)},
            }
        }


class StreamPositions(Sampler):
    """Batches of positions for one process, as `maefast.train.data.Positions` gives them."""

    def __init__(self, start: int, micro_batches: int, batch: int, rank: int, world: int) -> None:
        self.start, self.micro_batches, self.batch, self.rank, self.world = start, micro_batches, batch, rank, world

    def __len__(self) -> int:
        return self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for k in range(self.micro_batches):
            first = self.start + (k * self.world + self.rank) * self.batch
            yield list(range(first, first + self.batch))


class StreamSamples(Dataset):
    """The next samples of streams, made as `samples` makes those of an index: the position is the index.

    A batch brings the places of its streams behind it: of what a loader has fetched ahead a checkpoint knows nothing.
    """

    def __init__(self, samples: Samples, streams: Streams) -> None:
        self.samples, self.streams, self.unit = samples, streams, samples.unit
        self.skip_bad = streams.config.skip_bad
        self._open: dict[int, Stream] = {}

    def __getitems__(self, positions: list[int]) -> tuple[list, dict[int, Place]]:
        places = {}
        with getattr(self.samples, "batch_of", nullcontext)(len(positions)):
            made = [self._sample(position, places) for position in positions]
        return made, places

    def _sample(self, position: int, places: dict[int, Place]) -> tuple[Any, int, list[tuple[str, str]]]:
        number = self.streams.number(position)
        if number not in self._open:
            self._open[number] = self.streams.open(number)
        stream, records, bad = self._open[number], self.streams.records, []
        began = stream.place.epoch
        while True:
            try:
                where = stream.next()
            except BadFile as error:
                return None, position, [*bad, *stream.bad, (str(error.path), error.reason)]
            with records.giving(where):
                sample, _, found = self.samples[position, 0, position]
            bad += [*stream.bad, *found]
            stream.bad.clear()
            lost = bool(found) and found[-1][1].startswith(Unreachable.START)
            if sample is not None or not self.skip_bad or lost or stream.place.epoch > began + 1:
                places[number] = stream.place
                return sample, position, bad

    def collate(self, batch: tuple[list, dict[int, Place]]) -> tuple[Batch | None, list, dict[int, Place]]:
        made, places = batch
        return *self.samples.collate(made), places

    def failure(self, bad: list[tuple[str, str]]) -> Exception:
        path, reason = bad[-1]
        shards = self.streams.records
        if reason.startswith(Unreachable.START):
            return Unreachable(path, reason, "the same command goes on from here")
        if path in (*shards.shards, shards.source):
            return BadFile(path, reason, "" if path == shards.source else SKIP_BAD)
        if self.skip_bad:
            return TrainError(f"none of the {self.unit}s of a whole pass can be read; the last: {path}: {reason}")
        return self.samples.failure(bad)


def _streamed(source: Source, config: PretrainConfig) -> Streamed:
    """The shards of a source that was opened with `--stream`. ConfigError: it has an index, or is made."""
    records = source.images if isinstance(source, ImageSource) else None
    if records is None:
        records = getattr(getattr(source, "entries", None), "records", None)
    if not isinstance(records, Streamed):
        raise ConfigError(
            f"--stream: --data {config.data} is neither tars (.tar, .tar.gz, .tar.zst, ...) nor Parquet; what has an "
            "index is read without it"
        )
    return records


def _listed(numbers: list[int]) -> str:
    texts = [*map(str, numbers)]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"

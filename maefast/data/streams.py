"""Streams of records out of shards that are read front to back (`--stream`).

A run has a fixed number of streams, whatever the number of processes that read them. In its epoch e a stream reads its
part of the shards in an order that (seed, e) gives, holds so many records at once, a block, and gives them out in an
order that (seed, e, stream, block) gives. So where a stream is takes five numbers to say, see `Place`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from maefast import seeds
from maefast.data.blob import Blob, Where
from maefast.errors import BadFile, ConfigError, Unreachable

_SHARDS, _EACH, _BYTES = 16, 16, 128 * 2**20  # of the first records, that are looked at before a run


@dataclass(eq=False)
class Streamed:
    """Shards as `maefast.data.records.Records`, of which only the first records can be gone to: those that are looked
    at before a run (ranges of values, pictures). While one of a stream is read, it is what every place holds.

    Attributes:
        shards: paths or URLs. read: (shard, start) -> its records from the start-th on. shuffle: records of a block.
        column: that was asked for.
    """

    source: str
    shards: tuple[str, ...]
    read: Callable[[str, int], Iterator[Where]]
    shuffle: int
    skip_bad: bool = False
    column: str | None = None
    notes: Sequence[str] = ()
    root: str = ""
    head: list[Where] = field(default_factory=list, repr=False)
    _given: Where | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.head)

    def path(self, index: int) -> Where:
        return self.head[index] if self._given is None else self._given

    def name(self, index: int) -> str:
        return "/".join(str(self.path(index)).split("/")[-2:])

    def fingerprint(self) -> str:
        names = "\n".join([str(self.column), *map(os.path.basename, self.shards)])
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]

    @contextmanager
    def giving(self, where: Where) -> Iterator[None]:
        """Every place holds this record."""
        self._given = where
        try:
            yield
        finally:
            self._given = None


def open_streamed(
    source: str, shards: Sequence[str], read: Callable[[str, int], Iterator[Where]], options: Any, wanted: str
) -> Streamed:
    """`shards`, and the first records of some of them. ConfigError: one of these cannot be read, or has nothing."""
    records = Streamed(source, tuple(shards), read, options.shuffle, options.skip_bad, options.column)
    notes, size = [], 0
    for number in np.linspace(0, len(shards), min(_SHARDS, len(shards)), endpoint=False).astype(int).tolist():
        try:
            for where in itertools.islice(read(shards[number], 0), _EACH):
                size += len(where.read()) if isinstance(where, Blob) and not records.head else 0
                records.head.append(where)
        except Unreachable:
            raise
        except BadFile as error:
            if not options.skip_bad:
                advice = "--skip-bad goes on with the others"
                raise ConfigError(f"cannot read the shard {shards[number]}: {error.reason} ({advice})") from error
            notes.append(f"warning: {shards[number]}: {error.reason}")
        if size * len(records.head) > _BYTES:  # about, by the first one
            break
    if not records.head:
        raise ConfigError("; ".join([f"--data {source}: no {wanted} in {len(shards)} shard(s)", *notes[:3]]))
    records.notes = notes
    return records


class Place(NamedTuple):
    """Where a stream is: of its block the epoch, the first record (shard in the epoch's order, record in the shard) and
    the number in the epoch; and how many records of the block were given out."""

    epoch: int = 0
    shard: int = 0
    record: int = 0
    block: int = 0
    given: int = 0


class _Block:
    """Records that are held together. failed: what was met instead of more of them; last: of the epoch."""

    def __init__(self, epoch: int, shard: int, record: int, number: int) -> None:
        self.epoch, self.shard, self.record, self.number = epoch, shard, record, number
        self.held: list[Where | None] = []
        self.order: np.ndarray | None = None
        self.failed: BadFile | None = None
        self.last = False


class Stream:
    """One of `count` streams, from `place` on. bad: (name, reason) of shards that were left out, since last looked at.

    With as many shards as streams or more, it reads every count-th of an epoch's order whole; with fewer, every
    count-th record of all of them.
    """

    def __init__(self, records: Streamed, seed: int, number: int, count: int, place: Sequence[int] = Place()) -> None:
        self.records, self.seed, self.number, self.count = records, seed, number, count
        self.bad: list[tuple[str, str]] = []
        place = Place(*place)
        self._block = self._begin(_Block(*place[:4]))
        self._next: _Block | None = None
        self._given = place.given
        if place.given:
            self._fill(self._block, records.shuffle)
            self._shuffle()
            if self._block.failed is None and len(self._block.held) < place.given:
                reason = f"fewer records than the {place.given} that a run had from it; the data are others than before"
                self._block.failed = BadFile(records.source, reason)

    @property
    def place(self) -> Place:
        block = self._block
        return Place(block.epoch, block.shard, block.record, block.number, self._given)

    def next(self) -> Where:
        """The next record. BadFile: a shard cannot be read on, and bad ones are not to be skipped; Unreachable."""
        while self._block.failed is not None or self._block.order is None or self._given >= len(self._block.held):
            self._advance()
        at = int(self._block.order[self._given])
        where, self._block.held[at] = self._block.held[at], None  # and its bytes are free
        self._given += 1
        if not self._block.last and self._block.failed is None:  # read evenly, not a whole block at once
            if self._next is None:
                self._next = self._following()
            self._fill(self._next, 1)
        return where

    def _advance(self) -> None:
        block = self._block
        if block.failed is not None:  # nothing of a block that is not whole is given out: mended, it has another order
            raise block.failed
        if block.order is not None:
            block = self._begin(_Block(block.epoch + 1, 0, 0, 0)) if block.last else self._next or self._following()
        self._block, self._next, self._given = block, None, 0
        self._fill(block, self.records.shuffle)
        if not block.held and block.last and block.number == 0:
            reason = f"no record for stream {self.number} of {self.count} in the {len(self.records.shards)} shard(s)"
            block.failed = BadFile(self.records.source, f"{reason}; fewer processes and --workers make fewer streams")
        if block.failed is not None:
            raise block.failed
        self._shuffle()

    def _begin(self, block: _Block) -> _Block:
        """`block` as the first that is read from where it starts."""
        self._walk = self._records(block.epoch, block.shard, block.record)
        self._at = block.shard, block.record
        return block

    def _following(self) -> _Block:
        return _Block(self._block.epoch, *self._at, self._block.number + 1)

    def _fill(self, block: _Block, count: int) -> None:
        """Up to `count` more records, as far as it has room."""
        for _ in range(min(count, self.records.shuffle - len(block.held))):
            if block.last or block.failed is not None:
                return
            try:
                found = next(self._walk, None)
            except BadFile as error:
                block.failed = error
                return
            if found is None:
                block.last = True
                return
            shard, record, where = found
            block.held.append(where)
            self._at = shard, record + 1

    def _shuffle(self) -> None:
        block = self._block
        rng = seeds.generator(self.seed, seeds.STREAM, block.epoch, ((self.number + 1) << 32) + block.number)
        block.order = rng.permutation(len(block.held))

    def _records(self, epoch: int, shard: int, record: int) -> Iterator[tuple[int, int, Where]]:
        """(shard in the epoch's order, record in the shard, record) from a place on to the end of the epoch."""
        shards = self.records.shards
        order = seeds.generator(self.seed, seeds.STREAM, epoch).permutation(len(shards))
        whole = len(shards) >= self.count
        for number in range(shard, len(shards)):
            if whole and number % self.count != self.number:
                continue
            name, start = shards[int(order[number])], record if number == shard else 0
            try:
                for at, where in enumerate(self.records.read(name, start), start):
                    if whole or (at + number) % self.count == self.number:
                        yield number, at, where
            except Unreachable:
                raise
            except BadFile as error:
                if not self.records.skip_bad:
                    raise
                self.bad.append((str(error.path), error.reason))

"""What a fine-tuning began with. One that goes on with other samples held back would be judged on what it learnt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maefast.errors import ConfigError

BEGAN = "began"  # of what a checkpoint keeps


@dataclass(frozen=True)
class Began:
    """checkpoint, ema, step: whose encoder it is, as given, and of what step where that is known. weights: digest of
    the encoder. split: the options that tell the samples apart, in words. held: digest of the names of those held back.
    """

    checkpoint: str
    ema: bool
    step: int | None
    weights: str
    split: str
    held: str

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def going_on(self, record: Mapping[str, Any] | None) -> tuple[Began | None, list[str]]:
        """(what the run of a checkpoint with this record began with, lines for the user), where this is what is given
        now. None: the checkpoint is older than such records.

        Raises:
            ConfigError: the samples are others, or the encoder is.
        """
        if record is None:
            return None, []
        then = Began(**record)
        if then.held != self.held:
            same = "the data have changed since: put them back" if then.split == self.split else "give these again"
            raise ConfigError(
                "the run to go on with held other samples back, so that its accuracy could count what it has learnt "
                f"from. It began with {then.split}: {same}, or begin anew in another --output"
            )
        if then.weights == self.weights:  # whatever its path is now
            return self, []
        if (then._path, then.ema) != (self._path, self.ema):
            raise ConfigError(
                f"the run to go on with began from {then.told}, whose encoder is another than that of {self.told}: "
                "give that one again, or begin anew in another --output"
            )
        then = replace(then, split=self.split)
        return then, [f"{self.checkpoint} has other weights than when this run began from it; they are not used"]

    @property
    def _path(self) -> Path:
        return Path(self.checkpoint).expanduser().resolve()

    @property
    def told(self) -> str:
        parts = [] if self.step is None else [f"step {self.step}"]
        parts += ["--ema"] if self.ema else []
        return f"{self.checkpoint} ({', '.join(parts)})" if parts else self.checkpoint


def digest_of_names(names: Iterable[str]) -> str:
    """Of a set of samples, whatever their order."""
    return hashlib.sha256("\0".join(sorted(names)).encode(errors="surrogateescape")).hexdigest()[:16]


def digest_of_weights(state: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(state):
        if not name.endswith("num_batches_tracked"):  # some files leave these out
            found.update(name.encode())
            found.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]

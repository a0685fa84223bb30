"""Errors of training and of the data for it. The command line prints them as one message, without a traceback."""

from __future__ import annotations

from pathlib import Path


class TrainError(RuntimeError):
    """A run cannot start or go on; the message says why and what to do."""


class ConfigError(TrainError, ValueError):
    """An option, or a combination of options, makes no sense."""


class BadFile(TrainError):
    """A file cannot be read, or not be used. `path` names it (a Path, or a URL as text), `reason` says why; `advice` is
    what to do where it was met."""

    what = ""

    def __init__(self, path: str | Path, reason: str, advice: str = ""):
        super().__init__(f"cannot read {self.what}{path}: {reason}" + (f" ({advice})" if advice else ""))
        self.reason = reason
        self.path = str(path) if "://" in str(path) else Path(str(path))  # a URL is not a path


class Unreachable(BadFile):
    """Remote data that gave no answer, asked several times: the run stops, also with --skip-bad."""

    START = "no answer"  # of every reason


class BadImage(BadFile):
    """An image file cannot be decoded."""

    what = "image "


SKIP_BAD = "--skip-bad counts and skips such files"


class CheckpointError(TrainError):
    """A checkpoint is missing, incomplete or does not fit the model."""


class NonFiniteLoss(TrainError):
    """The loss became NaN or infinite at `step`; `checkpoint` is the last good one (None if none was written)."""

    def __init__(self, step: int, value: float, checkpoint: Path | None, what: str = "loss", rate: str = "--blr"):
        last = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been written yet"
        super().__init__(
            f"the {what} is {value} at step {step}; training stopped and nothing was saved after it: {last}. "
            f"Usual cures: a lower {rate}, --clip 1.0, a longer --warmup, --amp bf16 in place of fp16."
        )
        self.step = step
        self.checkpoint = checkpoint


def need(module: str, purpose: str, extra: str = "train") -> TrainError:
    """The error for an absent optional package, which comes with one of maefast's extras."""
    return TrainError(f'{purpose} needs the package {module!r}: pip install "maefast[{extra}]"')

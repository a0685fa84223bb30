"""`--wandb`: the numbers and pictures of a run in Weights & Biases, through what TensorBoard's writer is asked for."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from maefast.errors import ConfigError, need

_ID = "wandb-id.txt"


class WandbWriter:
    """A run of the user's wandb project. Its name is kept in `folder`, that of the output, so that a run which goes on,
    with `done` steps behind it, is the same one there; steps that are taken again, equal to the bit, are not logged
    twice.

    Environment variables of wandb count: WANDB_MODE=offline needs no network, WANDB_ENTITY, WANDB_API_KEY, ...
    What fails later, such as a network that is gone for long, is said once and ends the logging, never the training.

    Raises:
        TrainError: wandb is not installed. ConfigError: it cannot start.
    """

    def __init__(
        self, project: str, folder: Path, done: int, config: Mapping[str, Any], say: Callable[[str], object]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise need("wandb", "--wandb", "wandb") from error
        self._wandb, self._say, self._run = wandb, say, None
        kept = folder / _ID
        name = kept.read_text().strip() if done and kept.is_file() else uuid.uuid4().hex[:8]
        try:
            self._run = wandb.init(
                project=project,
                id=name,
                name=folder.resolve().name,
                dir=str(folder),
                config=dict(config),
                resume="allow",
                save_code=False,
            )
        except Exception as error:  # of the package's own many kinds
            advice = "WANDB_MODE=offline keeps what is logged in the output folder"
            raise ConfigError(f"--wandb {project}: {error} ({advice})") from error
        kept.write_text(f"{name}\n")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._log({name: value}, step)

    def add_image(self, name: str, pixels: Tensor, step: int) -> None:
        """pixels: uint8 [C, H, W]."""
        self._log({name: self._wandb.Image(pixels.permute(1, 2, 0).numpy())}, step)

    def close(self) -> None:
        self._try(lambda run: run.finish())
        self._run = None

    def _log(self, values: dict[str, Any], step: int) -> None:
        self._try(lambda run: run.log(values, step=step))

    def _try(self, work: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            work(self._run)
        except Exception as error:  # as above
            self._run = None
            self._say(f"wandb failed, and gets no more of this run: {error}")

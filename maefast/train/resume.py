"""Where a run starts from, and whether it still is the same run."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from maefast.data.source import Source
from maefast.errors import CheckpointError, ConfigError

from . import checkpoint
from .config import PretrainConfig, differences

if TYPE_CHECKING:
    from accelerate import Accelerator


def choose_checkpoint(accelerator: Accelerator, resume: str, out: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `--resume auto|none|PATH` means, and notes for the user.

    The main process looks and tells the others, so that all start from the same one.
    """
    answer: list = [None, []]
    if accelerator.is_main_process:
        answer = list(_choose(resume, out / "checkpoints"))
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(answer)
    return answer[0], answer[1]


def _choose(resume: str, folder: Path) -> tuple[Path | None, list[str]]:
    if resume == "auto":
        path, notes = checkpoint.latest(folder)
        if path is None and checkpoint.listing(folder):
            reasons = "; ".join([f"no checkpoint in {folder} is usable", *notes])
            raise CheckpointError(f"{reasons}. Another output folder (-o) starts anew")
        return path, notes
    if resume == "none":
        path, notes = checkpoint.latest(folder)
        if path is not None:
            raise ConfigError(
                f"--resume none, but {folder.parent} holds a run at {path.name}: "
                "choose another folder (-o), remove that one, or --resume auto"
            )
        return None, notes
    return resolve(Path(resume))


def resolve(path: Path) -> tuple[Path, list[str]]:
    """A checkpoint folder from its own path, or the newest complete one from the path of a run."""
    if (path / checkpoint.STATE).is_file() or path.name.startswith("step-"):
        problem = checkpoint.complaint(path) if path.is_dir() else "no such folder"
        if problem:
            raise CheckpointError(f"{path} is not a usable checkpoint: {problem}")
        return path, []
    for folder in (path / "checkpoints", path):
        found, notes = checkpoint.latest(folder)
        if found is not None:
            return found, notes
    raise CheckpointError(f"no checkpoint found at {path}")


def model_changes(then: dict, now: dict) -> list[str]:
    """What is not the same of two models."""
    return [f"{k}: {then.get(k)} -> {now.get(k)}" for k in {**then, **now} if then.get(k) != now.get(k)]


def trained_with(
    finished: checkpoint.State | None, config: PretrainConfig, total: int, samples: int
) -> tuple[PretrainConfig, int, int]:
    """(options, steps, samples of a step) that a run is trained with: those given, or, where it is `finished` and takes
    no step with those, the ones that its checkpoint tells of."""
    if finished is None:
        return config, total, samples
    known = {entry.name for entry in fields(PretrainConfig)} - {"output_dir", "resume"}  # where it lies now
    then = replace(config, **{name: value for name, value in finished.config.items() if name in known})
    return then, finished.extra["total"], then.batch_size * then.accum * finished.extra["processes"]


def compare(
    state: checkpoint.State, config: PretrainConfig, model: dict, source: Source, total: int, world: int = 1
) -> list[str]:
    """Warnings about what changed since the checkpoint. A model of another shape is an error.

    `world`: processes now.
    """
    if changed := model_changes(state.model_config, model):
        raise CheckpointError(
            f"the checkpoint holds another model ({', '.join(changed)}): give the same options, or another folder (-o)"
        )
    if state.step > total:
        raise ConfigError(f"the checkpoint has {state.step} steps done, and the run is to have only {total}")
    lines = differences(state.config, config.to_dict())
    lines += source.changes(state.extra)
    then, now = (c["batch_size"] * c["accum"] for c in (state.config, config.to_dict()))
    before = state.extra["processes"]
    if then * before != now * world:
        lines.append(f"{source.unit}s per step: {then * before} -> {now * world} ({before} -> {world} processes)")
    if total != state.extra["total"]:
        lines.append(f"total steps: {state.extra['total']} -> {total} (the learning rate follows the new length)")
    if not lines:
        return []
    if state.step == total:
        return [f"the run is finished: no step is left, and what changed is not used ({'; '.join(lines)})"]
    return ["resuming with changed settings, so the losses will differ from those of the run as it began:"] + [
        f"  {line}" for line in lines
    ]

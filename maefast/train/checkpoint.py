"""Checkpoints: written atomically, checked when read, the last few kept.

A checkpoint is a folder `step-00000500` with

    model.safetensors       weights, parameter names of the authors' code
    optimizer.safetensors   AdamW's tensors, "<kind>.<parameter name>"
    state.json              everything else: step, position in the data, configuration, scaler, sizes of the other files

Of a run in shards (`--fsdp`) the optimizer's tensors lie in a folder `optimizer`, which each process writes its part of
(torch.distributed.checkpoint); any number of processes, or one without shards, reads it.

It is written under a temporary name, flushed to the disk file by file, and renamed as a whole, so a folder with a
final name is complete. Reading still checks the sizes, because disks fill up and copies get interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from maefast.data.runs import FORMAT, MODEL, OPTIMIZER, REMOVING, SHARDS, STATE, WRITING, complaint, listing
from maefast.data.runs import latest as latest  # with the writing of them, for who resumes
from maefast.errors import CheckpointError

from .sharding import gathered, like


@dataclass
class State:
    """What a run needs besides tensors. `step` steps are done, `position` samples consumed."""

    step: int
    position: int
    config: dict
    model_config: dict
    scaler: dict | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, state: State, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int = 3) -> Path:
    """Write `folder/step-…` atomically, then remove all but the newest `keep` complete ones. Returns its path."""
    final, temporary = _begin(folder, state, str(os.getpid()))
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    _write_weights(temporary, weights, state)
    save_file(_optimizer_tensors(model, optimizer), temporary / OPTIMIZER, metadata={"format": "pt"})
    return _finish(final, temporary, state, keep)


def save_shards(
    folder: Path, state: State | None, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int = 3
) -> Path:
    """The same by all processes together, each of which holds shards. `state`: on the main process, None on others.
    What goes wrong on one is raised on all."""
    weights = gathered(model, keep=state is not None)

    def begin() -> tuple[Path, Path]:
        found = _begin(folder, state, "shards")
        _write_weights(found[1], weights, state)
        return found

    final, temporary = _told(None if state is None else begin)
    weights.clear()
    writer = torch.distributed.checkpoint.FileSystemWriter(temporary / SHARDS)
    torch.distributed.checkpoint.save(_optimizer_tensors(model, optimizer), storage_writer=writer)
    return _told(None if state is None else lambda: _finish(final, temporary, state, keep))


def _told(work: Callable[[], Any] | None) -> Any:
    """What `work` gives on the main process, on all of them. OSError: what it raised there."""
    answer: list[Any] = [None, None]
    if work is not None:
        try:
            answer[0] = work()
        except (OSError, SafetensorError) as error:
            answer[1] = str(error)
    torch.distributed.broadcast_object_list(answer)
    if answer[1] is not None:
        raise OSError(answer[1])
    return answer[0]


def _begin(folder: Path, state: State, mark: str) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.step:08d}"
    temporary = folder / f"{WRITING}{final.name}-{mark}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return final, temporary


def _write_weights(folder: Path, weights: dict[str, torch.Tensor], state: State) -> None:
    save_file(weights, folder / MODEL, metadata={"format": "pt", "maefast": json.dumps(state.model_config)})


def _finish(final: Path, temporary: Path, state: State, keep: int) -> Path:
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
    document = {
        "format": FORMAT,
        "step": state.step,
        "position": state.position,
        "files": sizes,
        "model_config": state.model_config,
        "config": state.config,
        "scaler": state.scaler,
        "extra": state.extra,
    }
    (temporary / STATE).write_text(json.dumps(document, indent=2) + "\n")
    for path in (*files, temporary / STATE, *{path.parent for path in files}):
        fsync(path)
    fsync(temporary)
    if final.exists():  # only a broken one can be there: a run never goes back behind a good one it would rewrite
        shutil.rmtree(final)
    os.rename(temporary, final)
    fsync(final.parent)
    _prune(final.parent, state.step, keep)
    return final


def _prune(folder: Path, step: int, keep: int) -> None:
    # Broken checkpoints do not count as kept, and newer ones (broken, or set there by hand) are not ours to judge.
    older = [path for found, path in listing(folder) if found <= step]
    good = [path for path in older if complaint(path) is None]
    for path in older[: older.index(good[-keep])] if len(good) > keep else []:
        # First renamed: a kill in mid-removal must not leave half a checkpoint under a final name.
        doomed = folder / f"{REMOVING}{path.name}-{os.getpid()}"
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clean(folder: Path) -> None:
    """Remove half-written leftovers of earlier runs. Call only while no other process writes there."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith((WRITING, REMOVING)):
                shutil.rmtree(path, ignore_errors=True)


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints newer than `step` to "superseded-…" (a run that goes back must not resume from them)."""
    moved = []
    for found, path in listing(folder):
        if found > step:
            number = sum(1 for _ in folder.glob(f"superseded-*-{path.name}"))
            target = folder / f"superseded-{number}-{path.name}"
            os.rename(path, target)
            moved.append(target)
    return moved


def read_state(path: Path) -> State:
    """The state of a complete checkpoint; CheckpointError says what is wrong with any other."""
    problem = complaint(path) if path.is_dir() else "no such folder"
    if problem:
        raise CheckpointError(f"{path} is not a usable checkpoint: {problem}")
    document = json.loads((path / STATE).read_text())
    names = ("step", "position", "config", "model_config", "scaler", "extra")
    return State(**{name: document[name] for name in names})


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Copy a checkpoint's tensors into `model` and `optimizer` (both unwrapped, on their final device), in shards or
    not, whichever way it was written."""
    weights, mine = load_weights(path / MODEL), model.state_dict()
    try:
        weights = {name: like(tensor, mine[name]) if name in mine else tensor for name, tensor in weights.items()}
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from error
    if (path / SHARDS).is_dir():
        tensors = _read_shards(path / SHARDS, model, optimizer)
    else:
        owners = dict(model.named_parameters())
        tensors = load_weights(path / OPTIMIZER)
        for key, tensor in tensors.items():
            owner = owners.get(key.split(".", 1)[1])
            if owner is not None and tensor.shape == owner.shape:
                tensors[key] = like(tensor, owner)
    slots: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        slots.setdefault(name, {})[kind] = tensor.clone()
    names = _parameter_names(model, optimizer)
    wrong = set(slots) ^ set(names) if slots else set()
    if wrong:
        raise CheckpointError(f"{path}: optimizer state and model differ in {sorted(wrong)[:5]}")
    state = {index: slots[name] for index, name in enumerate(names) if name in slots}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read_shards(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What `save_shards` wrote, as the parameters lie now."""
    owners, found = dict(model.named_parameters()), {}
    reader = torch.distributed.checkpoint.FileSystemReader(path)
    for key, about in reader.read_metadata().state_dict_metadata.items():
        owner = owners.get(key.split(".", 1)[1])
        if owner is None:
            raise CheckpointError(f"{path}: the model has no parameter {key.split('.', 1)[1]}")
        made = tuple(about.size) == tuple(owner.shape)
        found[key] = torch.zeros_like(owner.detach()) if made else torch.zeros(about.size)
    torch.distributed.checkpoint.load(found, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    return found


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters in its own order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{kind}.{names[id(parameter)]}": value.detach().contiguous()
        for parameter, slots in optimizer.state.items()
        for kind, value in slots.items()
        if isinstance(value, torch.Tensor)
    }

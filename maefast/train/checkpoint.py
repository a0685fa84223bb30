"""Checkpoints: written atomically, checked when read, the last few kept.

A checkpoint is a folder `step-00000500` with

    model.safetensors       weights, parameter names of the authors' code
    optimizer.safetensors   AdamW's tensors, "<kind>.<parameter name>"
    state.json              everything else: step, position in the data, configuration, scaler, sizes of the other files

Of a run in shards (`--fsdp`) folders `model` and `optimizer` are in their place, which each process writes its part of
(torch.distributed.checkpoint); any number of processes, or one without shards, reads them. Older ones of such runs hold
the weights in `model.safetensors` and are read too.

It is written under a temporary name, flushed to the disk file by file, and renamed as a whole, so a folder with a
final name is complete. Reading still checks the sizes, because disks fill up and copies get interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

from maefast.data.runs import (
    FORMAT,
    MODEL,
    MODEL_SHARDS,
    OPTIMIZER,
    OPTIMIZER_SHARDS,
    REMOVING,
    STATE,
    WRITING,
    complaint,
    listing,
)
from maefast.data.runs import latest as latest  # with the writing of them, for who resumes
from maefast.errors import CheckpointError
from maefast.models import shards

from .sharding import like

_STATELESS = "without_optimizer_state"  # names of parameters that had no gradient so far; older versions write none


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
    about = {"format": "pt", "maefast": json.dumps(state.model_config)}
    save_file(_apart(model.state_dict()), temporary / MODEL, metadata=about)
    save_file(_optimizer_tensors(model, optimizer), temporary / OPTIMIZER, metadata={"format": "pt"})
    return _finish(final, temporary, state, _stateless(model, optimizer), keep)


def save_shards(
    folder: Path, state: State | None, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int = 3
) -> Path:
    """The same by all processes together, each of which writes the shards that it holds. `state`: on the main process,
    None on others. What goes wrong on one is raised on all."""
    final, temporary = _told(None if state is None else lambda: _begin(folder, state, "shards"))
    for name, tensors in (
        (MODEL_SHARDS, {name: tensor.detach() for name, tensor in model.state_dict().items()}),
        (OPTIMIZER_SHARDS, _optimizer_tensors(model, optimizer)),
    ):
        # What all hold is the main process's: running statistics, say, that processes may see differently.
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        torch.distributed.checkpoint.save(tensors, storage_writer=FileSystemWriter(temporary / name), planner=planner)
    stateless = _stateless(model, optimizer)
    return _told(None if state is None else lambda: _finish(final, temporary, state, stateless, keep))


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


def _finish(final: Path, temporary: Path, state: State, stateless: list[str], keep: int) -> Path:
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
        _STATELESS: stateless,
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
    mine, owners = model.state_dict(), dict(model.named_parameters())
    weights = _read(path, MODEL_SHARDS, MODEL, mine)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" …")  # torch names each tensor
        raise CheckpointError(f"{path} does not fit the model: {reason}") from error
    tensors = _read(path, OPTIMIZER_SHARDS, OPTIMIZER, owners, lambda key: key.split(".", 1)[1])
    slots: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        slots.setdefault(name, {})[kind] = tensor.clone()
    names = _parameter_names(model, optimizer)
    lacking = json.loads((path / STATE).read_text()).get(_STATELESS, [] if slots else names)
    wrong = (set(slots) - set(names)) | (set(names) - set(slots) - set(lacking))
    if wrong:
        raise CheckpointError(f"{path}: optimizer state and model differ in {sorted(wrong)[:5]}")
    state = {index: slots[name] for index, name in enumerate(names) if name in slots}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read(
    path: Path,
    folder: str,
    file: str,
    owners: dict[str, torch.Tensor],
    owner_of: Callable[[str], str] = lambda name: name,
) -> dict[str, torch.Tensor]:
    """The tensors in `folder`, or else `file`, each in the shards that its owner, if it is of that shape, lies in."""

    def empty(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        owner = owners.get(owner_of(name))
        if owner is None or owner.shape != shape:
            return torch.empty(shape, dtype=dtype)
        return torch.empty_like(owner.detach(), dtype=dtype)

    try:
        if (path / folder).is_dir():
            return shards.read(path / folder, empty)
        tensors = load_weights(path / file)
    except (ValueError, CheckpointError) as error:
        raise CheckpointError(f"{error}. {_without(path)}") from error
    for name, tensor in tensors.items():
        owner = owners.get(owner_of(name))
        if owner is not None and owner.shape == tensor.shape:
            tensors[name] = like(tensor, owner)
    return tensors


def _without(path: Path) -> str:
    """What to do about a checkpoint that is whole by its sizes and cannot be read."""
    step = next((step for step, found in listing(path.parent) if found.name == path.name), 0)
    older = [found for before, found in listing(path.parent) if before < step and complaint(found) is None]
    then = f"the run then goes on from {older[-1].name}" if older else "there is no older one: the run then starts anew"
    return f"Remove the folder {path}; {then}"


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters in its own order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _stateless(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters that it knows nothing of yet."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = _parameter_names(model, optimizer)
    return [name for name, parameter in zip(names, parameters, strict=True) if not optimizer.state.get(parameter)]


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a file of safetensors takes: none that shares its memory with another, as tied weights do."""
    found, taken = {}, set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        tensor = tensor.detach().contiguous()
        found[name] = tensor.to("cpu", copy=True) if memory in taken else tensor
        taken.add(memory)
    return found


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{kind}.{names[id(parameter)]}": value.detach().contiguous()
        for parameter, slots in optimizer.state.items()
        for kind, value in slots.items()
        if isinstance(value, torch.Tensor)
    }

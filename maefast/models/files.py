"""Opening files of weights: what is in them, as it is. `maefast.models.unwrap` finds the weights in it.

PyTorch's files are read with ``weights_only=True``: nothing in them can run. Records that people keep beside their
weights (options, paths, numpy scalars) are let through by name.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import pathlib
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from maefast.data.runs import STATE, weights_of
from maefast.models import shards

# What a folder may hold its weights in, in the order in which transformers looks for them.
IN_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
CONFIG = "config.json"
# What is found in the place of weights after a download that went wrong.
_OTHERS = {
    b"version https://git-lfs": "a pointer of git-lfs (git lfs pull fetches the file)",
    b"<": "a web page",
    b"\x1f\x8b": "compressed by gzip (unpack it)",
}


def _safe() -> list:
    """Classes and functions of files that only hold data, some of them under the names of older versions."""
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdFDSUO"}
    paths = {"PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath}
    paths.update(PurePosixPath=pathlib.PurePosixPath, PureWindowsPath=pathlib.PureWindowsPath)
    out: list = [argparse.Namespace, types.SimpleNamespace, np.dtype, np.ndarray, *dtypes, set, frozenset, slice]
    out += [complex, range, collections.defaultdict, torch.torch_version.TorchVersion]
    out += [datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone]
    for module in ("pathlib", "pathlib._local"):
        out += [(kind, f"{module}.{name}") for name, kind in paths.items()]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        out += [(scalar, f"{module}.scalar"), (rebuild, f"{module}._reconstruct")]
    return out


def find_file(path: Path) -> Path:
    """The file of weights in a folder as Hugging Face writes it, the folder of shards in a checkpoint of a run, or
    `path` itself.

    Raises:
        FileNotFoundError: no such file, or a folder without one.
    """
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such checkpoint")
        return path
    found = next((path / name for name in IN_FOLDER if (path / name).is_file()), None)
    if found is None:
        for folder in (weights_of(path), path):
            if shards.is_sharded(folder) and (folder.parent / STATE).is_file():
                return folder
        more = ""
        if (path / ".metadata").is_file():
            more = (
                "; a distributed one: python -m torch.distributed.checkpoint.format_utils dcp_to_torch makes it a file"
            )
        raise FileNotFoundError(f"no checkpoint found at {path}: none of {', '.join(IN_FOLDER)} in it{more}")
    return found


def open_file(path: Path) -> tuple[Any, dict[str, str], Path]:
    """What a file holds: (its content on the CPU, safetensors' metadata, the file itself).

    Args:
        path: a file or a folder, see `find_file`. An index of several files is followed. Of shards the description of
            the model, which is metadata in a file, is that beside them.

    Raises:
        ValueError: not a file of weights; says what it looks like. pickle.UnpicklingError: one that holds an object of
        a class that is not known to be plain data; the message names the class. And what torch and safetensors raise.
    """
    path = find_file(path.expanduser())
    if path.is_dir():
        document = json.loads((path.parent / STATE).read_text())
        return shards.read(path), {"maefast": json.dumps(document["model_config"])}, path
    if path.name.endswith(".index.json"):
        content: dict[str, Any] = {}
        for name in sorted(set(json.loads(path.read_text())["weight_map"].values())):
            content.update(_read(path.parent / name)[0])
        return content, {}, path
    return *_read(path), path


def _read(path: Path) -> tuple[Any, dict[str, str]]:
    with open(path, "rb") as file:
        head = file.read(64)
    for start, what in _OTHERS.items():
        if head.startswith(start):
            raise ValueError(f"{path} is {what}, no file of weights")
    if len(head) < 8:
        raise ValueError(f"{path} has {len(head)} bytes: it is no file of weights")
    if head[8:9] == b"{":  # by its content, for people rename files
        with safe_open(path, "pt") as file:
            return load_file(path), file.metadata() or {}
    if not head.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path} is neither a safetensors file nor one of torch.save; it begins with {head[:16]!r}")
    with torch.serialization.safe_globals(_safe()), open(path, "rb") as file:  # by its name torch would look too
        return torch.load(file, map_location="cpu", weights_only=True), {}


def config_beside(path: Path) -> dict[str, Any] | None:
    """The config.json that Hugging Face puts beside a file of weights; None if there is none.

    Raises:
        ValueError: it cannot be read.
    """
    beside = path.parent / CONFIG
    try:
        document = json.loads(beside.read_text()) if beside.is_file() else None
    except ValueError as error:
        raise ValueError(f"{beside} cannot be read: {error}") from error
    return document if isinstance(document, dict) else None


def refused_class(error: BaseException) -> str | None:
    """The class that torch would not load, from its message."""
    found = re.search(r"Unsupported \w+: GLOBAL (\S+)", str(error))
    return found[1] if found else None


def describe(content: Any) -> str:
    """What is in a file, in one line: ``"model" (252 tensors: cls_token, …), "epoch" (int)``."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    if not content:
        return "an empty dict"
    tensors = [key for key, value in content.items() if isinstance(value, torch.Tensor)]
    parts = [f"{len(tensors)} tensors ({_some(tensors)})"] if tensors else []
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            continue
        inside = [k for k, v in value.items() if isinstance(v, torch.Tensor)] if isinstance(value, Mapping) else []
        what = f"{len(inside)} tensors: {_some(inside)}" if inside else type(value).__name__
        parts.append(f'"{key}" ({what})')
    return ", ".join(parts[:12]) + (", …" if len(parts) > 12 else "")


def _some(names: list) -> str:
    return ", ".join(str(name) for name in names[:3]) + (", …" if len(names) > 3 else "")

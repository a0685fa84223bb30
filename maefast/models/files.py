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
import pickle
import pickletools
import re
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from maefast.data.runs import STATE, latest, weights_of
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
        if newest := latest(path / "checkpoints")[0]:
            raise FileNotFoundError(f"{path} is a run, not a checkpoint of one: the newest is {newest}")
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
    with torch.serialization.safe_globals(_safe()), open(path, "rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")  # an error says more if it cannot be read
        return torch.load(file, map_location="cpu", weights_only=True), {}  # by its name torch would look too


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


def refusal(path: Path, error: BaseException) -> str | None:
    """What to tell where torch would not read `path`, in the place of its own words, which advise to run what is in it;
    None: the error is another one."""
    if not isinstance(error, pickle.UnpicklingError) and "Invalid magic number" not in str(error):
        return None
    plain = _plain_pickle(path)
    if plain is not None:
        what = f" with an object of {', '.join(plain[:3])}" if plain else ""
        return (
            f"{path} is a plain pickle{what}, which is not loaded, since it could run code.\n"
            "Save the weights alone: torch.save(model.state_dict(), path) where the model is at hand"
        )
    if refused := refused_class(error):
        return (
            f"{path} holds an object of {refused}, which is not loaded, since it could run code.\n"
            "If you trust the file: torch.serialization.add_safe_globals in Python, or save its state_dict() alone"
        )
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return f"{path} cannot be read with weights_only=True: {found[1] if found else 'its pickle is broken'}"


def _plain_pickle(path: Path) -> list[str] | None:
    """The classes and functions that a pickle of Python names, those of tensors and arrays last; None: the file is of
    torch.save, or broken."""
    try:
        with open(path.expanduser(), "rb") as file:
            if file.read(2) == b"PK":
                return None
            file.seek(0)
            found = _imports(file)
            if file.read(1):
                return None  # torch.save's has several, one behind another
    except (ValueError, OSError):
        return None
    return sorted(found, key=lambda name: name.startswith(("torch.", "numpy.", "collections.", "_codecs.")))


def _imports(file: BinaryIO) -> dict[str, None]:
    """What a pickle would import, in order, by its opcodes: nothing of it runs."""
    found: dict[str, None] = {}
    strings: list[Any] = []
    memo: list[Any] = []  # of protocol 4, which writes a name once and then its number
    for code, argument, _ in pickletools.genops(file):
        if code.name == "GLOBAL":
            found[argument.replace(" ", ".")] = None
        elif code.name == "STACK_GLOBAL":
            found[".".join(map(str, strings[-2:]))] = None
        elif code.name == "MEMOIZE":
            memo.append(strings[-1] if strings else None)
        elif code.name in ("BINGET", "LONG_BINGET"):
            strings.append(memo[argument] if argument < len(memo) else None)
        elif isinstance(argument, str):
            strings.append(argument)
    return found


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

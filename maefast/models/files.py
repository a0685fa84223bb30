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

# What a folder may hold its weights in, in the order in which transformers looks for them.
IN_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
CONFIG = "config.json"


def _safe() -> list:
    """Classes and functions of files that only hold data, some of them under the names of older versions."""
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdFDSUO"}
    paths = {"PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath}
    paths.update(PurePosixPath=pathlib.PurePosixPath, PureWindowsPath=pathlib.PureWindowsPath)
    out: list = [argparse.Namespace, types.SimpleNamespace, np.dtype, np.ndarray, *dtypes, set, frozenset, slice]
    out += [complex, range, collections.defaultdict]
    out += [datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone]
    for module in ("pathlib", "pathlib._local"):
        out += [(kind, f"{module}.{name}") for name, kind in paths.items()]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        out += [(scalar, f"{module}.scalar"), (rebuild, f"{module}._reconstruct")]
    return out


def find_file(path: Path) -> Path:
    """The file of weights in a folder as Hugging Face writes it, or `path` itself.

    Raises:
        FileNotFoundError: no such file, or a folder without one.
    """
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such checkpoint")
        return path
    found = next((path / name for name in IN_FOLDER if (path / name).is_file()), None)
    if found is None:
        more = ""
        if (path / ".metadata").is_file():
            more = (
                "; a distributed one: python -m torch.distributed.checkpoint.format_utils dcp_to_torch makes it a file"
            )
        raise FileNotFoundError(f"no checkpoint found at {path}: none of {', '.join(IN_FOLDER)} in it{more}")
    return found


def open_file(path: Path) -> tuple[Any, dict[str, str], dict[str, Any] | None]:
    """What a file holds: (its content on the CPU, safetensors' metadata, the config.json beside it if there is one).

    Args:
        path: a file or a folder, see `find_file`. An index of several files is followed.

    Raises:
        What torch and safetensors raise for a file that cannot be read. pickle.UnpicklingError: one that holds an
        object of a class that is not known to be plain data; the message names the class.
    """
    path = find_file(path)
    beside = path.parent / CONFIG
    config = json.loads(beside.read_text()) if beside.is_file() else None
    if path.name.endswith(".index.json"):
        content: dict[str, Any] = {}
        for name in sorted(set(json.loads(path.read_text())["weight_map"].values())):
            content.update(_read(path.parent / name))
        return content, {}, config
    if path.suffix != ".safetensors":
        return _read(path), {}, config
    with safe_open(path, "pt") as file:
        return _read(path), file.metadata() or {}, config


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    with torch.serialization.safe_globals(_safe()):
        return torch.load(path, map_location="cpu", weights_only=True)


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
